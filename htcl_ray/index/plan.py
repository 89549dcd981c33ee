"""Which structure an index gets, and its numbers, from the settings and the number of songs.

`auto`: flat up to 20,000 songs, hnsw up to 2,000,000, ivf_pq beyond. Measured reasons are in
docs/decisions/0015-index-kinds.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import ConfigError

FLAT_UP_TO = 20_000
GRAPH_UP_TO = 2_000_000
FEWEST = {"flat": 0, "hnsw": 1, "ivf": 1, "ivf_pq": 256}
"""Songs that a kind needs to learn its lists and codes from. With fewer, the index is flat, whatever was asked."""
POINTS_PER_LIST = 39
"""Songs that k-means wants for each centroid (FAISS's own lower bound)."""
RERANK = {"flat": 1.0, "hnsw": 1.0, "ivf": 1.0, "ivf_pq": 8.0}
"""Candidates per result, spare ones apart; one byte a number is nearly exact."""
GROWTH = 2.0
"""A structure made for n songs is kept while there are n / GROWTH to n · GROWTH."""


@dataclass(frozen=True)
class IndexPlan:
    """A structure's kind and numbers. Those of other kinds are there and mean nothing."""

    kind: str
    """`flat`, `hnsw`, `ivf` or `ivf_pq`."""
    songs: int
    """What the numbers were chosen for."""
    rerank: float
    neighbors: int
    ef_construction: int
    ef_search: int
    lists: int
    probes: int
    code_bytes: int

    def fits(self, settings: IndexSettings, songs: int) -> bool:
        """Whether a structure of this plan may hold so many songs without being made anew."""
        return kind_for(settings, songs) == self.kind and self.songs / GROWTH <= songs <= self.songs * GROWTH


def kind_for(settings: IndexSettings, songs: int) -> str:
    """The kind that so many songs get."""
    kind: str = settings.kind
    if kind == "auto":
        kind = "flat" if songs <= FLAT_UP_TO else "hnsw" if songs <= GRAPH_UP_TO else "ivf_pq"
    return kind if songs >= FEWEST[kind] else "flat"


def plan_index(settings: IndexSettings, songs: int, width: int) -> IndexPlan:
    """The structure for `songs` vectors of `width` numbers. Raises ConfigError when `index.pq_bytes` does not divide
    the width.
    """
    kind = kind_for(settings, songs)
    most = max(songs // POINTS_PER_LIST, 1)
    lists = min(settings.ivf_lists or round(4 * math.sqrt(songs)) or 1, most)
    if kind == "ivf_pq" and settings.pq_bytes is not None and width % settings.pq_bytes:
        raise ConfigError(
            f"index.pq_bytes is {settings.pq_bytes}, but the vectors have {width} numbers; expected a divisor of that, or null"
        )
    return IndexPlan(
        kind=kind,
        songs=songs,
        rerank=settings.rerank or RERANK[kind],
        neighbors=settings.hnsw_neighbors,
        ef_construction=settings.ef_construction,
        ef_search=settings.ef_search,
        lists=lists,
        probes=min(settings.ivf_probes or math.ceil(lists / 8), lists),
        code_bytes=settings.pq_bytes or max(size for size in range(1, max(width // 4, 1) + 1) if width % size == 0),
    )
