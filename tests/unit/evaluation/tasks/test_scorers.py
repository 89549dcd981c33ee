"""Scorers of the recommendation tasks against dense references and closed forms."""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics.pairwise import cosine_similarity

from htcl_ray.evaluation.tasks import scorers
from htcl_ray.evaluation.tasks.recommendation_queries import training_positives
from tests.worlds.evaluation_songs import made_up, metadata
from tests.worlds.recommendation_logs import SONGS, SPLITS, histories, log

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
    with warnings.catch_warnings(action="ignore"):  # of its own, about a conversion inside it
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


def test_the_mean_of_an_artist_is_over_training_songs_alone():
    """Songs 3, 4 and 5 are held out: of a known artist, of an unknown artist with a genre, and of no known label."""
    songs = dataclasses.replace(
        made_up(6),
        splits=SPLITS,
        metadata=metadata(
            6,
            artist=["Ann", "Ben", "Ann", "Ann", "Cy", None],
            genre=[["rock"], ["jazz"], ["rock"], ["folk"], ["jazz", "rock"], None],
        ),
    )
    vectors = np.array([[3, 4], [0, 2], [9, 9], [7, 0], [5, 5], [1, 1]], dtype=np.float32)
    assert scorers.of_known_artists(songs).tolist() == [True, True, True, True, False, False]
    np.testing.assert_allclose(scorers.artist_means(songs, vectors)[3:], [[0.6, 0.8], [0, 1], [0, 0]], atol=1e-6)
    history = histories([0], [1], songs=6)
    np.testing.assert_allclose(
        scorers.artist_mean_scorer(songs, vectors)(history, np.array([3, 4])), [[1, 0.8], [0.8, 1]], atol=1e-6
    )


def test_the_mean_of_an_artist_averages_several_songs():
    songs = dataclasses.replace(made_up(6), splits=SPLITS, metadata=metadata(6, artist=["Ann", "Ann", *"bcd", "Ann"]))
    vectors = np.array([[1, 0], [0, 1], [5, 5], [5, 5], [5, 5], [-1, 0]], dtype=np.float32)
    np.testing.assert_allclose(scorers.artist_means(songs, vectors)[5], [0.5**0.5, 0.5**0.5], atol=1e-6)
