"""Ranking metrics on lists of ids, and AUC on scores.

Common to all: `ranked` holds one list of ids a query, best first (list, tuple or 1-D array; it may be a part of the
candidates); `relevant` holds one collection of ids a query. Relevance is binary. The result is a float64 array
[queries]; a query without a relevant id is nan, so that `numpy.nanmean` averages over the queries that can be answered.
An id that is listed twice counts where it appears first. Where candidates have tied scores, the order of a list is
arbitrary: `htcl_ray.evaluation.stats.ties` has the expectations instead.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import Any

import numpy as np

Ids = Iterable[Hashable]


def recall_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """Share of the relevant ids that are among the first k, in [0, 1]."""
    _check_k(k)
    return np.array(
        [hits[:k].sum() / total if total else np.nan for hits, total in _hits(ranked, relevant)], dtype=np.float64
    )


def hit_rate_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """1 when any relevant id is among the first k, else 0."""
    _check_k(k)
    return np.array(
        [float(hits[:k].any()) if total else np.nan for hits, total in _hits(ranked, relevant)], dtype=np.float64
    )


def ndcg_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """Normalised discounted cumulative gain in [0, 1]: DCG@k = Σ relevant(i) / log2(i + 1) over positions i = 1 … k.

    Divided by the DCG@k of the best possible list, which begins with min(k, number of relevant ids) relevant ones.
    """
    _check_k(k)
    return np.array(
        [_dcg(hits[:k]) / ideal_dcg(total, k) if total else np.nan for hits, total in _hits(ranked, relevant)],
        dtype=np.float64,
    )


def first_rank(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> np.ndarray:
    """Position, from 1, of the first relevant id; inf when none is listed."""
    ranks = [
        np.nan if not total else (float(hits.argmax()) + 1 if hits.any() else np.inf)
        for hits, total in _hits(ranked, relevant)
    ]
    return np.array(ranks, dtype=np.float64)


def mrr(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> np.ndarray:
    """Reciprocal rank of the first relevant id, in [0, 1]; 0 when none is listed. Its mean over queries is the MRR."""
    return 1.0 / first_rank(ranked, relevant)


def median_rank(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> float:
    """Median over queries of `first_rank`, queries without a relevant id left out; nan when no query remains."""
    ranks = first_rank(ranked, relevant)
    ranks = ranks[~np.isnan(ranks)]
    return float(np.median(ranks)) if len(ranks) else float("nan")


def auc(scores: Sequence[Any], relevant: Sequence[Any]) -> np.ndarray:
    """Probability that a relevant candidate scores above another one, a tie counting half, in [0, 1]; 0.5 is chance.

    `scores`: one float array [candidates] a query, or a matrix; `relevant`: bool of the same shape. nan when all
    candidates are relevant, or none.
    """
    _check_queries(scores, relevant)
    return np.array(
        [_auc(np.asarray(s), np.asarray(r, dtype=bool)) for s, r in zip(scores, relevant, strict=True)],
        dtype=np.float64,
    )


def ideal_dcg(total: int, k: int) -> float:
    """DCG@k of the best list for a query with `total` relevant ids."""
    return float((1.0 / np.log2(np.arange(min(total, k)) + 2)).sum())


def _auc(scores: np.ndarray, relevant: np.ndarray) -> float:
    if scores.shape != relevant.shape:
        raise ValueError(f"scores have shape {scores.shape} and relevant {relevant.shape}; expected the same")
    positives = int(relevant.sum())
    negatives = len(relevant) - positives
    if not positives or not negatives:
        return float("nan")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # from 1, tied scores share their mean
    return float((mean_rank[value][relevant].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _dcg(hits: np.ndarray) -> float:
    return float((hits / np.log2(np.arange(len(hits)) + 2)).sum())


def _hits(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> list[tuple[np.ndarray, int]]:
    """A query's list as bool [length] (relevant, first appearance), and the number of its relevant ids."""
    _check_queries(ranked, relevant)
    result = []
    for row, ids in zip(ranked, relevant, strict=True):
        wanted, seen, hits = set(ids), set(), []
        for item in row:
            hits.append(item in wanted and item not in seen)
            seen.add(item)
        result.append((np.array(hits, dtype=bool), len(wanted)))
    return result


def _check_queries(first: Sequence[Any], relevant: Sequence[Any]) -> None:
    if len(first) != len(relevant):
        raise ValueError(
            f"there are {len(first)} rankings and {len(relevant)} relevant sets; expected one of each for every query"
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")
