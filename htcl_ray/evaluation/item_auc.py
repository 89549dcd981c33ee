"""Item AUC: for a cold song, whether users who liked it score higher for it than users who did not.

Popularity, the same for all users, orders no users: it scores exactly 0.5, however skewed a log is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from htcl_ray.evaluation.baselines import Scorer
from htcl_ray.evaluation.questions import Listening, chosen_users, lengths, without
from htcl_ray.evaluation.ties import expected_auc
from htcl_ray.settings import EvaluateSettings

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


def item_questions(heard: Listening, candidates: np.ndarray, settings: EvaluateSettings, *, known_users: bool = False) -> ItemQuestions:
    """The candidates, bool [catalogue], with at least `evaluate.min_item_users` positive and as many negative users in the period.

    Users have a history of at least `evaluate.min_history` songs and have not met the song before the period. When the log has events that
    are not positive (feedback), negatives are users who were exposed to the song in the period and not positive; otherwise all others. Of
    more than `evaluate.max_users` users who can say something, those with the lowest hash of their id.
    """
    rows = np.flatnonzero(candidates)
    able = (heard.held_out != known_users) & (lengths(heard.history) >= settings.min_history)
    if heard.has_feedback:
        able &= lengths(heard.exposed[:, rows]) > 0
    users = np.flatnonzero(able)
    users = users[chosen_users(heard.users[users].tolist(), settings.max_users)]
    met = heard.met[users][:, rows]
    positive = without(heard.liked[users][:, rows], met)
    negative = without(without(heard.exposed[users][:, rows], met), positive) if heard.has_feedback else None
    liked = positive.getnnz(axis=0)
    others = len(users) - liked - met.getnnz(axis=0) if negative is None else negative.getnnz(axis=0)
    kept = np.flatnonzero(np.minimum(liked, others) >= settings.min_item_users)
    of_kept = None if negative is None else negative[:, kept]
    return ItemQuestions(rows[kept], heard.history[users], positive[:, kept], met[:, kept], of_kept)


def item_auc(asked: ItemQuestions, scorer: Scorer) -> np.ndarray:
    """Float64 [songs]: probability that a positive user scores higher for the song than a negative one, ties half."""
    users = asked.history.shape[0]
    at_once = max(1, CELLS // max(1, users))
    found = [np.empty(0)]
    for start in range(0, len(asked.songs), at_once):
        part = slice(start, start + at_once)
        positive = asked.positive[:, part].toarray()
        negative = ~asked.left_out[:, part].toarray() if asked.negative is None else asked.negative[:, part].toarray()
        scores = scorer(asked.history, asked.songs[part])
        found.append(expected_auc(scores.T, positive.T, (positive | negative).T))
    return np.concatenate(found)
