"""Compare training recipes with a baseline: averaged weights, augmentation, learning rates, and how batches are composed.

    python -m benchmarks.training_recipes [--beds esc10 listeners] [--recipes NAME …] [--seeds 0 1 2] [--summary]

Two beds, each small enough for many runs. `esc10`: stage 1 on real audio, ESC-10 (Piczak 2015), as in
benchmarks/audio_towers.py, with a smaller `cnn`; every fold is held out once. `listeners`: both stages on vectors of a
simulated catalogue, where users have tastes for named and for hidden traits, artists share a vector, and a fifth of the
songs is held out. What is no setting of the package is a prototype in this file: it was measured and not kept.

Each run appends a line to --out, and runs that are in it are not computed again; --summary writes
benchmarks/results/training_recipes.json from it. One process, one thread.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import scipy.stats
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import audio_towers
from benchmarks.environment import write_result
from htcl_ray.config import resolve
from htcl_ray.config.sections import StageSettings
from htcl_ray.losses.stages import Terms
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training import loop
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.features import FRAMES, OFFSETS, Frames
from htcl_ray.training.optimization import build_optimizer
from htcl_ray.training.song_numbers import Pairs, Rows, Songs
from htcl_ray.training.stage_tasks import Task, finetune_task, pretrain_task

CPU = torch.device("cpu")
ESC10 = {
    **audio_towers.COMMON,
    **audio_towers.SPEC_AUGMENT,
    "audio.tower": "cnn",
    "audio.hop_length": 1024,
    "model.cnn.channels": [16, 32, 64],
    "model.cnn.width": 64,
    "pretrain.time_shift": True,
    "text.width": 32,
    "text.layers": 1,
    "text.heads": 2,
}
LISTENERS = {
    "audio.extractor": "vectors",
    "audio.tower": "mlp",
    "model.mlp": {"hidden": [128], "width": 64, "dropout": 0.1},
    "text.width": 32,
    "text.layers": 1,
    "text.heads": 2,
    "text.max_tokens": 16,
    "pretrain.epochs": 12,
    "pretrain.learning_rate": 3e-3,
    "pretrain.text_learning_rate": 3e-3,
    "pretrain.health": {"action": "off"},
    "finetune.epochs": 8,
    "finetune.learning_rate": 3e-3,
    "finetune.audio_learning_rate": 3e-3,
    "finetune.freeze_text": True,
    "finetune.rehearsal_songs_per_pair": 0,
    "finetune.preference_loss_weight": 1.0,
    "finetune.several_positives": False,
    "finetune.health": {"action": "off"},
}
GROUP = 8
"""Rows of a batch that belong together in recipes that compose batches."""


@dataclass(frozen=True)
class World:
    """The simulated catalogue of the bed `listeners`."""

    features: np.ndarray
    genre: np.ndarray
    artist: np.ndarray
    texts: list[dict[str, str]]
    """Values of the text columns of each song."""
    train: Rows
    test: Rows
    pairs: Rows
    """[p, 2], training songs."""
    weights: np.ndarray
    history: list[Rows]
    """Training songs that each user liked."""
    utility: np.ndarray
    """[users, songs]: true utility."""


@dataclass(frozen=True)
class Context:
    """What a prototype may need of a run."""

    model: HTCL
    frames: Frames
    genre: np.ndarray
    artist: np.ndarray


Wrap = Callable[[Task, Context], Task]


@dataclass(frozen=True)
class Recipe:
    """A change to the baseline."""

    settings: dict[str, Any] = field(default_factory=dict)
    augmentation: type[Augmentation] = Augmentation
    task: Wrap | None = None
    layer_decay: float | None = None
    ema_decay: float | None = None
    """Decay per step of a moving average of the weights, which is evaluated in place of the weights."""
    columns: tuple[str, ...] | None = None
    stages: int = 2


# ---------------------------------------------------------------- prototypes: augmentation


class Noise(Augmentation):
    """White noise in every mel band, 10 to 40 dB below the loudest cell, in half of the clips."""

    def alter(self, random: np.random.Generator, clip: np.ndarray) -> None:
        super().alter(random, clip)
        if random.random() < 0.5:
            level = float(clip.max()) - random.uniform(10, 40)
            noise = level + 10 * np.log10(random.exponential(size=clip.shape) + 1e-6)
            clip[:] = add_decibels(clip, noise)


class Mixup(Augmentation):
    """Another clip added 3 to 20 dB below, in half of the clips; the text stays. See `others`."""

    others: list[np.ndarray]

    def alter(self, random: np.random.Generator, clip: np.ndarray) -> None:
        super().alter(random, clip)
        if random.random() < 0.5:
            other = np.resize(self.others[int(random.integers(len(self.others)))], clip.shape)
            quieter = random.uniform(3, 20) + float(other.max()) - float(clip.max())
            clip[:] = add_decibels(clip, other.astype(np.float32) - quieter)


class FromTheBeginning(Augmentation):
    """Always the first window of the clip."""

    def crop(self, random: np.random.Generator, frames: int) -> tuple[int, int]:
        return 0, min(frames, self.window or frames)


def add_decibels(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The sum of two powers in dB."""
    power = 10 ** (first.astype(np.float64) / 10) + 10 ** (second.astype(np.float64) / 10)
    return 10 * np.log10(power)


