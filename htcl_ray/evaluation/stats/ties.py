"""Ranking metrics of scores, as the exact expectation over all orders of tied candidates.

A popularity count or a constant leaves many candidates tied, and any fixed order among them would be luck: the order of
the table, for instance. Here every candidate of a tie is equally likely at each of the tie's positions. Without ties
the figures equal those of `htcl_ray.evaluation.metrics` on the sorted list; all scores equal gives the expectation of a
random order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Placed:
    """Where the relevant candidates stand: one entry for each, in order of query."""

    query: np.ndarray
    """int: which query it belongs to."""
    item: np.ndarray
    """int: which candidate it is."""
    start: np.ndarray
    """int: how many of the query's candidates score higher."""
    size: np.ndarray
    """int: how many score the same, itself included."""
    total: np.ndarray
    """int [queries]: relevant candidates."""
    candidates: np.ndarray
    """int [queries]."""


def expected_metrics(
    scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int], candidate: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The metrics of `credited_metrics`, float64 [queries] each."""
    return {name: metric.values for name, metric in credited_metrics(scores, relevant, ks, candidate).items()}


class Credited(NamedTuple):
    """A metric of each query, and what each item has to do with it."""

    values: np.ndarray
    """float64 [queries]."""
    gain: np.ndarray
    """float64 [items]: the item's parts of the values, summed over queries."""
    mass: np.ndarray
    """float64 [items]: sum of 1 / relevant candidates, over the queries with a value to which the item is relevant."""


def credited_metrics(
    scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int], candidate: np.ndarray | None = None
) -> dict[str, Credited]:
    """`hit_rate@k`, `recall@k`, `ndcg@k` for each k, `mrr` and `auc`; in [0, 1].

    A value is divided among the query's relevant candidates: recall, NDCG and AUC are sums over them; hit rate and MRR,
    which are not, are divided in proportion to a candidate's own recall@k or reciprocal of its mean rank.

    `scores`: float [queries, items], higher is better; `relevant`: bool of the same shape; `candidate`: bool of the
    same shape, items that are ranked for a query, None is all. All nan where no candidate is relevant; `auc` is nan too
    where all are. Raises ValueError for scores of candidates that are not finite, which no order can be read from.
    """
    placed = _place(scores, relevant, np.ones(scores.shape, dtype=bool) if candidate is None else candidate)
    total = placed.total
    asked = total > 0
    gained = np.r_[
        0.0, np.cumsum(1 / np.log2(np.arange(max(ks, default=1)) + 2))
    ]  # the DCG of so many relevant candidates in front
    start, size, hits = _best_ties(placed)

    items, query = scores.shape[1], placed.query

    def credited(values: np.ndarray, of_target: np.ndarray) -> Credited:
        part = np.bincount(query, weights=of_target, minlength=len(total))[query]
        given = np.divide(of_target * values[query], part, out=np.zeros(len(part)), where=part > 0)
        known = ~np.isnan(values[query])
        given, mass = (
            np.bincount(placed.item[known], weights=of[known], minlength=items) for of in (given, 1 / total[query])
        )
        return Credited(values, given, mass)

    def summed(of_target: np.ndarray, by: np.ndarray) -> Credited:
        sums = np.bincount(query, weights=of_target, minlength=len(total))
        return credited(np.divide(sums, by, out=np.full(len(total), np.nan), where=asked), of_target)

    result = {}
    for k in ks:
        inside = np.clip(k - placed.start, 0, placed.size)
        gain = gained[np.minimum(placed.start + inside, k)] - gained[np.minimum(placed.start, k)]
        result[f"hit_rate@{k}"] = credited(
            np.where(asked, _hit_probability(start, size, hits, k), np.nan), inside / placed.size
        )
        result[f"recall@{k}"] = summed(inside / placed.size, total)
        result[f"ndcg@{k}"] = summed(gain / placed.size, gained[np.minimum(total, k)])
    reciprocal = np.full(len(total), np.nan)
    reciprocal[asked] = [
        _expected_reciprocal_rank(*tie)
        for tie in zip(start[asked].tolist(), size[asked].tolist(), hits[asked].tolist(), strict=True)
    ]
    result["mrr"] = credited(reciprocal, 1 / (placed.start + (placed.size + 1) / 2))
    result["auc"] = credited(_auc(placed), _wins(placed))
    return result


