"""A catalogue of made-up vectors for the evaluation's tests: a direction for each genre, and noise."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs, with_blend
from htcl_ray.schemas import METADATA

GENRES = ("rock", "jazz", "folk", "ambient")
TAGS = ("loud", "soft", "live", "studio")
DIM = 8


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def metadata(songs: int, **columns: list) -> pa.Table:
    complete = {name: columns.get(name, [None] * songs) for name in METADATA.names}
    return pa.table(
        {name: pa.array(values, METADATA.field(name).type) for name, values in complete.items()}, schema=METADATA
    )


def made_up(songs: int = 240, noise: float = 0.3, preference: bool = False, seed: int = 0) -> EvaluatedSongs:
    """Half of the songs train, half test; twelve artists on each side; text names the genre and, in part, the song."""
    generator = np.random.default_rng(seed)
    genre = generator.integers(0, len(GENRES), songs)
    split = np.array([("train", "test")[i % 2] for i in range(songs)])
    tags = [sorted({TAGS[g], TAGS[generator.integers(0, 4)]}) for g in genre]
    spaces = {"semantic": unit(np.eye(DIM)[genre] + noise * generator.normal(size=(songs, DIM)))}
    if preference:
        spaces["preference"] = unit(np.eye(DIM)[genre] + noise * generator.normal(size=(songs, DIM)))
    return EvaluatedSongs(
        [f"s{i:04}" for i in range(songs)],
        [f"{GENRES[g]} {i // 16}" for i, g in enumerate(genre)],
        split,
        [f"group {i}" for i in range(songs)],
        metadata(
            songs,
            artist=[f"{split[i]} artist {(i // 2) % 12}" for i in range(songs)],
            genre=[[GENRES[g]] for g in genre],
            tags=tags,
        ),
        with_blend(spaces),
        unit(generator.normal(size=(songs, 6))),
    )


def encode_genre(texts: list[str]) -> dict[str, np.ndarray]:
    """Texts whose first word is a genre or a tag, to its direction; `semantic` alone."""
    return {"semantic": np.eye(DIM, dtype=np.float32)[[(*GENRES, *TAGS).index(text.split()[0]) for text in texts]]}
