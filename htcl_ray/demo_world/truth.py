"""The true traits of the sample world as vectors: an upper bound for evaluations, which no step of training reads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from htcl_ray.demo_world.listeners import GENRE_WEIGHT, HIDDEN_WEIGHT, LEAD_WEIGHT, MOOD_WEIGHT
from htcl_ray.demo_world.world import GENRES, LEADS, MOODS, World


def true_vectors(world: World) -> np.ndarray:
    """Vectors that a perfect encoder would find: every trait that users have tastes for, in the scale of the tastes.

    float32 [songs, traits], of `World.songs`. Named traits are centred one-hot values.
    """
    parts = [HIDDEN_WEIGHT * world.hidden]
    for weight, field, options in (
        (GENRE_WEIGHT, "genre", GENRES),
        (MOOD_WEIGHT, "mood", MOODS),
        (LEAD_WEIGHT, "lead", LEADS),
    ):
        one_hot = np.eye(len(options))[[options.index(getattr(song, field)) for song in world.songs]]
        parts.append(weight * (one_hot - one_hot.mean(axis=0)))
    return np.hstack(parts).astype(np.float32)


def write_true_vectors(world: World, path: Path) -> None:
    """Write a Parquet table with `song_id` and `vector`, for `evaluate.oracle_vectors`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    vectors = pa.array(true_vectors(world).tolist(), pa.list_(pa.float32()))
    pq.write_table(pa.table({"song_id": [song.song_id for song in world.songs], "vector": vectors}), path)
