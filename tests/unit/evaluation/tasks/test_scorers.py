"""Scorers, item AUC and list metrics against dense references, closed forms and scikit-learn."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.tasks import scorers
from htcl_ray.evaluation.tasks.item_auc import ItemQueries, item_auc, item_queries
from htcl_ray.evaluation.tasks.list_coverage import gini, list_metrics, top_k
from htcl_ray.evaluation.tasks.recommendation_queries import training_positives, user_activity
from htcl_ray.evaluation.tasks.scorers import shared_scorer
from tests.unit.evaluation.tasks.test_recommendation import SONGS, SPLITS, columns_of_rows, histories, log
from tests.worlds.evaluation_songs import made_up, metadata

pytestmark = pytest.mark.unit


def test_item_knn_equals_the_dense_cosine():
    generator = np.random.default_rng(0)
    listened = sparse.csr_matrix((generator.random((30, 12)) < 0.3).astype(np.float32))
    dense = cosine_similarity(listened.T.toarray())
    np.fill_diagonal(dense, 0)
    users, candidates = histories([0, 3], [7], songs=12), np.array([1, 2, 3, 7])
    for neighbors in (100, 3):
        pruned = np.zeros_like(dense)
        for song in range(12):
            nearest = sorted(range(12), key=lambda other, song=song: (-np.float32(dense[song, other]), other))[
                :neighbors
            ]
            pruned[song, nearest] = dense[song, nearest]
        expected = np.stack([pruned[rows][:, candidates].sum(axis=0) for rows in ([0, 3], [7])])
        np.testing.assert_allclose(scorers.item_knn_scorer(listened, neighbors)(users, candidates), expected, atol=1e-6)


def test_item_knn_equals_implicit_where_no_tie_is_cut():
    """`implicit` keeps arbitrary ones of equally near neighbours, so the two are compared without a limit."""
    from implicit.nearest_neighbours import CosineRecommender

    generator = np.random.default_rng(1)
    interactions = sparse.csr_matrix((generator.random((60, 80)) < 0.1).astype(np.float32))
    history = sparse.csr_matrix(generator.random((9, 80)) < 0.1)
    model = CosineRecommender(K=80, num_threads=1)
    model.fit(interactions, show_progress=False)
    cosines = model.similarity.toarray()
    np.fill_diagonal(cosines, 0)
    scores = scorers.item_knn_scorer(interactions)(history, np.arange(80))
    np.testing.assert_allclose(scores, history.toarray().astype(np.float64) @ cosines, atol=1e-5)


def test_als_folds_in_users_by_the_closed_form():
    """(YᵀY + Σ (α − 1) y yᵀ + λI)⁻¹ Σ α y over the history (Hu, Koren and Volinsky 2008, equation 4, confidence α)."""
    generator = np.random.default_rng(0)
    listened = sparse.csr_matrix((generator.random((40, 20)) < 0.3).astype(np.float32))
    history = np.array([2, 5, 11])
    first, second = (
        scorers.als_scorer(listened, seed=1)(histories(history.tolist(), songs=20), np.arange(20)) for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)
    from implicit.cpu.als import AlternatingLeastSquares

    model = AlternatingLeastSquares(
        factors=scorers.als_factors(40),
        regularization=scorers.ALS_REGULARIZATION,
        alpha=scorers.ALS_ALPHA,
        iterations=scorers.ALS_ITERATIONS,
        num_threads=1,
        random_state=1,
    )
    model.fit(listened, show_progress=False)
    items = model.item_factors.astype(np.float64)
    liked = items[history]
    left = (
        items.T @ items
        + (scorers.ALS_ALPHA - 1) * liked.T @ liked
        + scorers.ALS_REGULARIZATION * np.eye(items.shape[1])
    )
    user = np.linalg.solve(left, scorers.ALS_ALPHA * liked.sum(axis=0))
    np.testing.assert_allclose(first[0], items @ user, atol=2e-3)


def test_training_positives_exclude_the_future_and_held_out_users_and_songs():
    songs = dataclasses.replace(made_up(6), ids=SONGS, splits=SPLITS)
    events = log(
        ("u", "a", 1, "train"),
        ("u", "b", -1, "train"),
        ("u", "b", 1, "validation"),
        ("u", "a", 1, "test"),
        ("u", "d", 1, "train"),
        ("HELD", "a", 1, "train"),
    )
    assert training_positives(songs, events, "test")[["song_id", "period"]].to_numpy().tolist() == [
        ["a", "train"],
        ["b", "validation"],
    ]
    assert training_positives(songs, events, "validation")["song_id"].tolist() == ["a"]


def test_a_cold_song_is_as_popular_as_its_genre():
    songs = dataclasses.replace(
        made_up(6), splits=SPLITS, metadata=metadata(6, genre=[["rock"], ["rock"], ["jazz"], ["rock"], ["jazz"], None])
    )
    actual = scorers.genre_popularity(songs, np.array([4.0, 2.0, 9.0, 7.0, 0.0, 0.0]))
    assert actual.tolist() == [3, 3, 0, 3, 0, 0], "mean of training songs only; no training song is jazz"


def test_genre_vectors_compare_labels():
    songs = dataclasses.replace(made_up(4), metadata=metadata(4, genre=[["rock"], ["jazz", "rock"], ["jazz"], None]))
    cosines = scorers.genre_vectors(songs) @ scorers.genre_vectors(songs).T
    expected = [[1, 0.5**0.5, 0, 0], [0.5**0.5, 1, 0.5**0.5, 0], [0, 0.5**0.5, 1, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(cosines, expected, atol=1e-6)


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


def test_gini_in_closed_form():
    assert gini(np.full(7, 3)) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 10])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 2, 3, 4])) == pytest.approx(0.25)
    assert gini(np.zeros(3)) == 0


def test_list_metrics_match_hand_computed_values():
    lists, met = histories([0, 1], [0, 2], [0], songs=4), histories([], [3], [], songs=4)
    popularity = np.array([4.0, 3.0, 2.0, 1.0])
    draws = bootstrap.draw_two_way(list("abc"), ["x", "x", "y", "z"], 100, 0)
    actual = {
        name: item.value
        for name, item in list_metrics([lists], met, np.array(["x", "x", "y", "z"]), popularity, 2, draws).items()
    }
    assert actual["coverage@2"] == 3 / 4
    assert actual["gini@2"] == pytest.approx(gini(np.array([3, 1, 1, 0])))
    assert actual["artist_diversity@2"] == pytest.approx((0.5 + 1 + 1) / 3)
    percentiles = np.array([0.875, 0.625, 0.375, 0.125])
    lifts = [
        percentiles[[0, 1]].mean() / 0.5,
        percentiles[[0, 2]].mean() / percentiles[:3].mean(),
        percentiles[0] / 0.5,
    ]
    assert actual["popularity_lift@2"] == pytest.approx(np.mean(lifts))
    twice = list_metrics(
        [lists, histories([0, 1], [0, 1], [0, 1], songs=4)], met, np.array(["x", "x", "y", "z"]), popularity, 2, draws
    )
    assert twice["coverage@2"].value == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_top_k_lists_the_best_and_draws_among_ties():
    scores, candidate = np.array([[5.0, 1.0, 1.0, 1.0, 9.0]] * 60), np.array([[True, True, True, True, False]] * 60)
    listed = columns_of_rows(top_k(scores, candidate, 2, seed=0))
    assert {tuple(row) for row in listed} == {(0, 1), (0, 2), (0, 3)}, "the best candidate, and one of three tied ones"
    assert columns_of_rows(top_k(scores[:5], candidate[:5], 2, seed=0, first_user=30)) == listed[30:35], (
        "whatever block a user is in"
    )
    assert columns_of_rows(top_k(scores, candidate, 9, seed=0))[0] == [0, 1, 2, 3]
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(20, 50))
    expected = [sorted(np.argsort(-row)[:7].tolist()) for row in drawn]
    assert columns_of_rows(top_k(drawn, np.ones(drawn.shape, dtype=bool), 7, seed=0)) == expected
