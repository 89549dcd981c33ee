"""Metrics of recommended lists: coverage of the catalogue, inequality, diversity of artists, lift of popularity.

A list is the set of a user's k best candidates. Songs that tie for the last places are drawn by seed and user, since
any fixed order would list the same songs for all users; the metrics are those of one such draw.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import sparse

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate, TwoWayDraws


def top_k(scores: np.ndarray, candidate: np.ndarray, k: int, seed: int, first_user: int = 0) -> sparse.csr_matrix:
    """The k best candidates of each user, or all when they have fewer; bool [users, candidates].

    `scores`: float [users, candidates]; `candidate`: bool of the same shape, the candidates of each user; `first_user`:
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


def list_metrics(
    lists: Sequence[sparse.csr_matrix],
    met: sparse.csr_matrix,
    artists: np.ndarray,
    popularity: np.ndarray,
    k: int,
    draws: TwoWayDraws,
) -> dict[str, Estimate]:
    """Metrics over all lists, and means over users; of several sets of lists (permutations) the mean.

    `lists` and `met`: bool [users, candidates], the listed songs and those excluded from the user's candidates;
    `artists`, `popularity`: [candidates].

    coverage@k         share of the candidates that are in any list
    gini@k             Gini coefficient of how often candidates are listed: 0 all alike, towards 1 always the same
    artist_diversity@k different artists in a list / its length
    popularity_lift@k  mean percentile of popularity of the listed songs / that of all candidates of the user
    """
    from scipy.stats import rankdata  # its import takes longer than that of the rest of the evaluation

    n = len(popularity)
    draws = draws.for_task(artists.tolist(), popularity.tolist())
    percentile = (rankdata(popularity) - 0.5) / n
    codes = np.unique(artists, return_inverse=True)[1]
    of_artist = sparse.csr_matrix((np.ones(n, dtype=np.int64), (np.arange(n), codes)))
    typical = (percentile.sum() - met @ percentile) / (n - met.sum(axis=1).A1)
    times = [listed.sum(axis=0).A1 for listed in lists]
    lengths = [np.maximum(listed.sum(axis=1).A1, 1) for listed in lists]  # a user with a target has a candidate
    shares = [sparse.diags(1 / length) @ listed for listed, length in zip(lists, lengths, strict=True)]
    mass = np.mean([share.sum(axis=0).A1 for share in shares], axis=0)
    different = [
        (listed.astype(np.int64) @ of_artist).getnnz(axis=1) / length
        for listed, length in zip(lists, lengths, strict=True)
    ]
    diversity = [_artist_shares(listed, codes, length) for listed, length in zip(lists, lengths, strict=True)]
    lift = [share @ percentile / typical for share in shares]
    lift_of_song = [(sparse.diags(1 / typical) @ share).sum(axis=0).A1 * percentile for share in shares]
    return {
        f"coverage@{k}": Estimate(float(np.mean([(counts > 0).mean() for counts in times])), n, None, draws.population),
        f"gini@{k}": Estimate(float(np.mean([gini(counts) for counts in times])), n, None, draws.population),
        f"artist_diversity@{k}": bootstrap.two_way_mean(
            np.mean(different, axis=0), np.mean(diversity, axis=0), mass, draws
        ),
        f"popularity_lift@{k}": bootstrap.two_way_mean(
            np.mean(lift, axis=0), np.mean(lift_of_song, axis=0), mass, draws
        ),
    }


def _artist_shares(listed: sparse.csr_matrix, codes: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Contribution of each candidate to the sum of artist diversities; float64 [candidates].

    Songs of one artist in a list share the artist's contribution equally.
    """
    user, song = listed.nonzero()
    _, place, counts = np.unique(user * (codes.max() + 1) + codes[song], return_inverse=True, return_counts=True)
    return np.bincount(song, weights=1 / (lengths[user] * counts[place]), minlength=listed.shape[1])


def gini(counts: np.ndarray) -> float:
    """Gini coefficient of non-negative counts, in [0, 1): 0 when all are equal, and when all are zero.

    Mean absolute difference of two counts / twice their mean.
    """
    ascending = np.sort(counts.astype(np.float64))
    total = ascending.sum()
    if not total:
        return 0.0
    place = np.arange(1, len(ascending) + 1)
    return float((2 * place - len(ascending) - 1) @ ascending / (len(ascending) * total))
