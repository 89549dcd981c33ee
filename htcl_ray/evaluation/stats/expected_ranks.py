"""Ranks of relevant candidates, with tied candidates in random order.

A popularity count or a constant score ties many candidates, and any fixed order among them, such as that of the table,
would be arbitrary. Each candidate of a tie is therefore equally likely at each position of the tie, and metrics are
exact expectations over these orders.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np


class FirstRelevant(NamedTuple):
    """Position of the best relevant candidate of each query; int64 [queries] each."""

    num_higher: np.ndarray
    """Candidates with a higher score."""
    num_tied: np.ndarray
    """Candidates with the same score, itself included."""
    num_relevant: np.ndarray
    """Relevant candidates among the tied ones."""

    @property
    def rank(self) -> np.ndarray:
        """Expected rank of the first relevant candidate, from 1; float64 [queries]."""
        # In a random order of r relevant and m other candidates, m / (r + 1) others precede the first relevant one.
        rank: np.ndarray = 1 + self.num_higher + (self.num_tied - self.num_relevant) / (self.num_relevant + 1)
        return rank


@dataclass(frozen=True)
class ExpectedRanks:
    """Position of every relevant candidate: one entry for each, ordered by query."""

    query: np.ndarray
    """int [entries]: row of the query."""
    item: np.ndarray
    """int [entries]: column of the candidate."""
    num_higher: np.ndarray
    """int [entries]: candidates of the query with a higher score."""
    num_tied: np.ndarray
    """int [entries]: candidates with the same score, itself included."""
    num_relevant: np.ndarray
    """int [queries]: relevant candidates."""
    num_candidates: np.ndarray
    """int [queries]."""

    @property
    def answerable(self) -> np.ndarray:
        """Bool [queries]: queries with a relevant candidate."""
        return self.num_relevant > 0

    @cached_property
    def first(self) -> FirstRelevant:
        """The best tie with a relevant candidate; undefined for queries without one."""
        queries = len(self.num_relevant)
        num_higher = np.full(queries, np.iinfo(np.int64).max)
        np.minimum.at(num_higher, self.query, self.num_higher)
        first = self.num_higher == num_higher[self.query]
        num_tied = np.ones(queries, dtype=np.int64)
        num_tied[self.query[first]] = self.num_tied[first]
        return FirstRelevant(num_higher, num_tied, np.bincount(self.query[first], minlength=queries))

    def sum_by_query(self, values: np.ndarray) -> np.ndarray:
        """Sum of `values` [entries] over each query; float64 [queries]."""
        return np.bincount(self.query, weights=values, minlength=len(self.num_relevant))

    def num_other_below(self) -> np.ndarray:
        """Candidates that are not relevant and rank below each entry, a tie counting half; float64 [entries]."""
        rank = self.num_candidates[self.query] - self.num_higher - (self.num_tied - 1) / 2  # from 1, the lowest score
        place = self.query * (self.num_candidates.max(initial=0) + 1) + self.num_higher
        ordered = np.sort(place)
        first, last = ordered.searchsorted(place, "left"), ordered.searchsorted(place, "right")
        lower = np.cumsum(self.num_relevant)[self.query] - last
        below: np.ndarray = rank - (lower + (last - first + 1) / 2)
        return below


def expected_ranks(scores: np.ndarray, relevant: np.ndarray, candidate: np.ndarray | None = None) -> ExpectedRanks:
    """Rank the candidates of each query by score.

    `scores`: float [queries, items], higher is better; `relevant`: bool of the same shape; `candidate`: bool of the
    same shape, the items that are ranked for a query, None for all. Raises ValueError for a score of a candidate that
    is not finite.
    """
    candidate = np.ones(scores.shape, dtype=bool) if candidate is None else candidate
    if not np.isfinite(scores[candidate]).all():
        raise ValueError("a score is not finite; expected finite scores of all candidates")
    ranked = np.where(candidate, scores, -np.inf)
    ascending = np.sort(ranked, axis=1)
    query, item = np.nonzero(relevant & candidate)
    score = ranked[query, item]
    num_relevant = np.bincount(query, minlength=len(scores))
    lower, upper = np.empty(len(query), dtype=np.int64), np.empty(len(query), dtype=np.int64)
    end = 0
    for row in np.flatnonzero(num_relevant):
        begin, end = end, end + num_relevant[row]
        lower[begin:end] = ascending[row].searchsorted(score[begin:end], "left")
        upper[begin:end] = ascending[row].searchsorted(score[begin:end], "right")
    return ExpectedRanks(query, item, scores.shape[1] - upper, upper - lower, num_relevant, candidate.sum(axis=1))


@lru_cache(maxsize=64)
def first_hit_distribution(size: int, hits: int) -> np.ndarray:
    """Distribution of the position of the first of `hits` relevant candidates in a random order of `size`.

    float64 [size], read-only: the probability of position 1, 2, ….
    """
    position = np.arange(size)
    earlier_missed = np.cumprod(np.r_[1.0, np.maximum(size - hits - position[:-1], 0) / (size - position[:-1])])
    distribution = earlier_missed * hits / (size - position)
    distribution.flags.writeable = False
    return distribution


def hit_probability(first: FirstRelevant, k: int) -> np.ndarray:
    """Probability that a relevant candidate is among the first `k`; float64 [queries]."""
    slots = np.minimum(k - first.num_higher, first.num_tied)
    missed = np.ones(len(slots))
    for place in range(max(int(slots.max(initial=0)), 0)):
        taken = place < slots
        remaining = first.num_tied[taken] - place
        missed[taken] *= np.maximum(first.num_tied - first.num_relevant - place, 0)[taken] / remaining
    return 1 - missed


@lru_cache(maxsize=4096)
def expected_reciprocal_rank(num_higher: int, num_tied: int, num_relevant: int) -> float:
    """Expected reciprocal rank of the first relevant candidate of one query; arguments as in `FirstRelevant`."""
    if num_tied == num_relevant:
        return 1 / (num_higher + 1)
    ranks = num_higher + 1 + np.arange(num_tied)
    return float((first_hit_distribution(num_tied, num_relevant) / ranks).sum())