def first_hit_distribution(size: int, hits: int) -> np.ndarray:
    """Probability [size] that the first of `hits` relevant candidates among `size` stands at position 1, 2, … of a
    random order.
    """
    position = np.arange(size)
    earlier_missed = np.cumprod(np.r_[1.0, np.maximum(size - hits - position[:-1], 0) / (size - position[:-1])])
    return earlier_missed * hits / (size - position)


def _place(scores: np.ndarray, relevant: np.ndarray, candidate: np.ndarray) -> Placed:
    if not np.isfinite(scores[candidate]).all():
        raise ValueError("a score is not finite; expected finite scores of all candidates")
    ranked = np.where(candidate, scores, -np.inf)
    rising = np.sort(ranked, axis=1)
    query, item = np.nonzero(relevant & candidate)
    theirs = ranked[query, item]
    total = np.bincount(query, minlength=len(scores))
    lower, upper = np.empty(len(query), dtype=np.int64), np.empty(len(query), dtype=np.int64)
    end = 0
    for number in np.flatnonzero(total):
        begin, end = end, end + total[number]
        lower[begin:end] = rising[number].searchsorted(theirs[begin:end], "left")
        upper[begin:end] = rising[number].searchsorted(theirs[begin:end], "right")
    return Placed(query, item, scores.shape[1] - upper, upper - lower, total, candidate.sum(axis=1))


def _best_ties(placed: Placed) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each query, the best tie with a relevant candidate: where it starts, its size and its relevant candidates, int
    [queries].
    """
    queries = len(placed.total)
    start = np.full(queries, np.iinfo(np.int64).max)
    np.minimum.at(start, placed.query, placed.start)
    first = placed.start == start[placed.query]
    size = np.ones(queries, dtype=np.int64)
    size[placed.query[first]] = placed.size[first]
    return start, size, np.bincount(placed.query[first], minlength=queries)


def _auc(placed: Placed) -> np.ndarray:
    """From the mean ranks of the relevant candidates (Mann and Whitney 1947), a tie counting half."""
    total = placed.total
    others = placed.candidates - total
    wins = np.bincount(placed.query, weights=_wins(placed), minlength=len(total))
    return np.divide(wins, total * others, out=np.full(len(total), np.nan), where=(total > 0) & (others > 0))


def _wins(placed: Placed) -> np.ndarray:
    """How many candidates that are not relevant each relevant one stands above, a tie counting half; float64, in the
    order of `placed`.
    """
    rank = placed.candidates[placed.query] - placed.start - (placed.size - 1) / 2  # from 1, the lowest score
    place = placed.query * (placed.candidates.max(initial=0) + 1) + placed.start
    rising = np.sort(place)
    first, last = rising.searchsorted(place, "left"), rising.searchsorted(place, "right")
    lower = np.cumsum(placed.total)[placed.query] - last
    return rank - (lower + (last - first + 1) / 2)


def _hit_probability(start: np.ndarray, size: np.ndarray, hits: np.ndarray, k: int) -> np.ndarray:
    """That a relevant candidate of the best tie with one is among the first k; float64 [queries]."""
    slots = np.minimum(k - start, size)
    missed = np.ones(len(start))
    for place in range(max(int(slots.max(initial=0)), 0)):
        taken = place < slots
        missed[taken] *= np.maximum(size - hits - place, 0)[taken] / (size[taken] - place)
    return 1 - missed


@lru_cache(maxsize=4096)
def _expected_reciprocal_rank(start: int, size: int, hits: int) -> float:
    if size == hits:
        return 1 / (start + 1)
    return float((first_hit_distribution(size, hits) / (start + 1 + np.arange(size))).sum())
