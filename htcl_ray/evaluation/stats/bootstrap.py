"""Confidence intervals: percentile intervals of a cluster bootstrap, and paired differences.

Songs of one artist are alike and rankings of one user are correlated, so whole artists and whole users are drawn with
replacement (cluster bootstrap; Efron and Tibshirani 1993, chapter 13), not single songs or rankings. All metrics of one
task use the same draws, and so do two models on the same task: differences are taken draw by draw, which makes them
paired.

A recommendation metric varies with the users and with the songs that happen to be held out (crossed random effects), so
both are resampled (Owen 2007, The pigeonhole bootstrap; Owen and Eckles 2012): `TwoWayDraws`. Its variance is the sum
of the variances over users and over artists. That counts the interaction of a user and a song twice (Cameron, Gelbach
and Miller 2011 subtract it once; the pigeonhole bootstrap, which multiplies the weights, counts it three times), so
intervals are right where user or song effects dominate, and otherwise too wide rather than too narrow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from htcl_ray.workspace.manifest import fingerprint

CONFIDENCE = 0.95
ROUNDING = 1e-6
"""Differences of resampled figures below this are rounding of single precision."""


@dataclass(frozen=True)
class Draws:
    """Number of times that each unit (song, text, user) was drawn in each resample."""

    weights: np.ndarray
    """float32 [resamples, units], at least 0."""
    population: str
    """Fingerprint of the clusters, the seed and the queries of the task; see `Estimate.population`."""

    def merge(self, group: np.ndarray, groups: int) -> Draws:
        """Draws of groups of units; the weight of a group is the mean of its units.

        `group`: int [units], from 0 to `groups` − 1, none empty.
        """
        order = np.argsort(group, kind="stable")
        starts = np.searchsorted(group[order], np.arange(groups))
        sums = np.add.reduceat(self.weights[:, order], starts, axis=1)
        return Draws(sums / np.bincount(group, minlength=groups).astype(np.float32), self.population)

    def select(self, rows: np.ndarray) -> Draws:
        """Draws of some of the units."""
        return Draws(self.weights[:, rows], self.population)

    def for_task(self, *queries: object) -> Draws:
        """The same draws for a task, whose queries (JSON types) become part of the population."""
        return Draws(self.weights, fingerprint(self.population, *queries))


@dataclass(frozen=True)
class Estimate:
    """A metric: its value, the number of units it is computed over, and its value on each resample."""

    value: float
    """nan when no unit has a value."""
    n: int
    resampled: np.ndarray | None = None
    """float32 [resamples]; None for metrics that are not resampled, such as a largest difference."""
    population: str = ""
    """Fingerprint of the queries and of the draws. Only estimates of equal populations are comparable: two models on
    the same songs, users and candidates. Empty for a property of an artifact itself, such as the recall of an index."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """Low and high end of the 95 % interval; None without resamples."""
        if self.resampled is None or np.isnan(self.resampled).all():
            return None
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.nanpercentile(self.resampled, [tail, 100 - tail])
        return float(low), float(high)


@dataclass(frozen=True)
class TwoWayDraws:
    """Independent draws of users, and of artists with all their songs."""

    users: Draws
    """Draws of each user."""
    artists: Draws
    """Draws of each artist."""
    artist: np.ndarray
    """int [songs]: the artist of each song."""
    population: str

    def for_task(self, *queries: object) -> TwoWayDraws:
        """See `Draws.for_task`."""
        return replace(self, population=fingerprint(self.population, *queries))


def draw(clusters: Sequence[str], resamples: int, seed: int | tuple[int, ...]) -> Draws:
    """Draw whole clusters with replacement; `clusters`: the cluster of each unit."""
    names, of_unit = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    share = np.full(len(names), 1 / max(len(names), 1))
    counts = np.random.default_rng(seed).multinomial(len(names), share, size=resamples).astype(np.float32)
    return Draws(counts[:, of_unit], fingerprint("draws", names.tolist(), resamples, seed))


def mean(values: np.ndarray, draws: Draws) -> Estimate:
    """Mean over units; `values`: float [units], nan where a unit has none."""
    known = ~np.isnan(values)
    total = draws.weights @ np.where(known, values, 0).astype(np.float64)
    weight = draws.weights @ known.astype(np.float64)
    resampled = np.divide(total, weight, out=np.full(len(total), np.nan), where=weight > 0)
    value = float(values[known].mean()) if known.any() else float("nan")
    return Estimate(value, int(known.sum()), resampled.astype(np.float32), draws.population)


def draw_two_way(users: Sequence[str], artists: Sequence[str], resamples: int, seed: int) -> TwoWayDraws:
    """Draw users, and independently artists, with replacement; `artists`: the artist of each song."""
    names, artist = np.unique(np.asarray(artists, dtype=str), return_inverse=True)
    of_users, of_artists = draw(users, resamples, seed), draw(names.tolist(), resamples, (seed, 1))
    return TwoWayDraws(of_users, of_artists, artist, fingerprint(of_users.population, of_artists.population))


def two_way_mean(values: np.ndarray, gain: np.ndarray, mass: np.ndarray, draws: TwoWayDraws) -> Estimate:
    """Mean over users, resampled over users and over artists.

    `values`: float [users], nan where a user has none; `gain`, `mass`: float [songs], the contribution of each song to
    the sum and to the number of the users' values, so that gain.sum() / mass.sum() is the mean. A resample is the mean
    plus the deviations caused by the drawn users and by the drawn artists, clipped to the range of the values.
    """
    by_user = mean(values, draws.users)
    if not by_user.n:
        return replace(by_user, population=draws.population)
    of_artist = [
        np.bincount(draws.artist, weights=of_song, minlength=draws.artists.weights.shape[1]) for of_song in (gain, mass)
    ]
    drawn, count = (draws.artists.weights @ of for of in of_artist)
    by_song = np.divide(drawn, count, out=np.full(len(count), np.nan), where=count > 1e-9)
    resampled = np.clip(by_user.resampled + by_song - by_user.value, np.nanmin(values), np.nanmax(values))
    return Estimate(by_user.value, by_user.n, resampled.astype(np.float32), draws.population)


def average(parts: Sequence[Estimate]) -> Estimate:
    """Mean of estimates of the same units and draws."""
    resampled = np.mean([part.resampled for part in parts if part.resampled is not None], axis=0)
    return Estimate(float(np.mean([part.value for part in parts])), parts[0].n, resampled, parts[0].population)


def two_way_mean_of_songs(values: np.ndarray, influence: np.ndarray, draws: TwoWayDraws) -> Estimate:
    """Mean over songs of a metric in [0, 1] that compares users, resampled over artists and over users.

    `values`: float [songs]; `influence`: float [users], the change of the mean per unit of the user's weight.
    """
    by_song = mean(values, Draws(draws.artists.weights[:, draws.artist], ""))
    by_user = (draws.users.weights - 1) @ influence
    resampled = np.clip(by_song.resampled + by_user, 0, 1)
    return Estimate(by_song.value, by_song.n, resampled.astype(np.float32), draws.population)


def median(values: np.ndarray, draws: Draws) -> Estimate:
    """Median over units, the lower median of each resample; `values`: float [units], nan where a unit has none."""
    kept = np.flatnonzero(~np.isnan(values))
    if not len(kept):
        return Estimate(float("nan"), 0, np.full(len(draws.weights), np.nan, dtype=np.float32), draws.population)
    order = kept[np.argsort(values[kept], kind="stable")]
    passed = np.cumsum(draws.weights[:, order], axis=1, dtype=np.float64)
    at = (passed < passed[:, -1:] / 2 - 1e-9).sum(axis=1)
    resampled = np.where(passed[:, -1] > 0, values[order][np.minimum(at, len(order) - 1)], np.nan)
    return Estimate(float(np.median(values[kept])), len(kept), resampled.astype(np.float32), draws.population)


def difference(first: Estimate, second: Estimate) -> Estimate:
    """`first` − `second`, with a paired interval when both were resampled by the same draws, otherwise without one.

    Differences between populations mean nothing: check `comparable` first.
    """
    value, n = first.value - second.value, min(first.n, second.n)
    if first.resampled is None or second.resampled is None or first.population != second.population:
        return Estimate(value, n)
    return Estimate(value, n, first.resampled - second.resampled, first.population)


def comparable(first: Estimate, second: Estimate) -> bool:
    """Whether two estimates have the same population: the same songs, users and candidates, and the same draws."""
    return first.population == second.population


def is_significant(estimate: Estimate) -> bool | None:
    """Whether the 95 % interval of a difference excludes 0; None without an interval."""
    interval = estimate.interval
    return None if interval is None else interval[0] > ROUNDING or interval[1] < -ROUNDING
