"""Baselines, item AUC and breadth against dense references, closed forms and scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from htcl_ray.evaluation import baselines, bootstrap
from htcl_ray.evaluation.breadth import Lists, breadth, gini, pick
from htcl_ray.evaluation.item_auc import ItemQuestions, item_auc, item_questions
from htcl_ray.evaluation.periods import training_positives
from htcl_ray.settings import EvaluateSettings
from tests.evaluation_songs import made_up, metadata
from tests.unit.test_recommendation import SONGS, SPLITS, log

pytestmark = pytest.mark.unit


def test_item_knn_equals_the_dense_cosine():
    generator = np.random.default_rng(0)
    listened = sparse.csr_matrix((generator.random((30, 12)) < 0.3).astype(np.float32))
    dense = cosine_similarity(listened.T.toarray())
    np.fill_diagonal(dense, 0)
    histories, candidates = [np.array([0, 3]), np.array([7])], np.array([1, 2, 3, 7])
    expected = np.stack([dense[rows][:, candidates].sum(axis=0) for rows in histories])
    np.testing.assert_allclose(baselines.item_knn_scorer(listened)(histories, candidates), expected, atol=1e-6)
    pruned = np.where(dense >= np.sort(dense, axis=1)[:, [-3]], dense, 0)
    expected = np.stack([pruned[rows][:, candidates].sum(axis=0) for rows in histories])
    np.testing.assert_allclose(baselines.item_knn_scorer(listened, neighbors=3)(histories, candidates), expected, atol=1e-6)


def test_als_folds_a_user_in_by_the_closed_form():
    """(YᵀY + Σ (α − 1) y yᵀ + λI)⁻¹ Σ α y over the history (Hu, Koren and Volinsky 2008, equation 4, confidence α)."""
    generator = np.random.default_rng(0)
    listened = sparse.csr_matrix((generator.random((40, 20)) < 0.3).astype(np.float32))
    history = np.array([2, 5, 11])
    first, second = (baselines.als_scorer(listened, seed=1)([history], np.arange(20)) for _ in range(2))
    np.testing.assert_array_equal(first, second)
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(
        factors=baselines.als_factors(40),
        regularization=baselines.ALS_REGULARIZATION,
        alpha=baselines.ALS_ALPHA,
        iterations=baselines.ALS_ITERATIONS,
        num_threads=1,
        random_state=1,
    )
    model.fit(listened, show_progress=False)
    items = model.item_factors.astype(np.float64)
    liked = items[history]
    left = items.T @ items + (baselines.ALS_ALPHA - 1) * liked.T @ liked + baselines.ALS_REGULARIZATION * np.eye(items.shape[1])
    user = np.linalg.solve(left, baselines.ALS_ALPHA * liked.sum(axis=0))
    np.testing.assert_allclose(first[0], items @ user, atol=2e-3)


def test_training_positives_leave_out_the_future_held_out_users_and_held_out_songs():
    songs = dataclasses.replace(made_up(6), ids=SONGS, splits=SPLITS)
    events = log(
        ("u", "a", 1, "train"),
        ("u", "b", -1, "train"),
        ("u", "b", 1, "validation"),
        ("u", "a", 1, "test"),
        ("u", "d", 1, "train"),
        ("HELD", "a", 1, "train"),
    )
    assert training_positives(songs, events, "test")[["song_id", "period"]].to_numpy().tolist() == [["a", "train"], ["b", "validation"]]
    assert training_positives(songs, events, "validation")["song_id"].tolist() == ["a"]


def test_a_cold_song_is_as_popular_as_its_genre():
    songs = dataclasses.replace(
        made_up(6), splits=SPLITS, metadata=metadata(6, genre=[["rock"], ["rock"], ["jazz"], ["rock"], ["jazz"], None])
    )
    found = baselines.genre_popularity(songs, np.array([4.0, 2.0, 9.0, 7.0, 0.0, 0.0]))
    assert found.tolist() == [3, 3, 0, 3, 0, 0], "mean of training songs only; no training song is jazz"


def test_genre_vectors_compare_labels():
    songs = dataclasses.replace(made_up(4), metadata=metadata(4, genre=[["rock"], ["jazz", "rock"], ["jazz"], None]))
    cosines = baselines.genre_vectors(songs) @ baselines.genre_vectors(songs).T
    expected = [[1, 0.5**0.5, 0, 0], [0.5**0.5, 1, 0.5**0.5, 0], [0, 0.5**0.5, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


def test_item_auc_equals_scikit_learn_song_by_song():
    generator = np.random.default_rng(0)
    scores = np.round(generator.normal(size=(30, 6)), 1)  # ties
    positive = [generator.choice(30, 8, replace=False) for _ in range(6)]
    negative = [np.setdiff1d(np.arange(30), users)[:12] for users in positive]
    asked = ItemQuestions(np.arange(6), [np.array([0])] * 30, positive, negative)
    found = item_auc(asked, lambda histories, songs: scores[:, songs])
    for song in range(6):
        users = np.r_[positive[song], negative[song]]
        assert found[song] == pytest.approx(roc_auc_score(np.isin(users, positive[song]), scores[users, song]))
    same = item_auc(asked, baselines.shared_scorer(generator.random(6)))
    assert same.tolist() == [0.5] * 6, "what is equal for all users tells none apart"


def item_log(feedback: bool) -> pd.DataFrame:
    rows = [(f"U{i}", "a", 1, "train") for i in range(8)]
    rows += [(f"U{i}", "d", 1, "test") for i in range(3)]
    rows += [(f"U{i}", "d", -1, "test") for i in range(3, 5)] if feedback else []
    rows += [("U7", "d", 1, "train"), ("U7", "d", 1, "test"), ("NO_HISTORY", "d", 1, "test"), ("known", "a", 1, "train")]
    return log(*rows)


@pytest.mark.parametrize(("feedback", "negatives"), [(True, ["U3", "U4"]), (False, ["U3", "U4", "U5", "U6"])])
def test_negatives_were_exposed_or_are_all_others(feedback: bool, negatives: list[str]):
    """U7 met the song before the period, one user has no history, and known users are asked apart."""
    settings = EvaluateSettings(min_item_users=2)
    cold = SPLITS == "test"
    asked = item_questions(SONGS, cold, cold, item_log(feedback), settings)
    users = [f"U{i}" for i in range(8)]
    assert asked.songs.tolist() == [3]
    assert [users[i] for i in asked.positive[0]] == ["U0", "U1", "U2"]
    assert [users[i] for i in asked.negative[0]] == negatives
    assert not len(item_questions(SONGS, cold, cold, item_log(feedback), EvaluateSettings()).songs), "five of each are needed by default"


def test_gini_in_closed_form():
    assert gini(np.full(7, 3)) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 10])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 2, 3, 4])) == pytest.approx(0.25)
    assert gini(np.zeros(3)) == 0


def test_breadth_of_lists_written_out():
    lists = Lists([np.array([0, 1]), np.array([0, 2]), np.array([0])], np.array(["x", "x", "y", "z"]), np.array([4.0, 3.0, 2.0, 1.0]))
    found = {name: item.value for name, item in breadth(lists, 2, bootstrap.draw(list("abc"), 100, 0)).items()}
    assert found["coverage@2"] == 3 / 4
    assert found["gini@2"] == pytest.approx(gini(np.array([3, 1, 1, 0])))
    assert found["artist_diversity@2"] == pytest.approx((0.5 + 1 + 1) / 3)
    assert found["popularity_lift@2"] == pytest.approx(np.mean([0.875, 0.75, 1.0]) / 0.625)


def test_the_best_are_picked_and_ties_at_the_end_drawn():
    scores, candidate = np.array([5.0, 1.0, 1.0, 1.0, 9.0]), np.array([True, True, True, True, False])
    picked = [tuple(sorted(pick(scores, candidate, 2, user, 0).tolist())) for user in range(60)]
    assert set(picked) == {(0, 1), (0, 2), (0, 3)}, "the best of theirs, and one of three equals"
    assert pick(scores, candidate, 2, 5, 0).tolist() == pick(scores, candidate, 2, 5, 0).tolist()
    assert sorted(pick(scores, candidate, 9, 0, 0).tolist()) == [0, 1, 2, 3]
