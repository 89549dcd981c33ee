"""How far the queries of late lie from the songs that they search."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.song_index import SongIndex

SAMPLE = 10_000
"""Songs whose mean stands for the index."""
RECENT = 200
"""Queries after which the weight of an old one has fallen to 1/e."""


def mean_of(index: SongIndex) -> NDArray[np.float64]:
    """Mean semantic vector, [dim], of the index's songs, or of evenly spaced ones when there are many; zeros without
    songs.
    """
    ids = index.songs["song_id"].to_pylist()
    known = [song_id for song_id in ids[:: -(-len(ids) // SAMPLE) or 1] if song_id in index]
    return index.vectors_of(known).semantic.mean(axis=0, dtype=np.float64) if known else np.zeros(index.dim)


class QueryDrift:
    """1 - cosine between the exponentially weighted mean of the queries' semantic vectors and the index's mean.

    Words and recordings lie in different parts of the space, so each kind needs one of its own, and it is the change
    that tells: the level depends on the model.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None

    def add(self, query: NDArray[np.floating], centre: NDArray[np.float64]) -> float:
        """The drift after one more query [dim], in [0, 2]; 0 when a mean has no direction."""
        self._sum = query.astype(np.float64) if self._sum is None else self._sum * np.exp(-1 / RECENT) + query
        lengths = np.linalg.norm(self._sum) * np.linalg.norm(centre)
        return float(1 - self._sum @ centre / lengths) if lengths else 0.0
