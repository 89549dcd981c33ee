"""The best songs of which no artist has too many and no recording is there twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.ranking import Hit
from htcl_ray.search.song_columns import NOBODY, SongColumns


def varied_search(
    index: SongIndex,
    columns: SongColumns,
    query: Vectors,
    k: int,
    *,
    blend: float,
    exclude: Collection[str],
    allowed: NDArray[np.bool_] | None,
    max_per_artist: int | None,
    collapse: bool,
) -> list[Hit]:
    """The k best songs for one query, taken greedily in the order of their scores.

    A song is passed over when one of its artists has `max_per_artist` songs already, and, with `collapse`, when a song
    of its duplicate group is taken or excluded.

    Passing over needs more candidates than k. What can no longer be taken is masked and the search repeated for the
    rest, so that k songs come back while there are that many, and the order is that of one pass over all songs.
    """
    taken: list[Hit] = []
    per_artist: Counter[int] = Counter()
    groups = (
        {int(group) for group in columns.groups[[index.row_of(song_id) for song_id in exclude if song_id in index]]}
        if collapse
        else set()
    )
    groups.discard(NOBODY)
    excluded = set(exclude)
    mask = _without(allowed, columns, groups, ()) if groups else allowed
    while True:
        hits = index.search(query, k - len(taken), blend=blend, exclude=[excluded], allowed=mask)[0]
        passed_over = False
        for hit in hits:
            row = index.row_of(hit.song_id)
            artists, group = (
                columns.artists_of(row) if max_per_artist else [],
                int(columns.groups[row]) if collapse else NOBODY,
            )
            full = max_per_artist is not None and any(per_artist[artist] >= max_per_artist for artist in artists)
            if full or (group != NOBODY and group in groups):
                passed_over = True
                continue
            taken.append(hit)
            excluded.add(hit.song_id)
            per_artist.update(artists)
            groups.add(group)
        if not passed_over or len(taken) >= k:
            return taken
        groups.discard(NOBODY)
        saturated = [artist for artist, count in per_artist.items() if max_per_artist and count >= max_per_artist]
        mask = _without(allowed, columns, groups, saturated)


def _without(
    allowed: NDArray[np.bool_] | None, columns: SongColumns, groups: Collection[int], artists: Collection[int]
) -> NDArray[np.bool_]:
    mask = np.ones(columns.songs.num_rows, dtype=bool) if allowed is None else allowed.copy()
    if groups:
        mask &= ~np.isin(columns.groups, list(groups))
    if artists:
        mask &= ~columns.credits_any(artists)
    return mask
