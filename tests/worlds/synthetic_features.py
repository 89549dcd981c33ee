"""Feature shards with known truth, made without audio: each genre is loud in its own mel bands, and its name is the
text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from htcl_ray import schemas
from htcl_ray.config import Config, resolve
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

GENRES = ("jazz", "techno", "folk", "metal", "choir", "dub")


def tiny_config(workspace: Path | str, **overrides: object) -> Config:
    """The demo preset with a model that trains in seconds."""
    tiny = resolve("demo").with_overrides(
        {
            "workspace": str(workspace),
            "audio.clip_seconds": 3.0,
            "audio.n_mels": 16,
            "audio.tower": "transformer",
            "text.width": 32,
            "text.layers": 1,
            "text.vocab_size": 100,
            "text.max_tokens": 12,
            "model.conv_channels": 16,
            "model.width": 32,
            "model.layers": 1,
            "model.heads": 2,
            "model.feed_forward": 32,
            "model.head_hidden": [24],
            "model.dim": 16,
            "pretrain.batch_size": 16,
            "pretrain.epochs": 3,
            "finetune.batch_size": 16,
            "finetune.epochs": 2,
            "finetune.pairs_per_epoch": 64,
        }
    )
    return tiny.with_overrides(overrides)


def write_features(config: Config, songs: int = 60, *, version: str = "synthetic", seed: int = 0) -> str:
    """Features in the configuration's workspace; returns their path. Song i has genre i mod 6; about 3 in 5 songs are
    for training."""
    workspace = Workspace(config.workspace)
    frames, mels = config.audio.max_frames, config.audio.n_mels
    random = np.random.default_rng(seed)
    schema = schemas.features_schema(frames, mels)
    splits = np.array(["train", "train", "train", "validation", "test"])
    rows = []
    for song in range(songs):
        genre = song % len(GENRES)
        mel = random.normal(-60, 4, (frames, mels))
        mel[:, genre * 2 : genre * 2 + 3] += 40
        rows.append(
            (
                f"song-{song:04d}",
                genre,
                mel.astype(np.float16),
                int(random.integers(9, frames + 1)),
                splits[(song // 6) % 5],
            )
        )
    path = f"features/{version}"
    for shard in range(0, songs, 32):
        part = rows[shard : shard + 32]
        columns: dict[str, object] = {
            "song_id": [row[0] for row in part],
            "text": [f"{GENRES[row[1]]} song number {index + shard}" for index, row in enumerate(part)],
            "features": pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([row[2] for row in part])),
            "valid_frames": [row[3] for row in part],
            "split": [row[4] for row in part],
            "decoded_share": [1.0] * len(part),
            "duplicate_group": [f"group-{row[0]}" for row in part],
            "audio_path": [f"/audio/{row[0]}.wav" for row in part],
        }
        arrays = [
            column if isinstance(column, pa.Array) else pa.array(column, field.type)
            for field in schema
            for column in [columns.get(field.name, [None] * len(part))]
        ]
        workspace.write_table(f"{path}/shard-{shard // 32:05d}.parquet", pa.Table.from_arrays(arrays, schema=schema))
    workspace.finish(path, build_manifest("features", config=config.model_dump(mode="json"), inputs={}))
    return path


def write_pairs(
    config: Config, songs: int = 60, *, features_version: str = "synthetic", version: str = "pairs", extra: int = 0
) -> str:
    """Pairs of training songs whose genres differ by three, so that taste is not genre; `extra` of them name unknown
    songs."""
    workspace = Workspace(config.workspace)
    rows = [
        (f"song-{a:04d}", f"song-{b:04d}", split)
        for a in range(songs)
        for b in range(songs)
        for split in [{0: "train", 1: "train", 2: "train", 3: "validation"}.get((a // 6) % 5)]
        if a != b
        and split
        and (b % 6) == (a % 6 + 3) % 6
        and {0: "train", 1: "train", 2: "train", 3: "validation"}.get((b // 6) % 5) == split
    ]
    rows += [(f"unknown-{index}", "song-0000", "train") for index in range(extra)]
    table = pa.table(
        {
            "trigger_song_id": [row[0] for row in rows],
            "song_id": [row[1] for row in rows],
            "weight": [1.0] * len(rows),
            "support": [1] * len(rows),
            "first_timestamp": pa.nulls(len(rows), pa.float64()),
            "last_timestamp": pa.nulls(len(rows), pa.float64()),
            "split": [row[2] for row in rows],
        }
    ).cast(schemas.PAIRS)
    path = f"pairs/{version}"
    workspace.write_table(f"{path}/part-00000.parquet", table)
    inputs = {"features": features_version}
    workspace.finish(path, build_manifest("pairs", config=config.model_dump(mode="json"), inputs=inputs))
    return path


def write_negatives(config: Config, rows: list[tuple[int, int, float]], *, version: str = "pairs") -> None:
    """Rejected training songs (trigger, song, weight), mined with pairs of that version."""
    workspace = Workspace(config.workspace)
    named = [
        {
            "trigger_song_id": f"song-{a:04d}",
            "song_id": f"song-{b:04d}",
            "weight": weight,
            "support": 1,
            "split": "train",
        }
        for a, b, weight in rows
    ]
    workspace.write_table(f"negatives/{version}/part-00000.parquet", pa.Table.from_pylist(named, schema=schemas.PAIRS))
    workspace.finish(
        f"negatives/{version}", build_manifest("negatives", config=config.model_dump(mode="json"), inputs={})
    )
