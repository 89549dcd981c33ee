"""Item AUC: for a cold-start song, whether users who liked it score higher for it than users who did not.

Popularity, which scores a song alike for all users, has an item AUC of exactly 0.5, however skewed the log is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.tasks.recommendation_queries import UserActivity, by_id, exclude, row_counts
from htcl_ray.evaluation.tasks.scorers import Scorer
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.workspace.manifest import fingerprint

CELLS = 2**22
"""Scores held at once: 16 MiB of fp32."""


@dataclass(frozen=True)
class ItemQueries:
    """One query for each song with enough positive and enough negative users. Matrices: bool [users, songs]."""

    songs: np.ndarray
    """int [songs], catalogue rows."""
    history: sparse.csr_matrix
    """bool [users, catalogue]."""
    positive: sparse.csr_matrix
    excluded: sparse.csr_matrix
    """Users who met the song before the period."""
    negative: sparse.csr_matrix | None
    """None: all users who are neither positive nor excluded."""
    users: tuple[str, ...] = ()
    """Ids."""
    population: str = ""
    """Fingerprint of users, histories, songs and labels, by id."""


def item_queries(
    activity: UserActivity, candidates: np.ndarray, settings: EvaluateSettings, *, known_users: bool = False
) -> ItemQueries:
    """Queries of the candidates, bool [catalogue], with at least `evaluate.min_item_users` users of each label.

    Users have a history of at least `evaluate.min_history` songs and have not met the song before the period. When the
    log has events that are not positive (feedback), negatives are users who were exposed to the song in the period and
    not positive; otherwise all others. Beyond `evaluate.max_users`, users are chosen song by song in the order of a
    hash: a sample of users by themselves would leave few songs of a large catalogue with enough labels.
    """
    rows = np.flatnonzero(candidates)
    eligible = (activity.held_out != known_users) & (row_counts(activity.history) >= settings.min_history)
    if activity.has_feedback:
        eligible &= row_counts(activity.exposed[:, rows]) > 0
    users = np.flatnonzero(eligible)
    met = activity.met[users][:, rows]
    positive = exclude(activity.liked[users][:, rows], met)
    negative = exclude(exclude(activity.exposed[users][:, rows], met), positive) if activity.has_feedback else None
    if settings.max_users is not None and len(users) > settings.max_users:
        chosen = _users_of_songs(
            activity.users[users].tolist(), activity.songs[rows].tolist(), positive, negative, settings
        )
        users, met, positive = users[chosen], met[chosen], positive[chosen]
        negative = None if negative is None else negative[chosen]
    liked = positive.getnnz(axis=0)
    others = len(users) - liked - met.getnnz(axis=0) if negative is None else negative.getnnz(axis=0)
    kept = np.flatnonzero(np.minimum(liked, others) >= settings.min_item_users)
    negative = None if negative is None else negative[:, kept]
    history, positive, met, ids = activity.history[users], positive[:, kept], met[:, kept], activity.songs[rows[kept]]
    labels = [None if marks is None else by_id(marks, ids) for marks in (positive, met, negative)]
    names = tuple(activity.users[users].tolist())
    population = fingerprint(names, ids.tolist(), by_id(history, activity.songs), labels)
    return ItemQueries(rows[kept], history, positive, met, negative, names, population)


def _users_of_songs(
    users: list[str],
    songs: list[str],
    positive: sparse.csr_matrix,
    negative: sparse.csr_matrix | None,
    settings: EvaluateSettings,
) -> np.ndarray:
    """Rows, sorted, of `evaluate.max_users` users: those that the AUC of song after song needs, then others.

    Songs and users are taken in the order of a hash.
    """
    order = np.argsort([hash_fraction(user, "evaluated user") for user in users], kind="stable")
    needed, limit = settings.min_item_users, settings.max_users or len(users)
    labels = [matrix[order].tocsc().sorted_indices() for matrix in (positive, negative) if matrix is not None]
    chosen = np.zeros(len(users), dtype=bool)
    for song in np.argsort([hash_fraction(song, "evaluated song") for song in songs], kind="stable"):
        of_song = [matrix.indices[matrix.indptr[song] : matrix.indptr[song + 1]] for matrix in labels]
        if min(map(len, of_song)) < needed:
            continue
        wanted = np.unique(np.concatenate([rows[:needed] for rows in of_song]))
        if chosen.sum() + (~chosen[wanted]).sum() > limit:
            break
        chosen[wanted] = True
    chosen[np.flatnonzero(~chosen)[: limit - chosen.sum()]] = True
    return np.sort(order[chosen])


def item_auc(queries: ItemQueries, scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """AUC of each song, and the influence of each user; float64 [songs] and [users].

    The AUC is the probability that a positive user scores higher for the song than a negative one, a tie counting half.
    A user's influence is the change of the sum of all AUCs per unit of the user's weight (the first term of Hájek's
    projection): for a song, the difference of the user's share of won comparisons from the song's AUC.
    """
    users = queries.history.shape[0]
    at_once = max(1, CELLS // max(1, users))
    aucs, influence = np.empty(len(queries.songs)), np.zeros(users)
    for start in range(0, len(queries.songs), at_once):
        part = slice(start, start + at_once)
        positive = queries.positive[:, part].toarray()
        negative = (
            ~(queries.excluded[:, part].toarray() | positive)
            if queries.negative is None
            else queries.negative[:, part].toarray()
        )
        scores = scorer(queries.history, queries.songs[part])
        for column in range(positive.shape[1]):
            liked, others = np.flatnonzero(positive[:, column]), np.flatnonzero(negative[:, column])
            of_liked, of_others = scores[liked, column], scores[others, column]
            won, lost = _share_below(of_liked, of_others), 1 - _share_below(of_others, of_liked)
            auc = aucs[start + column] = won.mean()
            influence[liked] += (won - auc) / len(liked)
            influence[others] += (lost - auc) / len(others)
    return aucs, influence


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Share of `others` below each value, an equal one counting half."""
    ordered = np.sort(others)
    return (ordered.searchsorted(values, "left") + ordered.searchsorted(values, "right")) / (2 * len(others))
