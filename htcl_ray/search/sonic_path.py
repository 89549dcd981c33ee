"""A path of songs between two songs through the embedding space.

Points at equal angles on the great-circle arc between the two songs are visited in order, and at each the nearest song
that is not on the path yet is selected. The selected songs are then sorted by their score to the end minus their score
to the start.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.ranking import Hit, cosines
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors, unit_norm

NO_ANGLE = 1e-6
"""Tolerance in radians: directions closer than this are equal, and within this of π they are opposite."""

Nearest = Callable[[Vectors, set[str]], str | None]
"""Nearest song to one row of vectors, without the songs of the set; None when no song is left."""


def sonic_path(index: SongIndex, start_id: str, end_id: str, count: int, blend: float, nearest: Nearest) -> list[Hit]:
    """At most `count` distinct songs from the start to the end; scores are relative to the start.

    Both ends are always returned, so one song when they are equal. The path is shorter than `count` when `nearest`
    returns None. Raises SongNotFoundError.
    """
    ends = index.vectors_of([start_id, end_id])
    if start_id == end_id:
        return _hits(index, [start_id], ends, blend)
    between: list[str] = []
    points = arc(ends, max(count, 2) - 2)
    for row in range(len(points)):
        song_id = nearest(points.rows(slice(row, row + 1)), {start_id, end_id, *between})
        if song_id is None:
            break
        between.append(song_id)
    to_end = {hit.song_id: hit.score for hit in _hits(index, between, ends.rows(slice(1, 2)), blend)}
    hits = _hits(index, [start_id, *between, end_id], ends, blend)
    return [hits[0], *sorted(hits[1:-1], key=lambda hit: to_end[hit.song_id] - hit.score), hits[-1]]


def arc(ends: Vectors, count: int) -> Vectors:
    """`count` unit-norm rows at equal angles between the two rows of `ends`, without the ends, in each space."""
    return Vectors(_arc(ends.semantic, count), None if ends.preference is None else _arc(ends.preference, count))


def _arc(ends: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """Spherical linear interpolation (Shoemake 1985), [count, dim].

    A point at share t is sin((1 - t)·θ)/sin θ · first + sin(t·θ)/sin θ · last. Opposite directions have no unique arc;
    it then passes through the axis that is most orthogonal to them.
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
    return unit_norm(points)


def _hits(index: SongIndex, song_ids: list[str], query: Vectors, blend: float) -> list[Hit]:
    """The songs in the given order, with their exact scores relative to the first row of `query`."""
    if not song_ids:
        return []
    vectors = index.vectors_of(song_ids)
    semantic = cosines(vectors.semantic[None], query.semantic[:1])[0].tolist()
    if vectors.preference is None or query.preference is None:
        return [Hit(song_id, cosine, cosine, None) for song_id, cosine in zip(song_ids, semantic, strict=True)]
    preference = cosines(vectors.preference[None], query.preference[:1])[0].tolist()
    return [
        Hit(song_id, (1 - blend) * s + blend * p, s, p)
        for song_id, s, p in zip(song_ids, semantic, preference, strict=True)
    ]
