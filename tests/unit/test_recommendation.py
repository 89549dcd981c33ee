"""Who is asked about which songs, and what the controls answer, on logs of a few rows and on worlds with known taste."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from htcl_ray.evaluation import baselines
from htcl_ray.evaluation.recommendation import (
    blended_scores,
    cold_start_task,
    evaluate_scores,
    mean_over_users,
    user_vectors,
    vector_scores,
)

pytestmark = pytest.mark.unit

SONGS = ["a", "b", "c", "d", "e", "f"]
SPLITS = ["train", "train", "validation", "test", "test", "test"]


def log(*rows: tuple) -> pd.DataFrame:
    """Rows of user, song, value, period and, optionally, trigger; users in capitals are held out."""
    table = pd.DataFrame([(*row, None)[:5] for row in rows], columns=["user_id", "song_id", "value", "period", "trigger_song_id"])
    table["timestamp"] = table["period"].map({"train": 1.0, "validation": 2.0, "test": 3.0})
    table["held_out_user"] = table["user_id"].str.isupper()
    return table


def test_history_targets_and_candidates():
    events = log(
        ("U", "a", 1, "train"),
        ("U", "a", 1, "validation"),  # the same song again
        ("U", "b", -1, "train"),  # not received positively
        ("U", "c", 1, "validation"),
        ("U", "d", 1, "train"),  # a held-out song before the cut: met, no history
        ("U", "d", 1, "test"),  # so no target either
        ("U", "e", 1, "test"),
        ("U", "f", -1, "test"),  # a candidate, no target
        ("U", "b", 1, "test"),  # no held-out song
    )
    task = cold_start_task(SONGS, SPLITS, events)
    assert task.users == ["U"]
    assert task.cold.tolist() == [3, 4, 5]
    assert [rows.tolist() for rows in task.history] == [[0, 2]]
    assert [rows.tolist() for rows in task.targets] == [[1]]
    assert [rows.tolist() for rows in task.met] == [[0]]
    figures = evaluate_scores(task, lambda rows: np.array([[9.0, 2.0, 1.0]]), (1,))
    assert figures["hit_rate@1"].tolist() == [1.0]  # the met song ranks first by score but is no candidate


def test_a_song_met_as_trigger_is_no_candidate():
    task = cold_start_task(SONGS, SPLITS, log(("U", "a", 1, "train", "f"), ("U", "e", 1, "test"), ("U", "f", 1, "test")))
    assert [rows.tolist() for rows in task.targets] == [[1]]
    assert [rows.tolist() for rows in task.met] == [[2]]


def test_who_is_left_out_is_counted():
    events = log(
        ("U", "a", 1, "train"),
        ("U", "d", 1, "test"),
        ("NO_HISTORY", "d", 1, "test"),
        ("LATE", "a", 1, "test"),
        ("LATE", "d", 1, "test"),
        ("NO_TARGET", "a", 1, "train"),
        ("seen", "a", 1, "train"),  # not held out
        ("seen", "d", 1, "test"),
        ("U", "gone", 1, "test"),  # not in the catalogue
    )
    counts = cold_start_task(SONGS, SPLITS, events).counts
    assert counts == {
        "users": 1,
        "cold_songs": 3,
        "targets": 1,
        "history_songs": 1,
        "users_with_short_history": 2,
        "users_without_target": 1,
        "events_of_unknown_songs": 1,
    }
    assert cold_start_task(SONGS, SPLITS, events, min_history=2).users == []


def test_the_validation_period_ends_and_uses_only_what_came_before_it():
    songs, splits = [*SONGS, "g"], [*SPLITS, "validation"]
    events = log(
        ("U", "a", 1, "train"), ("U", "b", 1, "validation"), ("U", "c", 1, "validation"), ("U", "d", 1, "test"), ("U", "g", 1, "test")
    )
    task = cold_start_task(songs, splits, events, split="validation")
    assert [rows.tolist() for rows in task.history] == [[0]]
    assert task.cold.tolist() == [2, 6]
    assert task.cold[task.targets[0]].tolist() == [2]


def test_logs_without_times_use_all_positives():
    events = log(("U", "a", 3, "train"), ("U", "d", 1, "train"), ("U", "e", -1, "train"))
    events["timestamp"] = np.nan
    task = cold_start_task(SONGS, SPLITS, events)
    assert [rows.tolist() for rows in task.history] == [[0]]
    assert [rows.tolist() for rows in task.targets] == [[0]]
    assert [rows.tolist() for rows in task.met] == [[]]


def test_user_vector_is_the_unit_norm_mean():
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    found = user_vectors(vectors, [np.array([0, 1]), np.array([1]), np.array([0, 2])])
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5], [0, 1], [0, 0]], atol=1e-12)


@pytest.fixture(scope="module")
def world() -> tuple[list[str], list[str], np.ndarray, pd.DataFrame]:
    """400 songs around 8 directions; 60 held-out users who like two of them, by vector."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(8, 16))
    kind = generator.integers(0, 8, 400)
    vectors = centres[kind] + 0.3 * generator.normal(size=(400, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    songs = [f"s{i}" for i in range(400)]
    splits = ["test" if i % 4 == 0 else "train" for i in range(400)]
    rows = []
    for user in range(60):
        liked = generator.choice(8, 2, replace=False)
        for song in generator.choice(400, 60, replace=False):
            period = "test" if splits[song] == "test" else "train"
            rows.append((f"U{user}", songs[song], 1 if kind[song] in liked else -1, period))
    return songs, splits, vectors, log(*rows)


def test_vectors_of_taste_beat_every_control_and_controls_are_at_chance(world: tuple):
    songs, splits, vectors, events = world
    task = cold_start_task(songs, splits, events)
    real = mean_over_users(evaluate_scores(task, vector_scores(task, vectors), (10,)))
    random = mean_over_users(evaluate_scores(task, baselines.random_scores(task), (10,)))
    shuffled = mean_over_users(baselines.shuffled_metrics(task, vectors, (10,), seed=0))
    assert real["auc"] > 0.8
    assert real["ndcg@10"] > 2 * random["ndcg@10"]
    assert random["auc"] == pytest.approx(0.5)
    assert shuffled["auc"] == pytest.approx(0.5, abs=0.02)
    assert shuffled["ndcg@10"] == pytest.approx(random["ndcg@10"], rel=0.25)
    again = mean_over_users(baselines.shuffled_metrics(task, vectors, (10,), seed=0))
    assert again == shuffled


def test_random_control_equals_the_mean_of_many_random_orders(world: tuple):
    songs, splits, _, events = world
    task = cold_start_task(songs, splits, events)
    exact = mean_over_users(evaluate_scores(task, baselines.random_scores(task), (10,)))
    generator = np.random.default_rng(1)
    draws = []
    for _ in range(60):
        drawn = generator.random((len(task.users), len(task.cold)))
        draws.append(mean_over_users(evaluate_scores(task, lambda rows, drawn=drawn: drawn[rows], (10,))))
    for name, value in exact.items():
        assert value == pytest.approx(np.mean([draw[name] for draw in draws]), rel=0.08), name


def test_blend_is_the_weighted_mean_of_scores(world: tuple):
    songs, splits, vectors, events = world
    task = cold_start_task(songs, splits, events)
    first, second = vector_scores(task, vectors), vector_scores(task, vectors[::-1])
    rows = slice(3, 9)
    np.testing.assert_allclose(blended_scores(first, second, 0.25)(rows), 0.75 * first(rows) + 0.25 * second(rows))


def test_genre_popularity():
    events = log(
        ("u", "a", 1, "train"),
        ("v", "a", 1, "train"),
        ("v", "b", 1, "train"),
        ("v", "b", -1, "train"),  # not positive
        ("HELD_OUT", "b", 1, "train"),
        ("u", "b", 1, "test"),  # too late
        ("u", "d", 1, "train"),  # a held-out song
    )
    genres = ["rock", "jazz", "rock", "rock", "jazz", "folk"]
    found = baselines.genre_popularity(SONGS, SPLITS, genres, events, "test")
    assert found.tolist() == [2, 1, 2, 2, 1, 0]
    task = cold_start_task(SONGS, SPLITS, log(("U", "a", 1, "train"), ("U", "d", 1, "test")))
    assert baselines.shared_scores(task, found)(slice(0, 5)).tolist() == [[2, 1, 0]]