# ---------------------------------------------------------------- prototypes: batches


def grouped(order: Rows, keys: np.ndarray, random: np.random.Generator) -> Rows:
    """Reorder rows [n, c] so that `GROUP` rows with equal keys [n] follow each other; every row stays."""
    by_key = np.argsort(keys + random.random(len(keys)) * 0.5, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(keys[by_key]) != 0))
    runs = [part[at : at + GROUP] for part in np.split(by_key, starts[1:]) for at in range(0, len(part), GROUP)]
    return order[np.concatenate([runs[place] for place in random.permutation(len(runs))])]


def composed(by: str, task: Task, context: Context) -> Task:
    """Batches of groups of equal genre or artist (of the first song of a row), or nearest by the current model."""

    def order(epoch: int) -> Rows:
        rows = task.order(epoch)
        random = np.random.default_rng([epoch, 7])
        if by == "nearest":
            return nearest(rows, context, random)
        return grouped(rows, getattr(context, by)[rows[:, 0]], random)

    return replace(task, order=order)


def nearest(rows: Rows, context: Context, random: np.random.Generator) -> Rows:
    """Groups of a row and the rows whose first songs are nearest to its first song by the current model."""
    vectors = audio_towers.embed(context.model, context.frames, rows[:, 0])
    free = np.ones(len(rows), dtype=bool)
    groups = []
    for row in random.permutation(len(rows)):
        if free[row]:
            scores = np.where(free, vectors @ vectors[row], -np.inf)
            scores[row] = np.inf
            group = np.argpartition(-scores, min(GROUP, len(rows)) - 1)[:GROUP]
            group = group[free[group]]
            free[group] = False
            groups.append(group)
    return rows[np.concatenate([groups[place] for place in random.permutation(len(groups))])]


# ---------------------------------------------------------------- prototypes: losses


def two_crops(task: Task, context: Context) -> Task:
    """Stage 1 with every song twice, each time with its own augmentation, and a term between the two clips."""

    def terms(model: HTCL, audio: Tensor, text: Tensor, ids: Tensor) -> Terms:
        half = len(audio) // 2
        once = task.terms(model, audio[:half], text[:half], ids[:half])
        again = task.terms(model, audio[half:], text[half:], ids[half:])
        other = ids[:half, None, 0] != ids[None, half:, 0]
        unit = F.normalize(audio, dim=1)
        logits = unit[:half] @ unit[half:].T / 0.1
        logits = logits.masked_fill(~other & ~torch.eye(half, dtype=torch.bool), -torch.inf)
        target = torch.arange(half)
        between = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        return {"text": (once["text"] + again["text"]) / 2 + 0.3 * between}

    return replace(
        task,
        songs_per_row=2,
        order=lambda epoch: np.repeat(task.order(epoch), 2, axis=1),
        terms=terms,
    )


