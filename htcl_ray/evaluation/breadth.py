"""What recommended lists are made of: how much of the catalogue they reach, how unequally, how many artists, how popular."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.bootstrap import Draws, Estimate


@dataclass(frozen=True)
class Lists:
    """The first k candidates of each user."""

    chosen: list[np.ndarray]
    """Of each user: int, positions among the candidates, at most k."""
    artists: np.ndarray
    """Of each candidate."""
    popularity: np.ndarray
    """Of each candidate: positive events."""


def pick(scores: np.ndarray, candidate: np.ndarray, k: int, user: int, seed: int) -> np.ndarray:
    """Positions of the k best of a user's candidates; of those tied for the last places some drawn by seed and user.

    `scores`: float [candidates]; `candidate`: bool of the same shape.
    """
    theirs = np.flatnonzero(candidate)
    if len(theirs) <= k:
        return theirs
    mine = scores[theirs]
    last = np.partition(mine, -k)[-k]
    sure, tied = np.flatnonzero(mine > last), np.flatnonzero(mine == last)
    if len(sure) + len(tied) > k:
        tied = np.random.default_rng((seed, user)).choice(tied, k - len(sure), replace=False)
    return theirs[np.concatenate([sure, tied])]


def breadth(lists: Lists, k: int, draws: Draws) -> dict[str, Estimate]:
    """Figures of all lists together, and means over users.

    coverage@k         share of the candidates that are in any list
    gini@k             inequality of how often the candidates are listed: 0 all alike, towards 1 one of them always
    artist_diversity@k different artists in a list / its length
    popularity_lift@k  mean percentile of popularity of the listed songs / that of all candidates; 1 is no lift
    """
    times = np.bincount(np.concatenate(lists.chosen), minlength=len(lists.artists))
    percentile = rankdata(lists.popularity) / len(lists.popularity)
    codes = np.unique(lists.artists, return_inverse=True)[1]
    artists = [len(np.unique(codes[chosen])) / len(chosen) if len(chosen) else np.nan for chosen in lists.chosen]
    lift = [percentile[chosen].mean() / percentile.mean() if len(chosen) else np.nan for chosen in lists.chosen]
    return {
        f"coverage@{k}": Estimate(float((times > 0).mean()), len(times)),
        f"gini@{k}": Estimate(gini(times), len(times)),
        f"artist_diversity@{k}": bootstrap.mean(np.array(artists, dtype=np.float64), draws),
        f"popularity_lift@{k}": bootstrap.mean(np.array(lift, dtype=np.float64), draws),
    }


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts: mean absolute difference of two of them / twice their mean, in [0, 1); all zero gives 0."""
    rising = np.sort(counts.astype(np.float64))
    total = rising.sum()
    if not total:
        return 0.0
    place = np.arange(1, len(rising) + 1)
    return float((2 * place - len(rising) - 1) @ rising / (len(rising) * total))
