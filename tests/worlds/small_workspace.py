"""A workspace with a few short sounds and untrained models of the real kind: enough to embed, index and serve within
seconds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from htcl_ray.audio import log_mel
from htcl_ray.config import Config, resolve
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.schemas import METADATA, features_schema
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace

SONGS = 14
GENRES = ("rock", "jazz", "folk")
TINY = {
    "audio.tower": "transformer",
    "audio.clip_seconds": 2.0,
    "model.conv_channels": 16,
    "model.width": 16,
    "model.layers": 1,
    "model.heads": 2,
    "model.feed_forward": 32,
    "model.position_groups": 4,
    "model.head_hidden": [16],
    "model.dim": 12,
    "text.width": 16,
    "text.layers": 1,
    "text.heads": 2,
    "text.vocab_size": 120,
    "embed.batch_size": 4,
}


def small_config(workspace: Path | str, **overrides: object) -> Config:
    return resolve("demo").with_overrides(
        {**TINY, "workspace": str(workspace), **{k.replace("__", "."): v for k, v in overrides.items()}}
    )


def sound(seed: int, recipe: AudioRecipe, seconds: float | None = None) -> np.ndarray:
    """A chord of three decaying tones over a little noise, of a length that depends on the seed."""
    rng = np.random.default_rng(seed)
    seconds = seconds or float(rng.uniform(0.5, recipe.clip_seconds))
    time = np.arange(round(seconds * recipe.sample_rate)) / recipe.sample_rate
    tones = [np.sin(2 * np.pi * frequency * time) for frequency in rng.uniform(80, 4000, size=3)]
    decay = np.exp(-time * rng.uniform(0.1, 6))
    return (0.2 * sum(tones) * decay + 0.01 * rng.normal(size=len(time))).astype(np.float32)


def wav(waveform: np.ndarray, recipe: AudioRecipe) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, recipe.sample_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def song_id(i: int) -> str:
    return f"song-{i:03d}"


def text_of(i: int) -> str:
    return f"{GENRES[i % 3]} number {i} by artist {i % 5}"


def write_features(config: Config, *, songs: int = SONGS, songs_per_shard: int = 5, version: str = "features-1") -> str:
    recipe, workspace = config.audio, Workspace(config.workspace)
    schema = features_schema(recipe.max_frames, recipe.n_mels)
    for first in range(0, songs, songs_per_shard):
        rows = range(first, min(first + songs_per_shard, songs))
        mels = np.zeros((len(rows), recipe.max_frames, recipe.n_mels), dtype=np.float16)
        valid = []
        for mel, i in zip(mels, rows, strict=True):
            values = log_mel(sound(i, recipe), recipe.sample_rate, recipe)
            mel[:] = values.min()
            mel[: len(values)] = values
            valid.append(len(values))
        columns = {
            "song_id": [song_id(i) for i in rows],
            "text": [text_of(i) for i in rows],
            "features": pa.FixedShapeTensorArray.from_numpy_ndarray(mels),
            "valid_frames": pa.array(valid, pa.int32()),
            "split": ["train"] * len(rows),
            "decoded_share": pa.array([1.0] * len(rows), pa.float32()),
            "duplicate_group": [f"group-{i}" for i in rows],
            "audio_path": [f"/nowhere/{i}.wav" for i in rows],
            **{name: pa.nulls(len(rows), METADATA.field(name).type) for name in METADATA.names},
            "title": [f"number {i}" for i in rows],
            "artist": [f"artist {i % 5}" for i in rows],
            "genre": pa.array([[GENRES[i % 3]] for i in rows]),
            "year": pa.array([1990 + i for i in rows], pa.int32()),
        }
        workspace.write_table(
            f"features/{version}/shard-{first // songs_per_shard:05d}.parquet", pa.table(columns, schema=schema)
        )
    workspace.finish(
        f"features/{version}", build_manifest("features", config=config.model_dump(mode="json"), inputs={})
    )
    return version


def write_models(config: Config, tmp: Path, *, preference: bool = True, seed: int = 0) -> None:
    """Stage 1 as models/semantic/semantic-SEED and, on request, a stage 2 that differs from it, as
    models/preference/preference-SEED."""
    vocabulary = train_wordpiece([text_of(i) for i in range(60)], config.text.vocab_size)
    model = HTCL.untrained(config.with_overrides({"pretrain.seed": seed}), vocabulary)
    _publish(config, model, f"models/semantic/semantic-{seed}", {"features": "features-1"}, tmp)
    if preference:
        other = HTCL.untrained(config.with_overrides({"pretrain.seed": seed + 100}), vocabulary).to_stage_2(
            0.074, seed=1
        )
        inputs = {"features": "features-1", "pairs": "pairs-1", "model": f"semantic-{seed}"}
        _publish(config, other, f"models/preference/preference-{seed}", inputs, tmp)


def _publish(config: Config, model: HTCL, path: str, inputs: dict[str, str], tmp: Path) -> None:
    folder = tmp / path.replace("/", "-")
    model.save_pretrained(folder)
    files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in folder.rglob("*") if file.is_file()}
    manifest = build_manifest(
        "model", config=config.model_dump(mode="json"), inputs=inputs, files=files, weights=weights_fingerprint(folder)
    )
    Workspace(config.workspace).publish(folder, path, manifest)


def write_other_index(config: Config, version: str, **changes: Any) -> None:
    """Random vectors under the models and songs of the built index."""
    workspace = Workspace(config.workspace)
    built = SongIndex.load(workspace.local_copy(f"index/{first_version(config)}"))
    halves = np.random.default_rng(7).normal(size=(2, SONGS, built.dim)).astype(np.float32)
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    ids = [song_id(i) for i in range(SONGS)]
    versions = changes.get("model_versions", built.model_versions)
    other = SongIndex.build(ids, Vectors(*halves), settings=config.index, model_versions=versions)
    folder = Path(config.workspace).parent / f"made-{version}"
    other.save(folder, inputs=built.manifest["inputs"], quality=built.manifest["quality"])
    workspace.publish(folder, f"index/{version}", other.manifest)


def first_version(config: Config) -> str:
    return next(name for name, _ in Workspace(config.workspace).finished("index") if name not in ("other", "strange"))
