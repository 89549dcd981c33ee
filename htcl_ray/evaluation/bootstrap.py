"""How sure a figure is: percentile intervals of a bootstrap over artists or users, and paired differences between two figures.

Songs of one artist sound alike and rankings of one user belong together, so whole artists and whole users are drawn with replacement
(cluster bootstrap; Efron and Tibshirani 1993, chapter 13), not single songs or rankings. All figures of one task see the same draws, and
so do two models on the same task: a difference is taken draw by draw, which is what makes it paired.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from htcl_ray.storage import fingerprint

CONFIDENCE = 0.95
ROUNDING = 1e-6
"""Differences of resampled figures below this are rounding of single precision."""


@dataclass(frozen=True)
class Draws:
    """How often each unit (song, text, user) was drawn in each resample."""

    weights: np.ndarray
    """float32 [resamples, units], at least 0."""
    population: str
    """Fingerprint of the clusters and the seed: draws of equal populations are the same draws."""

    def merged(self, group: np.ndarray, groups: int) -> Draws:
        """Draws of groups of units: a group weighs the mean of its units. `group`: int [units], from 0 to `groups` − 1, none empty."""
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(groups))
        sums = np.add.reduceat(self.weights[:, order], starts, axis=1)
        return Draws(sums / np.bincount(group, minlength=groups).astype(np.float32), self.population)

    def of(self, rows: np.ndarray) -> Draws:
        """Draws of some of the units."""
        return Draws(self.weights[:, rows], self.population)


@dataclass(frozen=True)
class Estimate:
    """A figure, how many units it is the figure of, and what it was on each resample."""

    value: float
    """nan when no unit has a value."""
    n: int
    resampled: np.ndarray | None = None
    """float32 [resamples]; None where resampling has no meaning, such as a model's largest difference."""
    population: str = ""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high end of the 95 % interval, or None."""
        if self.resampled is None or np.isnan(self.resampled).all():
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(self.resampled, [tail, 100 - tail])
        return float(low), float(high)


def draw(clusters: Sequence[str], resamples: int, seed: int) -> Draws:
    """Resample the clusters with replacement; `clusters`: the cluster of each unit."""
    names, of_unit = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    share = np.full(len(names), 1 / max(len(names), 1))
    counts = np.random.default_rng(seed).multinomial(len(names), share, size=resamples).astype(np.float32)
    return Draws(counts[:, of_unit], fingerprint("draws", names.tolist(), resamples, seed))


def mean(values: np.ndarray, draws: Draws) -> Estimate:
    """The mean over units; `values`: float [units], nan where a unit has none."""
    there = ~np.isnan(values)
    total = draws.weights @ np.where(there, values, 0).astype(np.float64)
    weight = draws.weights @ there.astype(np.float64)
    resampled = np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
    value = float(values[there].mean()) if there.any() else float("nan")
    return Estimate(value, int(there.sum()), resampled.astype(np.float32), draws.population)


def median(values: np.ndarray, draws: Draws) -> Estimate:
    """The median over units; `values`: float [units], nan where a unit has none. Of a resample the lower median."""
    kept = np.flatnonzero(~np.isnan(values))
    if not len(kept):
        return Estimate(float("nan"), 0, np.full(len(draws.weights), np.nan, dtype=np.float32), draws.population)
    order = kept[np.argsort(values[kept], kind="stable")]
    passed = np.cumsum(draws.weights[:, order], axis=1, dtype=np.float64)
    at = (passed < passed[:, -1:] / 2 - 1e-9).sum(axis=1)
    resampled = np.where(passed[:, -1] > 0, values[order][np.minimum(at, len(order) - 1)], np.nan)
    return Estimate(float(np.median(values[kept])), len(kept), resampled.astype(np.float32), draws.population)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first` − `second`, with the paired interval when both were resampled by the same draws, otherwise without one."""
    value, n = first.value - second.value, min(first.n, second.n)
    if first.resampled is None or second.resampled is None or first.population != second.population:
        return Estimate(value, n)
    return Estimate(value, n, first.resampled - second.resampled, first.population)


def is_shown(estimate: Estimate) -> bool | None:
    """Whether a difference is shown: its interval does not hold 0. None without an interval."""
    interval = estimate.interval
    return None if interval is None else interval[0] > ROUNDING or interval[1] < -ROUNDING
