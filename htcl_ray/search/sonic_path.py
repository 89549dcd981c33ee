"""A path of songs from one to another through the space that they lie in.

The points of the great arc between the two songs are visited in equal steps, and at each the nearest song that was not
taken is taken. What was taken is then put in order of how much nearer it is to the end than to the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.ranking import Hit

NO_ANGLE = 1e-6
"""Radians below which two directions are one, and within which of π they are opposite."""

Nearest = Callable[[Vectors, set[str]], str | None]
"""The song nearest to one row of vectors that is not one of these; None when there is none."""


def sonic_path(index: SongIndex, start_id: str, end_id: str, count: int, blend: float, nearest: Nearest) -> list[Hit]:
    """At most `count` songs, the start first and the end last, none twice; scores are relative to the start.

    There are fewer when `nearest` finds no more, one when both ends are one song, and never fewer than both ends.
    Raises SongNotFoundError.
    """
    ends = index.vectors_of([start_id, end_id])
    if start_id == end_id:
        return _hits(index, [start_id], ends, blend)
    between: list[str] = []
    points = arc(ends, max(count, 2) - 2)
    for row in range(len(points)):
        found = nearest(points.rows(slice(row, row + 1)), {start_id, end_id, *between})
        if found is None:
            break
        between.append(found)
    to_end = {hit.song_id: hit.score for hit in _hits(index, between, ends.rows(slice(1, 2)), blend)}
    hits = _hits(index, [start_id, *between, end_id], ends, blend)
    return [hits[0], *sorted(hits[1:-1], key=lambda hit: to_end[hit.song_id] - hit.score), hits[-1]]


def arc(ends: Vectors, count: int) -> Vectors:
    """`count` rows of unit norm between the two rows of `ends`, in equal angles, without the ends; each space by
    itself.
    """
    return Vectors(_arc(ends.semantic, count), None if ends.preference is None else _arc(ends.preference, count))


def _arc(ends: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Slerp (Shoemake 1985): sin((1 - t)·θ)/sin θ · first + sin(t·θ)/sin θ · last, [count, dim].

    Opposite directions have no shortest arc; theirs goes by the axis that lies most across them.
    """
    a, b = ends.astype(np.float64)
    shares = (np.arange(1, count + 1) / (count + 1))[:, None]
    angle = 2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b))
    if angle < NO_ANGLE:
        points = (1 - shares) * a + shares * b
    elif np.pi - angle < NO_ANGLE:
        axis = np.zeros_like(a)
        axis[np.abs(a).argmin()] = 1
        across = axis - (axis @ a) * a
        across /= np.linalg.norm(across)
        points = np.cos(shares * np.pi) * a + np.sin(shares * np.pi) * across
    else:
        points = (np.sin((1 - shares) * angle) * a + np.sin(shares * angle) * b) / np.sin(angle)
    return (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float32)


def _hits(index: SongIndex, song_ids: list[str], query: Vectors, blend: float) -> list[Hit]:
    """These songs in this order, with their exact scores relative to the first row of `query`."""
    if not song_ids:
        return []
    vectors = index.vectors_of(song_ids)
    semantic = _cosines(vectors.semantic, query.semantic[0])
    if vectors.preference is None or query.preference is None:
        return [Hit(song_id, cosine, cosine, None) for song_id, cosine in zip(song_ids, semantic, strict=True)]
    preference = _cosines(vectors.preference, query.preference[0])
    return [
        Hit(song_id, (1 - blend) * s + blend * p, s, p)
        for song_id, s, p in zip(song_ids, semantic, preference, strict=True)
    ]


def _cosines(rows: NDArray[np.float32], query: NDArray[np.float32]) -> list[float]:
    return np.clip(rows.astype(np.float64) @ query.astype(np.float64), -1.0, 1.0).tolist()
