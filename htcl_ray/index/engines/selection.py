"""Kind and parameters of an index, from the settings and the number of songs.

`auto` is flat up to 20,000 songs, hnsw up to 2,000,000, and ivf_pq above. docs/decisions/0015-index-kinds.md has the
measurements behind these limits.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.index.engines.base import KINDS, IndexPlan, Structure

FLAT_UP_TO = 20_000
GRAPH_UP_TO = 2_000_000
POINTS_PER_LIST = 39
"""Songs that k-means needs for each centroid (the lower bound of FAISS)."""
GROWTH = 2.0
"""Factor by which the number of songs may grow or shrink before a structure is rebuilt."""


def kind_for(settings: IndexSettings, songs: int) -> str:
    """The kind of an index over this many songs."""
    kind: str = settings.kind
    if kind == "auto":
        kind = "flat" if songs <= FLAT_UP_TO else "hnsw" if songs <= GRAPH_UP_TO else "ivf_pq"
    return kind if songs >= KINDS[kind].min_songs else "flat"


def plan_index(settings: IndexSettings, songs: int, width: int) -> IndexPlan:
    """The plan for `songs` vectors of `width` numbers. Raises ConfigError for settings that do not fit the width."""
    kind = kind_for(settings, songs)
    KINDS[kind].check(settings, width)
    most = max(songs // POINTS_PER_LIST, 1)
    lists = min(settings.ivf_lists or round(4 * math.sqrt(songs)) or 1, most)
    return IndexPlan(
        kind=kind,
        songs=songs,
        rerank=settings.rerank or KINDS[kind].default_rerank,
        neighbors=settings.hnsw_neighbors,
        ef_construction=settings.ef_construction,
        ef_search=settings.ef_search,
        lists=lists,
        probes=min(settings.ivf_probes or math.ceil(lists / 8), lists),
        code_bytes=settings.pq_bytes or max(size for size in range(1, max(width // 4, 1) + 1) if width % size == 0),
    )


def fits(plan: IndexPlan, settings: IndexSettings, songs: int) -> bool:
    """Whether a structure of this plan may hold this many songs without being rebuilt."""
    return kind_for(settings, songs) == plan.kind and plan.songs / GROWTH <= songs <= plan.songs * GROWTH


def make_structure(vectors: NDArray[np.float32], dim: int, settings: IndexSettings, songs: int) -> Structure:
    """Build a structure over [n, width] with the kind and parameters for `songs` songs.

    `dim`: width of one half of a vector.
    """
    plan = plan_index(settings, songs, vectors.shape[1])
    return KINDS[plan.kind].make(plan, vectors).tuned(dim, settings)


def read_structure(folder: Path, plan: IndexPlan, width: int, songs: int) -> Structure:
    """Map the structure of an index folder; see `Structure.read`."""
    return KINDS[plan.kind].read(folder, plan, width, songs)
