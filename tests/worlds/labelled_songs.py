"""A catalogue with labels and vectors that are known to hold them, or not."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs, with_blend
from htcl_ray.schemas import METADATA

GENRES = ("rock", "jazz", "folk")


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def songs_of(
    splits: Sequence[str],
    artists: Sequence[str | None],
    vectors: np.ndarray,
    texts: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    preference: np.ndarray | None = None,
    **columns: Sequence[object],
) -> EvaluatedSongs:
    """Songs s0000, s0001, …; `columns` of metadata by name, `vectors` the semantic space; the log-mel statistics are
    noise."""
    count = len(splits)
    given = {"artist": artists, **columns}
    metadata = {field.name: pa.array(given.get(field.name, [None] * count), field.type) for field in METADATA}
    spaces = (
        {"semantic": unit(vectors)}
        if preference is None
        else {"semantic": unit(vectors), "preference": unit(preference)}
    )
    return EvaluatedSongs(
        [f"s{i:04d}" for i in range(count)],
        list(texts or (f"text {i}" for i in range(count))),
        np.array(splits),
        list(groups or (f"recording {i}" for i in range(count))),
        pa.table(metadata),
        with_blend(spaces),
        unit(np.random.default_rng(99).normal(size=(count, 8))),
    )


def labelled_world(
    seed: int = 0, count: int = 300, signal: float = 4.0
) -> tuple[EvaluatedSongs, dict[str, np.ndarray]]:
    """Songs by 30 artists whose vectors hold their genre and tags as strongly as `signal`, and the direction of each
    label.

    The mood is in no vector. The first 20 artists are in training.
    """
    generator = np.random.default_rng(seed)
    artist = generator.integers(0, 30, count)
    genre, mood = generator.integers(0, 3, count), generator.integers(0, 2, count)
    tagged = generator.random((count, 4)) < 0.35
    directions = np.linalg.qr(generator.normal(size=(16, 16)))[0]
    vectors = generator.normal(size=(count, 16)) + signal * (directions[genre] + tagged @ directions[3:7])
    songs = songs_of(
        ["train" if a < 20 else "test" for a in artist],
        [f"artist {a}" for a in artist],
        vectors,
        texts=[f"{GENRES[g]} {i}" for i, g in enumerate(genre)],
        preference=vectors + generator.normal(size=vectors.shape),
        genre=[[GENRES[g]] for g in genre],
        mood=[["glad" if m else "sad"] for m in mood],
        tags=[[f"tag {j}" for j in np.flatnonzero(row)] for row in tagged],
    )
    words = {**dict(zip(GENRES, directions, strict=False)), **{f"tag {j}": directions[3 + j] for j in range(4)}}
    return songs, words
