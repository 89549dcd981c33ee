"""What recommended lists are made of: how much of the catalogue they reach, how unequally, how many artists, how
popular.

A list is the set of a user's k best candidates; of those tied for its last places some are drawn, by seed and user,
since any fixed order would list the same songs for everybody. The figures are those of one such draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse
from scipy.stats import rankdata

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate, TwoWayDraws


def top(scores: np.ndarray, candidate: np.ndarray, k: int, seed: int, first_user: int = 0) -> sparse.csr_matrix:
    """Bool [users, candidates]: each user's k best, or all of theirs when they have fewer.

    `scores`: float [users, candidates]; `candidate`: bool of the same shape, those that are the user's; `first_user`:
    number of the first of these users in the task.
    """
    ranked = np.where(candidate, scores, -np.inf)
    place = min(k, ranked.shape[1])
    last = np.partition(ranked, -place, axis=1)[:, [-place]]
    listed = (ranked >= last) & candidate
    for row in np.flatnonzero(listed.sum(axis=1) > place):
        tied = np.flatnonzero(ranked[row] == last[row])
        surplus = int(listed[row].sum()) - place
        listed[row, np.random.default_rng((seed, first_user + int(row))).choice(tied, surplus, replace=False)] = False
    return sparse.csr_matrix(listed)


def breadth(
    lists: Sequence[sparse.csr_matrix],
    met: sparse.csr_matrix,
    artists: np.ndarray,
    popularity: np.ndarray,
    k: int,
    draws: TwoWayDraws,
) -> dict[str, Estimate]:
    """Figures of all lists together, and means over users; of several sets of lists (shuffles) the mean.

    `lists` and `met`: bool [users, candidates], what is listed and what is no candidate of the user; `artists`,
    `popularity`: [candidates].

    coverage@k         share of the candidates that are in any list
    gini@k             inequality of how often the candidates are listed: 0 all alike, towards 1 one of them always
    artist_diversity@k different artists in a list / its length
    popularity_lift@k  mean percentile of popularity of the listed songs / that of all the user's candidates; 1 is no lift
    """
    n = len(popularity)
    draws = draws.about(artists.tolist(), popularity.tolist())
    percentile = (rankdata(popularity) - 0.5) / n
    codes = np.unique(artists, return_inverse=True)[1]
    of_artist = sparse.csr_matrix((np.ones(n, dtype=np.int64), (np.arange(n), codes)))
    typical = (percentile.sum() - met @ percentile) / (n - met.sum(axis=1).A1)
    times = [listed.sum(axis=0).A1 for listed in lists]
    lengths = [np.maximum(listed.sum(axis=1).A1, 1) for listed in lists]  # a user with a target has a candidate
    shares = [
        sparse.diags(1 / length) @ listed for listed, length in zip(lists, lengths, strict=True)
    ]  # of a list, each song's share
    mass = np.mean([share.sum(axis=0).A1 for share in shares], axis=0)
    different = [
        (listed.astype(np.int64) @ of_artist).getnnz(axis=1) / length
        for listed, length in zip(lists, lengths, strict=True)
    ]
    once = [_artist_shares(listed, codes, length) for listed, length in zip(lists, lengths, strict=True)]
    lift = [share @ percentile / typical for share in shares]
    lifted = [(sparse.diags(1 / typical) @ share).sum(axis=0).A1 * percentile for share in shares]
    return {
        f"coverage@{k}": Estimate(float(np.mean([(counts > 0).mean() for counts in times])), n, None, draws.population),
        f"gini@{k}": Estimate(float(np.mean([gini(counts) for counts in times])), n, None, draws.population),
        f"artist_diversity@{k}": bootstrap.two_way_mean(np.mean(different, axis=0), np.mean(once, axis=0), mass, draws),
        f"popularity_lift@{k}": bootstrap.two_way_mean(np.mean(lift, axis=0), np.mean(lifted, axis=0), mass, draws),
    }


def _artist_shares(listed: sparse.csr_matrix, codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """float64 [candidates]: what each adds to the sum of artist diversities; of an artist who is listed twice, each
    song half.
    """
    user, song = listed.nonzero()
    _, place, counts = np.unique(user * (codes.max() + 1) + codes[song], return_inverse=True, return_counts=True)
    return np.bincount(song, weights=1 / (lengths[user] * counts[place]), minlength=listed.shape[1])


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts: mean absolute difference of two of them / twice their mean, in [0, 1);
    all zero gives 0.
    """
    rising = np.sort(counts.astype(np.float64))
    total = rising.sum()
    if not total:
        return 0.0
    place = np.arange(1, len(rising) + 1)
    return float((2 * place - len(rising) - 1) @ rising / (len(rising) * total))
