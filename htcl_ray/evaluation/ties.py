"""Ranking metrics of scores, as the exact expectation over all orders of tied candidates.

A popularity count or a constant leaves many candidates tied, and any fixed order among them would be luck: the order of the table, for
instance. Here every candidate of a tie is equally likely at each of the tie's positions. Without ties the figures equal those of
`htcl_ray.evaluation.metrics` on the sorted list; all scores equal gives the expectation of a random order.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from htcl_ray.evaluation.metrics import auc, ideal_dcg


def expected_metrics(scores: np.ndarray, relevant: np.ndarray, ks: Iterable[int]) -> dict[str, float]:
    """`hit_rate@k`, `recall@k`, `ndcg@k` for each k, `mrr` and `auc` of one query; all in [0, 1].

    `scores`: float [candidates], higher is better; `relevant`: bool [candidates]. All nan when no candidate is relevant. Raises
    ValueError for scores that are not finite, which no order can be read from.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; expected finite scores of all candidates")
    total = int(relevant.sum())
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]]) if len(ordered) else np.empty(0, dtype=np.int64)
    sizes = np.diff(np.r_[starts, len(ordered)])
    hits = np.add.reduceat(relevant[order].astype(np.int64), starts) if len(starts) else sizes
    probability = np.repeat(hits / np.maximum(sizes, 1), sizes)  # that position i holds a relevant candidate
    gains = probability / np.log2(np.arange(len(ordered)) + 2)
    result = {}
    for k in ks:
        result[f"hit_rate@{k}"] = _hit_probability(starts, sizes, hits, k) if total else np.nan
        result[f"recall@{k}"] = float(probability[:k].sum()) / total if total else np.nan
        result[f"ndcg@{k}"] = float(gains[:k].sum()) / ideal_dcg(total, k) if total else np.nan
    result["mrr"] = _expected_reciprocal_rank(starts, sizes, hits) if total else np.nan
    result["auc"] = float(auc([scores], [relevant])[0])
    return result


def first_hit_distribution(size: int, hits: int) -> np.ndarray:
    """Probability [size] that the first of `hits` relevant candidates among `size` stands at position 1, 2, … of a random order."""
    position = np.arange(size)
    earlier_missed = np.cumprod(np.r_[1.0, np.maximum(size - hits - position[:-1], 0) / (size - position[:-1])])
    return earlier_missed * hits / (size - position)


def _hit_probability(starts: np.ndarray, sizes: np.ndarray, hits: np.ndarray, k: int) -> float:
    first = int(np.flatnonzero(hits)[0])  # the best tie with a relevant candidate decides
    slots = min(k - int(starts[first]), int(sizes[first]))
    return float(min(first_hit_distribution(int(sizes[first]), int(hits[first]))[:slots].sum(), 1.0)) if slots > 0 else 0.0


def _expected_reciprocal_rank(starts: np.ndarray, sizes: np.ndarray, hits: np.ndarray) -> float:
    first = int(np.flatnonzero(hits)[0])
    distribution = first_hit_distribution(int(sizes[first]), int(hits[first]))
    return float((distribution / (starts[first] + 1 + np.arange(len(distribution)))).sum())
