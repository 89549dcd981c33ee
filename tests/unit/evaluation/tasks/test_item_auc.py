"""Item AUC against scikit-learn, and the choice of negative users."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.tasks.item_auc import ItemQueries, item_auc, item_queries
from htcl_ray.evaluation.tasks.recommendation_queries import user_activity
from htcl_ray.evaluation.tasks.scorers import shared_scorer
from tests.worlds.recommendation_logs import SONGS, SPLITS, columns_of_rows, histories, log

pytestmark = pytest.mark.unit


def test_item_auc_equals_scikit_learn_song_by_song():
    generator = np.random.default_rng(0)
    scores = np.round(generator.normal(size=(30, 6)), 1)  # ties
    positive = [generator.choice(30, 8, replace=False) for _ in range(6)]
    negative = [np.setdiff1d(np.arange(30), users)[:12] for users in positive]
    marks = [histories(*(users.tolist() for users in which), songs=30).T.tocsr() for which in (positive, negative)]
    queries = ItemQueries(
        np.arange(6), histories(*[[0]] * 30, songs=6), marks[0], sparse.csr_matrix((30, 6), dtype=bool), marks[1]
    )
    actual, _ = item_auc(queries, lambda history, songs: scores[:, songs])
    for song in range(6):
        users = np.r_[positive[song], negative[song]]
        assert actual[song] == pytest.approx(roc_auc_score(np.isin(users, positive[song]), scores[users, song]))
    same, _ = item_auc(queries, shared_scorer(generator.random(6)))
    assert same.tolist() == [0.5] * 6, "what is equal for all users tells none apart"


def item_log(feedback: bool) -> pd.DataFrame:
    rows = [(f"U{i}", "a", 1, "train") for i in range(8)]
    rows += [(f"U{i}", "d", 1, "test") for i in range(3)]
    rows += [(f"U{i}", "d", -1, "test") for i in range(3, 5)] if feedback else []
    rows += [
        ("U7", "d", 1, "train"),
        ("U7", "d", 1, "test"),
        ("NO_HISTORY", "d", 1, "test"),
        ("known", "a", 1, "train"),
    ]
    return log(*rows)


@pytest.mark.parametrize(("feedback", "negatives"), [(True, [3, 4]), (False, [3, 4, 5, 6])])
def test_negatives_are_exposed_users_or_all_others(feedback: bool, negatives: list[int]):
    """U7 met the song before the period, one user has no history, and known users have separate queries."""
    cold = SPLITS == "test"
    activity = user_activity(SONGS, cold, item_log(feedback), "test")
    queries = item_queries(activity, cold, EvaluateSettings(min_item_users=2))
    assert queries.songs.tolist() == [3]
    users = range(
        queries.history.shape[0]
    )  # U0 …; of feedback logs only those who were exposed to a cold song in the period
    assert len(users) == (6 if feedback else 8)
    positive = columns_of_rows(queries.positive.T)[0]
    assert positive == [0, 1, 2]
    if feedback:
        assert columns_of_rows(queries.negative.T)[0] == negatives
    else:
        assert queries.negative is None
        left_out = columns_of_rows(queries.excluded.T)[0]
        assert [user for user in users if user not in positive and user not in left_out] == negatives
        scores = np.array([[5.0], [1], [2], [2], [1], [0], [0], [99]])  # U7 does not count
        assert item_auc(queries, lambda history, songs: scores)[0][0] == pytest.approx(
            roc_auc_score([1, 1, 1, 0, 0, 0, 0], scores[:7, 0])
        )
    assert not len(item_queries(activity, cold, EvaluateSettings()).songs), "five of each are needed by default"
