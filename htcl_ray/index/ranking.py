"""Exact re-ranking of candidates, so that results depend neither on an engine's rounding nor on the batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.segments import IndexState
from htcl_ray.index.vectors import Vectors

TIE_TOLERANCE = 1e-6
"""An engine may return songs whose scores differ by less than this in any order; double precision decides."""
CHUNK_NUMBERS = 4_000_000
"""Numbers of the candidates' vectors that are held in double precision at a time: 32 MB."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search.

    Scores are cosines in [-1, 1]. `preference_score` is None without stage 2 or without a preference query.
    """

    song_id: str
    score: float
    semantic_score: float
    preference_score: float | None


@dataclass(frozen=True)
class RankedHits:
    """Hits of one query, and whether more candidates could change them."""

    hits: list[Hit]
    tied: bool
    """The k-th hit and the last candidate have the same score, so songs with that score may be missing."""


def rank(state: IndexState, queries: Vectors, candidates: NDArray[np.int64], k: int, blend: float) -> list[RankedHits]:
    """The k best candidates of each query, best first; equal scores are sorted by song id.

    `candidates`: rows of `state`, [q, c], in which -1 is no row.
    """
    chunk = max(CHUNK_NUMBERS // max(candidates.shape[1] * state.structure.width, 1), 1)
    ranked: list[RankedHits] = []
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        ranked += _rank(state, queries.rows(rows), candidates[rows], k, blend)
    return ranked


def _rank(state: IndexState, queries: Vectors, candidates: NDArray[np.int64], k: int, blend: float) -> list[RankedHits]:
    stored = state.vectors(candidates)
    semantic = cosines(stored[:, :, : queries.dim], queries.semantic)
    preference = None
    scores = semantic
    if queries.preference is not None and stored.shape[2] > queries.dim:
        preference = cosines(stored[:, :, queries.dim :], queries.preference)
        scores = (1 - blend) * semantic + blend * preference
    valid = candidates >= 0
    scores = np.where(valid, scores, -np.inf)
    query = np.arange(len(queries))[:, None]
    order = np.argsort(-scores, axis=1)
    best = scores[query, order]
    equal = (best[:, 1:] == best[:, :-1]) & (best[:, 1:] > -np.inf)
    for i in equal.any(axis=1).nonzero()[0].tolist():
        by_id = [
            (-score, state.id_of(row), at)
            for at, (score, row) in enumerate(zip(scores[i], candidates[i].tolist(), strict=True))
        ]
        order[i] = [at for _, _, at in sorted(by_id)]
    top = order[:, :k]
    columns = [values[query, top].tolist() for values in (candidates, scores, semantic)]
    columns.append([[None] * top.shape[1]] * len(top) if preference is None else preference[query, top].tolist())
    ranked = []
    for i, (count, rows, *values) in enumerate(zip(valid.sum(axis=1).tolist(), *columns, strict=True)):
        hits = [Hit(state.id_of(row), *scored) for row, *scored in zip(rows[:count], *values, strict=False)]
        ranked.append(RankedHits(hits, count > k and bool(best[i, k - 1] - best[i, count - 1] <= TIE_TOLERANCE)))
    return ranked


def cosines(stored: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inner products of unit-norm rows [q, c, dim] and [q, dim], [q, c], clipped to [-1, 1].

    Each row is summed by itself in double precision, so that equal rows get equal scores in every batch.
    """
    products = stored.astype(np.float64)
    products *= queries[:, None, :]
    return np.asarray(np.clip(products.sum(axis=2), -1.0, 1.0))
