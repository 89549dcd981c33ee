"""Item AUC: for a cold song, whether users who liked it score higher for it than users who did not.

Popularity, the same for all users, orders no users: it scores exactly 0.5, however skewed a log is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.tasks.baselines import Scorer
from htcl_ray.evaluation.tasks.recommendation_queries import Listening, lengths, named, without
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.workspace.manifest import fingerprint

CELLS = 2**22
"""Scores held at once: 16 MiB of fp32."""


@dataclass(frozen=True)
class ItemQuestions:
    """One question for each song that enough users liked and enough did not. Matrices: bool [users, songs]."""

    songs: np.ndarray
    """int [songs], catalogue rows."""
    history: sparse.csr_matrix
    """bool [users, catalogue]."""
    positive: sparse.csr_matrix
    left_out: sparse.csr_matrix
    """Users who met the song before the period."""
    negative: sparse.csr_matrix | None
    """None: all users who are neither positive nor left out."""
    users: tuple[str, ...] = ()
    """Ids."""
    asked: str = ""
    """Fingerprint of users, histories, songs and answers, by id."""


def item_questions(
    heard: Listening, candidates: np.ndarray, settings: EvaluateSettings, *, known_users: bool = False
) -> ItemQuestions:
    """The candidates, bool [catalogue], with at least `evaluate.min_item_users` positive and as many negative users in
    the period.

    Users have a history of at least `evaluate.min_history` songs and have not met the song before the period. When the
    log has events that are not positive (feedback), negatives are users who were exposed to the song in the period and
    not positive; otherwise all others. Of more than `evaluate.max_users` users who can say something, those who answer
    for songs in the order of a hash: a sample of users by themselves would leave few songs of a large catalogue with
    enough answers.
    """
    rows = np.flatnonzero(candidates)
    able = (heard.held_out != known_users) & (lengths(heard.history) >= settings.min_history)
    if heard.has_feedback:
        able &= lengths(heard.exposed[:, rows]) > 0
    users = np.flatnonzero(able)
    met = heard.met[users][:, rows]
    positive = without(heard.liked[users][:, rows], met)
    negative = without(without(heard.exposed[users][:, rows], met), positive) if heard.has_feedback else None
    if settings.max_users is not None and len(users) > settings.max_users:
        chosen = _users_of_songs(heard.users[users].tolist(), heard.songs[rows].tolist(), positive, negative, settings)
        users, met, positive = users[chosen], met[chosen], positive[chosen]
        negative = None if negative is None else negative[chosen]
    liked = positive.getnnz(axis=0)
    others = len(users) - liked - met.getnnz(axis=0) if negative is None else negative.getnnz(axis=0)
    kept = np.flatnonzero(np.minimum(liked, others) >= settings.min_item_users)
    of_kept = None if negative is None else negative[:, kept]
    history, positive, met, ids = heard.history[users], positive[:, kept], met[:, kept], heard.songs[rows[kept]]
    marks = [None if marked is None else named(marked, ids) for marked in (positive, met, of_kept)]
    names = tuple(heard.users[users].tolist())
    asked = fingerprint(names, ids.tolist(), named(history, heard.songs), marks)
    return ItemQuestions(rows[kept], history, positive, met, of_kept, names, asked)


def _users_of_songs(
    users: list[str],
    songs: list[str],
    positive: sparse.csr_matrix,
    negative: sparse.csr_matrix | None,
    settings: EvaluateSettings,
) -> np.ndarray:
    """Rows, sorted, of `evaluate.max_users` users: those that the AUC of song after song needs, then others; in the
    order of a hash.
    """
    order = np.argsort([hash_fraction(user, "evaluated user") for user in users], kind="stable")
    needed, most = settings.min_item_users, settings.max_users or len(users)
    answers = [matrix[order].tocsc().sorted_indices() for matrix in (positive, negative) if matrix is not None]
    chosen = np.zeros(len(users), dtype=bool)
    for song in np.argsort([hash_fraction(song, "evaluated song") for song in songs], kind="stable"):
        of_song = [matrix.indices[matrix.indptr[song] : matrix.indptr[song + 1]] for matrix in answers]
        if min(map(len, of_song)) < needed:
            continue
        wanted = np.unique(np.concatenate([rows[:needed] for rows in of_song]))
        if chosen.sum() + (~chosen[wanted]).sum() > most:
            break
        chosen[wanted] = True
    chosen[np.flatnonzero(~chosen)[: most - chosen.sum()]] = True
    return np.sort(order[chosen])


def item_auc(asked: ItemQuestions, scorer: Scorer) -> tuple[np.ndarray, np.ndarray]:
    """Of each song, the probability that a positive user scores higher for it than a negative one, ties half; of each
    user, the influence.

    Both float64, [songs] and [users]. A user's influence is the change of the sum of the songs' AUC per unit of the
    user's weight (the first term of Hájek's projection): for a song, how far their share of won comparisons is from the
    song's AUC.
    """
    users = asked.history.shape[0]
    at_once = max(1, CELLS // max(1, users))
    found, influence = np.empty(len(asked.songs)), np.zeros(users)
    for start in range(0, len(asked.songs), at_once):
        part = slice(start, start + at_once)
        positive = asked.positive[:, part].toarray()
        negative = (
            ~(asked.left_out[:, part].toarray() | positive)
            if asked.negative is None
            else asked.negative[:, part].toarray()
        )
        scores = scorer(asked.history, asked.songs[part])
        for number in range(positive.shape[1]):
            liked, others = np.flatnonzero(positive[:, number]), np.flatnonzero(negative[:, number])
            of_liked, of_others = scores[liked, number], scores[others, number]
            won, lost = _share_below(of_liked, of_others), 1 - _share_below(of_others, of_liked)
            auc = found[start + number] = won.mean()
            influence[liked] += (won - auc) / len(liked)
            influence[others] += (lost - auc) / len(others)
    return found, influence


def _share_below(values: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each value the share of the others that are lower, an equal one counting half."""
    rising = np.sort(others)
    return (rising.searchsorted(values, "left") + rising.searchsorted(values, "right")) / (2 * len(others))
