"""Search with a maximum number of songs per artist and without duplicate recordings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.ranking import Hit
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.song_columns import NO_GROUP, SongColumns


def diverse_search(
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
    """The k best songs for one query, selected greedily by descending score.

    A song is skipped when one of its artists already has `max_per_artist` songs and, with `collapse`, when a song of
    its duplicate group is selected or excluded.

    After a skip, songs that can no longer be selected are masked and the search is repeated for the remaining places.
    The result equals that of one greedy pass over all songs: k hits are returned if k songs qualify.
    """
    selected: list[Hit] = []
    per_artist: Counter[int] = Counter()
    groups = (
        {int(group) for group in columns.groups[[index.row_of(song_id) for song_id in exclude if song_id in index]]}
        if collapse
        else set()
    )
    groups.discard(NO_GROUP)
    excluded = set(exclude)
    mask = _without(allowed, columns, groups, ()) if groups else allowed
    while True:
        hits = index.search(query, k - len(selected), blend=blend, exclude=[excluded], allowed=mask)[0]
        skipped = False
        for hit in hits:
            row = index.row_of(hit.song_id)
            artists = columns.artists_of(row) if max_per_artist else []
            group = int(columns.groups[row]) if collapse else NO_GROUP
            at_limit = max_per_artist is not None and any(per_artist[artist] >= max_per_artist for artist in artists)
            if at_limit or (group != NO_GROUP and group in groups):
                skipped = True
                continue
            selected.append(hit)
            excluded.add(hit.song_id)
            per_artist.update(artists)
            groups.add(group)
        if not skipped or len(selected) >= k:
            return selected
        groups.discard(NO_GROUP)
        saturated = [artist for artist, count in per_artist.items() if max_per_artist and count >= max_per_artist]
        mask = _without(allowed, columns, groups, saturated)


def _without(
    allowed: NDArray[np.bool_] | None, columns: SongColumns, groups: Collection[int], artists: Collection[int]
) -> NDArray[np.bool_]:
    """The mask `allowed` without songs of these duplicate groups and artists."""
    mask = np.ones(columns.songs.num_rows, dtype=bool) if allowed is None else allowed.copy()
    if groups:
        mask &= ~np.isin(columns.groups, list(groups))
    if artists:
        mask &= ~columns.credits_any(artists)
    return mask
