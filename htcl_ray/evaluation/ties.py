"""Ranking metrics of scores, as the exact expectation over all orders of tied candidates.

A popularity count or a constant leaves many candidates tied, and any fixed order among them would be luck: the order of the table, for
instance. Here every candidate of a tie is equally likely at each of the tie's positions. Without ties the figures equal those of
`htcl_ray.evaluation.metrics` on the sorted list; all scores equal gives the expectation of a random order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from htcl_ray.evaluation.metrics import ideal_dcg


def expected_metrics(scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`hit_rate@k`, `recall@k`, `ndcg@k` for each k, `mrr` and `auc` of one query; all in [0, 1].

    `scores`: float [candidates], higher is better; `relevant`: bool [candidates]. All nan when no candidate is relevant. Raises
    ValueError for scores that are not finite, which no order can be read from.
    """
    if not np.isfinite(scores).all():
        raise ValueError("a score is not finite; expected finite scores of all candidates")
    total = int(relevant.sum())
    names = [f"{figure}@{k}" for k in ks for figure in ("hit_rate", "recall", "ndcg")]
    if not total:
        return dict.fromkeys([*names, "mrr", "auc"], float("nan"))
    # Only ties that hold a relevant candidate matter: one sort finds where each begins and how large it is.
    rising = np.sort(scores)
    values, hits = np.unique(scores[relevant], return_counts=True)
    values, hits = values[::-1], hits[::-1]
    starts = len(rising) - np.searchsorted(rising, values, side="right")
    sizes = len(rising) - np.searchsorted(rising, values, side="left") - starts
    discounted = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(int(max(ks, default=1))) + 2))]
    result = {}
    for k in ks:
        result[f"hit_rate@{k}"] = _hit_probability(int(starts[0]), int(sizes[0]), int(hits[0]), k)
        result[f"recall@{k}"] = float((hits * np.clip(k - starts, 0, sizes) / sizes).sum()) / total
        inside = discounted[np.clip(starts + sizes, 0, k)] - discounted[np.clip(starts, 0, k)]
        result[f"ndcg@{k}"] = float((hits / sizes * inside).sum()) / ideal_dcg(total, k)
    result["mrr"] = _expected_reciprocal_rank(int(starts[0]), int(sizes[0]), int(hits[0]))
    others = len(scores) - total
    below = len(scores) - starts - sizes - (total - np.cumsum(hits))
    result["auc"] = float((hits * (below + (sizes - hits) / 2)).sum() / (total * others)) if others else float("nan")
    return result


def first_hit_distribution(size: int, hits: int) -> np.ndarray:
    """Probability [size] that the first of `hits` relevant candidates among `size` stands at position 1, 2, … of a random order."""
    position = np.arange(size)
    earlier_missed = np.cumprod(np.r_[1.0, np.maximum(size - hits - position[:-1], 0) / (size - position[:-1])])
    return earlier_missed * hits / (size - position)


def _hit_probability(start: int, size: int, hits: int, k: int) -> float:
    """That a relevant candidate of the best tie with one is among the first k."""
    slots = min(k - start, size)
    return float(min(first_hit_distribution(size, hits)[:slots].sum(), 1.0)) if slots > 0 else 0.0


def _expected_reciprocal_rank(start: int, size: int, hits: int) -> float:
    distribution = first_hit_distribution(size, hits)
    return float((distribution / (start + 1 + np.arange(size))).sum())
