"""Synthetic songs for benchmarks of training: random log-mels in a memory-mapped file, and texts of a given length."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from transformers import BertConfig

from htcl_ray.config import Config, resolve
from htcl_ray.models import HTCL
from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.text import TextEncoder, text_encoder_from_scratch, transformer_from_config
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.batches import Batch, BatchLoader
from htcl_ray.training.features import FRAMES, OFFSETS, Frames
from htcl_ray.training.song_numbers import Pairs, Songs
from htcl_ray.training.stage_tasks import Task, finetune_task, pretrain_task

STORED = 1024
"""Number of stored log-mels; song i has the log-mel of song i mod this, but its own text and ids."""
WORDS = {"demo": 8, "paper": 48}
"""Number of words of a text; the sample world's texts have 5 to 8."""
MULTILINGUAL_VOCABULARY = 105_879
PREVIEW_SHARE, PREVIEW_SECONDS = 1 / 3, 30.0
MEDIAN_SECONDS, DEVIATION = 210.0, 0.5
MIXED_LENGTHS = (
    f"{PREVIEW_SHARE:.0%} previews of {PREVIEW_SECONDS:g} s; other songs log-normal (median {MEDIAN_SECONDS:g} s, "
    f"sigma {DEVIATION:g}), cut at the clip length; lengths scale with the clip length where it is not 120 s"
)
"""Distribution of `mixed` clips: a catalogue of full songs, a third of which are available only as previews."""


Clips = Literal["full", "mixed", "sample"]


@dataclass(frozen=True)
class World:
    """The inputs of training."""

    config: Config
    songs: Songs
    frames: Frames
    vocabulary: str


def make_world(folder: Path, size: str, songs: int, clips: Clips | None = None) -> World:
    """Generate a world in `folder` for the preset `size`, demo (clips of 8 s) or paper (120 s).

    `clips`: full for the preset's length, mixed for MIXED_LENGTHS, sample for full ± 3 % as in the sample world. None
    is sample at demo size and full at paper size.
    """
    config = resolve(size).with_overrides(
        {"audio.tower": "transformer", "audio.n_mels": 128}  # the published step has no others
    )
    longest, bands, rng = config.audio.max_frames, config.audio.n_mels, np.random.default_rng(0)
    lengths = clip_lengths(clips or ("full" if size == "paper" else "sample"), longest, songs, rng)
    stored = min(songs, STORED)
    starts = np.arange(songs) % stored * longest
    folder.mkdir(parents=True, exist_ok=True)
    rng.normal(-50, 15, (stored * longest, bands)).astype(np.float16).tofile(folder / FRAMES)
    np.save(folder / OFFSETS, np.stack([starts, starts + lengths], axis=1))
    words = np.array(
        [
            f"{a}{b}"
            for a in ("ka", "lo", "mi", "ne", "ru", "so", "ti", "va")
            for b in ("ban", "del", "fir", "gos", "hum", "jet")
        ]
    )
    texts = [" ".join(rng.choice(words, WORDS[size])) + f" {song}" for song in range(songs)]
    numbers = np.arange(songs)
    table = Songs(
        [f"{song:06d}" for song in range(songs)], texts, np.stack([numbers] * 3, axis=1), numbers, numbers[:0]
    )
    return World(config, table, Frames(folder, bands), train_wordpiece(texts[:500], config.text.vocab_size))


def clip_lengths(clips: Clips, longest: int, songs: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the number of frames of each clip, int [songs], from 1 to `longest`."""
    if clips == "full":
        return np.full(songs, longest)
    if clips == "sample":
        return np.minimum(longest, (longest * rng.uniform(0.97, 1.03, songs)).astype(int))
    seconds = MEDIAN_SECONDS * np.exp(DEVIATION * rng.standard_normal(songs))
    seconds[rng.random(songs) < PREVIEW_SHARE] = PREVIEW_SECONDS
    return np.clip(np.round(seconds / 120 * longest), 1, longest).astype(int)


def make_model(world: World, stage: int, device: torch.device, layers: int | None = None) -> HTCL:
    """Create a model with random weights; at paper size its text tower has the sizes of bert-base-multilingual-uncased.

    `layers` replaces the preset's number of Transformer layers in both towers; such a model has no more words than its
    tokenizer, so that it can be saved and loaded.
    """
    config = (
        world.config if layers is None else world.config.with_overrides({"model.layers": layers, "text.layers": layers})
    )
    if config.text.name_or_path is None:
        model = HTCL.untrained(config, world.vocabulary)
    else:
        tokenizer = text_encoder_from_scratch(config.text, world.vocabulary).tokenizer
        words = MULTILINGUAL_VOCABULARY if layers is None else len(tokenizer)
        bert = BertConfig(vocab_size=words, num_hidden_layers=layers or 12).to_dict()
        text = TextEncoder(transformer_from_config(bert), tokenizer, config.text)
        model = HTCL(ModelRecord(stage=1, audio=config.audio, model=config.model, text=text.record), text)
    return (model if stage == 1 else model.to_stage_2(0.074, seed=0)).to(device)


def make_task(world: World, stage: int, device: torch.device) -> Task:
    """Create the task of a stage. In stage 2, songs 2i and 2i + 1 are a pair, without rehearsal songs, as published."""
    if stage == 1:
        return pretrain_task(world.songs, world.config.pretrain)
    pairs = world.songs.train[: len(world.songs.train) // 2 * 2].reshape(-1, 2)
    no_pairs = pairs[:0]
    of_world = Pairs(pairs, np.ones(len(pairs)), no_pairs, 0, no_pairs, np.ones(0), 0)
    published = world.config.finetune.model_copy(update={"rehearsal_songs_per_pair": 0})
    return finetune_task(of_world, world.songs.train, published, device)


def first_batch(world: World, model: HTCL, stage: int, rows: int, device: torch.device) -> Batch:
    """Load `rows` songs, or in stage 2 `rows` pairs: first the trigger songs, then the paired songs."""
    songs = np.arange(rows) if stage == 1 else np.arange(2 * rows).reshape(-1, 2).T.reshape(-1)
    return BatchLoader(world.songs, world.frames, model.text_encoder, None).load(songs).to(device)
