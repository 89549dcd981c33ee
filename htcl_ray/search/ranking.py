"""Candidates scored again exactly and put in order, so that an answer depends neither on the structure's rounding nor
on the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.segments import IndexState
from htcl_ray.index.vectors import Vectors

TIE_TOLERANCE = 1e-6
"""Scores this close may come from a structure in any order, so they are compared in double precision."""
NUMBERS_AT_ONCE = 4_000_000
"""Of candidates' vectors, in double precision: 32 MB."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result. Scores are cosines in [-1, 1]; `preference_score` is None without stage 2 or without a preference
    query.
    """

    song_id: str
    score: float
    semantic_score: float
    preference_score: float | None


@dataclass(frozen=True)
class Ranked:
    """One query's answer, and whether more candidates could change it."""

    hits: list[Hit]
    open: bool
    """The k-th best scores like the last candidate, so songs of the same score may be missing."""


def rank(state: IndexState, queries: Vectors, candidates: NDArray[np.int64], k: int, blend: float) -> list[Ranked]:
    """The k best of each query's candidates, [q, c] rows of `state` where -1 is none; equal scores in the order of
    their ids.
    """
    at_once = max(NUMBERS_AT_ONCE // max(candidates.shape[1] * state.structure.width, 1), 1)
    ranked: list[Ranked] = []
    for start in range(0, len(queries), at_once):
        chosen = slice(start, start + at_once)
        ranked += _rank(state, queries.rows(chosen), candidates[chosen], k, blend)
    return ranked


def _rank(state: IndexState, queries: Vectors, candidates: NDArray[np.int64], k: int, blend: float) -> list[Ranked]:
    stored = state.vectors(candidates)
    semantic = _cosines(stored[:, :, : queries.dim], queries.semantic)
    preference = None
    scores = semantic
    if queries.preference is not None and stored.shape[2] > queries.dim:
        preference = _cosines(stored[:, :, queries.dim :], queries.preference)
        scores = (1 - blend) * semantic + blend * preference
    there = candidates >= 0
    scores = np.where(there, scores, -np.inf)
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
    taken = order[:, :k]
    shown = [values[query, taken].tolist() for values in (candidates, scores, semantic)]
    shown.append([[None] * taken.shape[1]] * len(taken) if preference is None else preference[query, taken].tolist())
    ranked = []
    for i, (count, rows, *values) in enumerate(zip(there.sum(axis=1).tolist(), *shown, strict=True)):
        hits = [Hit(state.id_of(row), *three) for row, *three in zip(rows[:count], *values, strict=False)]
        ranked.append(Ranked(hits, count > k and bool(best[i, k - 1] - best[i, count - 1] <= TIE_TOLERANCE)))
    return ranked


def _cosines(stored: NDArray[np.float32], queries: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inner products of [q, c, dim] and [q, dim], [q, c], clipped against rounding.

    Summed row by row, so that equal rows score equally wherever they lie and whatever they are batched with.
    """
    products = stored.astype(np.float64)
    products *= queries[:, None, :]
    return np.clip(products.sum(axis=2), -1.0, 1.0)