def layered_optimizer(decay: float, model: HTCL, settings: StageSettings) -> torch.optim.Optimizer:
    """The optimizer with the rate of each layer of the audio tower `decay` times that of the layer after it."""
    optimizer = build_optimizer(model, settings)
    groups = model.audio_encoder.layer_groups()
    share = {
        id(parameter): decay ** (len(groups) - 1 - depth) for depth, group in enumerate(groups) for parameter in group
    }
    optimizer.param_groups[:] = [
        {**group, "params": [parameter], "peak": group["peak"] * share.get(id(parameter), 1.0)}
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
    return optimizer


# ---------------------------------------------------------------- recipes

BASELINE = "baseline"
ESC10_RECIPES: dict[str, Recipe] = {
    BASELINE: Recipe(),
    "ema 0.9": Recipe(ema_decay=0.9),
    "ema 0.98": Recipe(ema_decay=0.98),
    "constant rate": Recipe({"pretrain.schedule": "constant"}),
    "constant rate, ema 0.98": Recipe({"pretrain.schedule": "constant"}, ema_decay=0.98),
    "noise": Recipe(augmentation=Noise),
    "mixup": Recipe(augmentation=Mixup),
    "two crops": Recipe(task=two_crops),
    "layer decay 0.7": Recipe(layer_decay=0.7),
    "half a clip from the beginning": Recipe({"model.window_seconds": 2.5}, augmentation=FromTheBeginning),
    "half a clip at random": Recipe({"model.window_seconds": 2.5}),
    "batch 128": Recipe({"pretrain.batch_size": 128}),
    "batch 128, rate x 2": Recipe({"pretrain.batch_size": 128, "pretrain.learning_rate": 2e-3}),
    "batch 128, rate x 4": Recipe({"pretrain.batch_size": 128, "pretrain.learning_rate": 4e-3}),
}
TITLE, ARTIST, TAGS = ("title",), ("artist",), ("genre", "mood", "instrument")
LISTENER_RECIPES: dict[str, Recipe] = {
    BASELINE: Recipe(),
    "ema 0.9": Recipe(ema_decay=0.9),
    "ema 0.98": Recipe(ema_decay=0.98),
    "constant rate": Recipe({f"{stage}.schedule": "constant" for stage in ("pretrain", "finetune")}),
    "constant rate, ema 0.98": Recipe(
        {f"{stage}.schedule": "constant" for stage in ("pretrain", "finetune")}, ema_decay=0.98
    ),
    "layer decay 0.7": Recipe(layer_decay=0.7),
    "same genre": Recipe(task=functools.partial(composed, "genre")),
    "same artist": Recipe(task=functools.partial(composed, "artist")),
    "nearest": Recipe(task=functools.partial(composed, "nearest")),
    "several positives": Recipe({"finetune.several_positives": True}),
    "text: title, artist": Recipe(columns=(*TITLE, *ARTIST), stages=1),
    "text: title, artist, tags": Recipe(columns=(*TITLE, *ARTIST, *TAGS), stages=1),
    "text: tags, title, artist": Recipe(columns=(*TAGS, *TITLE, *ARTIST), stages=1),
    "batch 256": Recipe({"pretrain.batch_size": 256, "finetune.batch_size": 256}),
    "batch 256, rate x 2": Recipe(
        {
            **{f"{stage}.batch_size": 256 for stage in ("pretrain", "finetune")},
            **{f"{stage}.learning_rate": 6e-3 for stage in ("pretrain", "finetune")},
            "pretrain.text_learning_rate": 6e-3,
            "finetune.audio_learning_rate": 6e-3,
        }
    ),
    "batch 256, rate x 4": Recipe(
        {
            **{f"{stage}.batch_size": 256 for stage in ("pretrain", "finetune")},
            **{f"{stage}.learning_rate": 12e-3 for stage in ("pretrain", "finetune")},
            "pretrain.text_learning_rate": 12e-3,
            "finetune.audio_learning_rate": 12e-3,
        }
    ),
}
BEDS = {"esc10": ESC10_RECIPES, "listeners": LISTENER_RECIPES}


# ---------------------------------------------------------------- runs


def train(recipe: Recipe, task: Task, context: Context, loader: BatchLoader, settings: StageSettings) -> None:
    task = task if recipe.task is None else recipe.task(task, context)
    average: dict[str, Tensor] = {}

    def build(model: HTCL, settings: StageSettings) -> torch.optim.Optimizer:
        decay, steps = recipe.ema_decay, itertools.count(1)
        plain = recipe.layer_decay is None
        optimizer = (
            build_optimizer(model, settings) if plain else layered_optimizer(recipe.layer_decay, model, settings)
        )
        if decay is not None:
            average.update({name: value.detach().clone() for name, value in model.named_parameters()})

            def update(*_: object) -> None:
                step = next(steps)
                for name, value in model.named_parameters():
                    average[name].lerp_(value.detach(), 1 - min(decay, (1 + step) / (10 + step)))

            optimizer.register_step_post_hook(update)
        return optimizer

    with patch.object(loop, "build_optimizer", build):
        loop.train(
            context.model,
            task,
            loader,
            settings,
            CPU,
            on_checkpoint=lambda *_: None,
            say=lambda line: None,
            show_progress=False,
        )
    context.model.load_state_dict(average, strict=False)


def open_features(features: list[np.ndarray], folder: Path) -> Frames:
    ends = np.cumsum([len(clip) for clip in features])
    np.concatenate(features).astype(np.float16).tofile(folder / FRAMES)
    np.save(folder / OFFSETS, np.stack([np.append(0, ends[:-1]), ends], axis=1))
    return Frames(folder, features[0].shape[1])


def run_esc10(recipe: Recipe, seed: int, fold: int) -> dict[str, float]:
    """Train on the other folds and classify the fold; accuracies."""
    config = resolve("demo").with_overrides({**ESC10, "pretrain.seed": seed, **recipe.settings})
    clips, features = esc10()
    names, of_name = np.unique(clips.labels, return_inverse=True)
    known, held_out = np.flatnonzero(clips.folds != fold), np.flatnonzero(clips.folds == fold)
    numbers = np.arange(len(clips.ids))
    songs = Songs(clips.ids, clips.labels.tolist(), np.stack([numbers, numbers, of_name], axis=1), known, held_out[:0])
    with tempfile.TemporaryDirectory() as scratch:
        frames = open_features(features, Path(scratch))
        vocabulary = train_wordpiece(clips.labels[known].tolist(), config.text.vocab_size)
        model = HTCL.untrained(config, vocabulary, feature_width=frames.width)
        augmentation = recipe.augmentation(config.pretrain, model.window_frames, model.recipe.extractor)
        if isinstance(augmentation, Mixup):
            object.__setattr__(augmentation, "others", [features[clip] for clip in known])
        loader = BatchLoader(songs, frames, model.text_encoder, augmentation)
        task = pretrain_task(songs, config.pretrain)
        train(recipe, task, Context(model, frames, of_name, of_name), loader, config.pretrain)
        audio = audio_towers.embed(model, frames, numbers)
    nearest_name = (audio[held_out] @ model.embed_text(names.tolist()).numpy().T).argmax(axis=1)
    return {
        "zero_shot": float((nearest_name == of_name[held_out]).mean()),
        **audio_towers.probes(audio, of_name, known, held_out),
    }


@functools.cache
def esc10() -> tuple[audio_towers.Clips, list[np.ndarray]]:
    clips = audio_towers.read_clips(audio_towers.DATA)
    return clips, audio_towers.features_of(clips, resolve("demo").with_overrides(ESC10), audio_towers.DATA)


GENRES, MOODS, INSTRUMENTS, HIDDEN, ARTIST_TRAITS, WIDTH = 8, 5, 8, 4, 4, 64
SONGS, ARTISTS, USERS, VISITS = 1500, 200, 500, 40


@functools.cache
def make_world(seed: int) -> World:
    """Songs with named, hidden and artist traits, mixed into vectors by a random network; users who like songs."""
    random = np.random.default_rng([seed, 1])
    artist = random.integers(ARTISTS, size=SONGS)
    genre = random.integers(GENRES, size=ARTISTS)[artist]
    mood, instrument = random.integers(MOODS, size=SONGS), random.integers(INSTRUMENTS, size=SONGS)
    hidden = random.uniform(-1, 1, (SONGS, HIDDEN))
    named = np.hstack([np.eye(count)[of] for count, of in ((GENRES, genre), (MOODS, mood), (INSTRUMENTS, instrument))])
    traits = np.hstack([named, hidden, random.normal(size=(ARTISTS, ARTIST_TRAITS))[artist]])
    inner = np.tanh(traits @ random.normal(size=(traits.shape[1], 96)))
    features = inner @ random.normal(size=(96, WIDTH)) / 8 + 0.4 * random.normal(size=(SONGS, WIDTH))
    texts = [
        {
            "title": f"w{random.integers(300)} w{random.integers(300)}",
            "artist": f"a{artist[song]}",
            "genre": f"g{genre[song]}",
            "mood": f"m{mood[song]}",
            "instrument": f"i{instrument[song]}",
        }
        for song in range(SONGS)
    ]
    taste_hidden, taste_genre = random.normal(size=(USERS, HIDDEN)), random.normal(size=(USERS, GENRES))
    utility = 3.0 * taste_hidden @ hidden.T + taste_genre[:, genre] + 0.3 * random.normal(size=(USERS, MOODS))[:, mood]
    held_out = random.random(ARTISTS)[artist] < 0.2
    train_songs, test = np.flatnonzero(~held_out), np.flatnonzero(held_out)
    popularity = (1 + random.permutation(len(train_songs))) ** -0.5
    history, drawn = [], []
    for user in range(USERS):
        offered = random.choice(train_songs, 5 * VISITS, p=popularity / popularity.sum())
        liked = offered[utility[user, offered] + random.logistic(size=len(offered)) > 5]
        history.append(np.unique(liked))
        drawn += [(a, b) for a, b in zip(liked, np.roll(liked, 1), strict=True) if a != b]
    pairs, weights = np.unique(np.array(drawn), axis=0, return_counts=True)
    return World(
        features,
        genre,
        artist,
        texts,
        train_songs,
        test,
        pairs,
        weights.astype(np.float64),
        history,
        utility,
    )


def run_listeners(recipe: Recipe, seed: int) -> dict[str, float]:
    """Both stages; metrics of held-out songs by artists that training never saw."""
    world = make_world(seed)
    changes = {**LISTENERS, "pretrain.seed": seed, "finetune.seed": seed, **recipe.settings}
    config = resolve("demo").with_overrides(changes)
    columns = recipe.columns or TAGS
    texts = ["; ".join(song[column] for column in columns) for song in world.texts]
    _, of_text = np.unique(texts, return_inverse=True)
    numbers = np.arange(len(texts))
    ids = np.stack([numbers, numbers, of_text], axis=1).astype(np.int64)
    songs = Songs([f"song-{number:05d}" for number in numbers], texts, ids, world.train, world.test[:0])
    none = world.pairs[:0]
    pairs = Pairs(world.pairs, world.weights, none, 0, none, world.weights[:0], 0)
    with tempfile.TemporaryDirectory() as scratch:
        frames = open_features(list(world.features[:, None, :]), Path(scratch))
        vocabulary = train_wordpiece([texts[song] for song in world.train], config.text.vocab_size)
        model = HTCL.untrained(config, vocabulary, feature_width=WIDTH)
        context = Context(model, frames, world.genre, world.artist)
        loader = BatchLoader(songs, frames, model.text_encoder, None)
        train(recipe, pretrain_task(songs, config.pretrain), context, loader, config.pretrain)
        semantic = audio_towers.embed(model, frames, numbers)
        measured = {f"{metric} 1": value for metric, value in semantics(model, semantic, world, texts).items()}
        measured["cold ndcg@10 1"] = cold_ndcg(semantic, world)
        if recipe.stages == 1:
            return measured
        settings = config.finetune
        model = model.to_stage_2(settings.temperature, seed, loss=settings.loss, batch_size=settings.global_batch_size)
        context = replace(context, model=model)
        loader = replace(loader, text_encoder=model.text_encoder)
        train(recipe, finetune_task(pairs, world.train, settings, CPU), context, loader, settings)
        preference = audio_towers.embed(model, frames, numbers)
    second = {f"{metric} 2": value for metric, value in semantics(model, preference, world, texts).items()}
    return {**measured, **second, "cold ndcg@10 2": cold_ndcg(preference, world)}


def semantics(model: HTCL, audio: np.ndarray, world: World, texts: list[str]) -> dict[str, float]:
    """Accuracy of the nearest genre name and precision@10 of queries of a genre and a mood, on held-out songs."""
    names = [f"g{number}" for number in range(GENRES)]
    held_out = audio[world.test]
    of_names = held_out @ model.embed_text(names).numpy().T
    queries = [(f"g{genre}", f"m{mood}") for genre in range(GENRES) for mood in range(MOODS)]
    scores = model.embed_text(["; ".join(query) for query in queries]).numpy() @ held_out.T
    tags = np.array([(world.texts[song]["genre"], world.texts[song]["mood"]) for song in world.test])
    hits = [
        np.mean((tags[np.argsort(-row)[:10]] == query).all(axis=1)) for row, query in zip(scores, queries, strict=True)
    ]
    return {
        "genre": float((of_names.argmax(axis=1) == world.genre[world.test]).mean()),
        "tag queries": float(np.mean(hits)),
    }


def cold_ndcg(audio: np.ndarray, world: World) -> float:
    """NDCG@10 of held-out songs by the mean vector of the songs a user liked; a tenth of them is relevant."""
    utility = world.utility[:, world.test]
    relevant = utility >= np.quantile(utility, 0.9, axis=1, keepdims=True)
    discount = 1 / np.log2(2 + np.arange(10))
    values = []
    for user, liked in enumerate(world.history):
        if len(liked):
            best = np.argsort(-(audio[world.test] @ audio[liked].mean(axis=0)))[:10]
            values.append((relevant[user, best] * discount).sum() / discount.sum())
    return float(np.mean(values))


# ---------------------------------------------------------------- results


def difference(lines: list[dict[str, Any]], baseline: list[dict[str, Any]], metric: str) -> dict[str, float]:
    """Mean paired difference over seeds (and folds) with its 95 % interval of Student's t."""
    of_baseline = {(line["seed"], line["fold"]): line["metrics"][metric] for line in baseline}
    values = np.array([line["metrics"][metric] - of_baseline[line["seed"], line["fold"]] for line in lines])
    half = float(scipy.stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return {
        "mean": round(float(values.mean()), 4),
        "low": round(float(values.mean()) - half, 4),
        "high": round(float(values.mean()) + half, 4),
    }


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Means of each recipe, and its paired differences to the baseline."""
    result: dict[str, Any] = {}
    for bed, recipes in BEDS.items():
        of_bed = [line for line in lines if line["bed"] == bed]
        baseline = [line for line in of_bed if line["recipe"] == BASELINE]
        for name in recipes:
            chosen = [line for line in of_bed if line["recipe"] == name]
            if not chosen:
                continue
            metrics = list(chosen[0]["metrics"])
            entry: dict[str, Any] = {
                metric: round(float(np.mean([line["metrics"][metric] for line in chosen])), 4) for metric in metrics
            }
            if name != BASELINE and len(chosen) > 1:
                entry["minus_baseline"] = {metric: difference(chosen, baseline, metric) for metric in metrics}
            entry |= {"runs": len(chosen), "seeds": sorted({line["seed"] for line in chosen})}
            entry["cpu_seconds"] = round(float(np.mean([line["cpu_seconds"] for line in chosen])), 1)
            result.setdefault(bed, {})[name] = entry
    return result


def gain_difference() -> float:
    """Largest change of an embedding number when 12 dB are added to log-mel frames: towers normalise each clip."""
    random = torch.Generator().manual_seed(0)
    changes = []
    for tower in ("cnn", "transformer"):
        model = HTCL.untrained(resolve("demo").with_overrides({"audio.tower": tower}), train_wordpiece(["a b"], 60))
        mel = 12 * torch.randn(8, 80, 128, generator=random) - 40
        changes.append((model.embed_mel(mel) - model.embed_mel(mel + 12)).abs().max().item())
    return max(changes)


def show(result: dict[str, Any]) -> None:
    for bed, recipes in result.items():
        metrics = [name for name in recipes[BASELINE] if name not in ("runs", "seeds", "cpu_seconds")]
        table = Table(bed, *metrics, "runs", "s")
        for name, entry in recipes.items():
            cells = []
            for metric in metrics:
                cell = f"{entry[metric]:.3f}" if metric in entry else "–"
                if metric in entry and "minus_baseline" in entry:
                    given = entry["minus_baseline"][metric]
                    cell += f" {given['mean']:+.3f} [{given['low']:+.3f}, {given['high']:+.3f}]"
                cells.append(cell)
            table.add_row(name, *cells, str(entry["runs"]), str(entry["cpu_seconds"]))
        Console(width=250).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", choices=list(BEDS), default=list(BEDS))
    parser.add_argument("--recipes", nargs="+", help="default: all of a bed")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "training_recipes.jsonl")
    parser.add_argument("--summary", action="store_true", help="write the result from the lines in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {(line["bed"], line["recipe"], line["seed"], line["fold"]) for line in lines}
    work = [
        (bed, name, seed, fold)
        for bed in options.beds
        for seed in options.seeds
        for name in BEDS[bed]
        for fold in (options.folds if bed == "esc10" else [0])
        if not options.recipes or name in options.recipes
    ]
    for bed, name, seed, fold in work if not options.summary else []:
        if (bed, name, seed, fold) in done:
            continue
        recipe, began = BEDS[bed][name], time.process_time()
        metrics = run_esc10(recipe, seed, fold) if bed == "esc10" else run_listeners(recipe, seed)
        spent = round(time.process_time() - began, 1)
        line = {"bed": bed, "recipe": name, "seed": seed, "fold": fold, "metrics": metrics, "cpu_seconds": spent}
        lines.append(line)
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
    result = summary(lines)
    show(result)
    if options.summary:
        beds = {"preset": "demo", "esc10": ESC10, "listeners": LISTENERS, "group": GROUP}
        measured = {"beds": result, "settings": beds, "largest_change_by_gain": gain_difference()}
        print(f"written: {write_result('training_recipes', measured)}")


if __name__ == "__main__":
    main()
