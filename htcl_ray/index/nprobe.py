"""A new structure, its number of probed lists found by trying: how many a query must read depends on how the songs
cluster.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.index.engines.faiss_structures import Structure, best_rows
from htcl_ray.index.plan import plan_index

TRIED_SONGS = 128
TRIED_AT = 10
STEP = 1.3
"""Each number of lists that is tried is so many times the one before."""
BLENDS = (0.0, 0.5, 1.0)


def make_structure(vectors: NDArray[np.float32], dim: int, settings: IndexSettings, songs: int) -> Structure:
    """A structure over [n, width] with the kind and numbers for `songs` songs; `dim` is the width of one half.

    Unless `index.ivf_probes` is given, an ivf kind probes the fewest lists that reach halfway from `index.min_recall`
    to 1 for songs of its own, at both ends and in the middle of the blend. (Songs that it has not seen are kept for
    measuring, see recall.py.)
    """
    structure = Structure.make(plan_index(settings, songs, vectors.shape[1]), vectors)
    if structure.plan.kind not in ("ivf", "ivf_pq") or settings.ivf_probes is not None:
        return structure
    rows = np.sort(np.random.default_rng(0).permutation(len(vectors))[:TRIED_SONGS])
    queries = _blended(vectors[rows], dim)
    wanted = min(TRIED_AT + 1, len(vectors))  # a song's nearest is mostly itself
    truth = best_rows(vectors, queries, wanted)
    probes = 1
    while probes < structure.plan.lists:
        found = structure.planned(replace(structure.plan, probes=probes)).nearest(queries, wanted)
        if _share_found(truth, found) >= (1 + settings.min_recall) / 2:
            break
        probes = math.ceil(probes * STEP)
    return structure.planned(replace(structure.plan, probes=min(probes, structure.plan.lists)))


def _blended(rows: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """The rows as queries at each blend, one blend below the other."""
    if rows.shape[1] == dim:
        return rows
    weights = np.repeat(np.array([(1 - blend, blend) for blend in BLENDS], dtype=np.float32), dim, axis=1)
    return np.concatenate([rows * weight for weight in weights])


def _share_found(truth: NDArray[np.int64], found: NDArray[np.int64]) -> float:
    return float(np.mean([np.isin(rows, candidates).mean() for rows, candidates in zip(truth, found, strict=True)]))
