"""Queries of the recommendation tasks on small logs, and metrics of synthetic users with known taste."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import blended
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.tasks.recommendation import blend_curve, rank_users, recommendation_tasks
from htcl_ray.evaluation.tasks.recommendation_queries import UserQueries, sample_users, user_activity, user_queries
from htcl_ray.evaluation.tasks.scorers import blended_scorer, shared_scorer, user_vectors, vector_scorer
from tests.worlds.evaluation_songs import made_up, unit
from tests.worlds.recommendation_logs import SONGS, SPLITS, Listeners, columns_of_rows, histories, log

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)


def queries_of(
    events: pd.DataFrame,
    *,
    splits: np.ndarray = SPLITS,
    songs: list[str] = SONGS,
    known_users: bool = False,
    **settings,
) -> UserQueries:
    configured = EvaluateSettings(**settings)
    cold = splits == configured.split
    return user_queries(user_activity(songs, cold, events, configured.split), cold, configured, known_users=known_users)


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
    queries = queries_of(events)
    assert queries.users == ["U"]
    assert queries.candidates.tolist() == [3, 4, 5]
    assert columns_of_rows(queries.history) == [[0, 2]]
    assert columns_of_rows(queries.targets) == [[1]]
    assert columns_of_rows(queries.met) == [[0]]
    metrics, lists = rank_users(queries, shared_scorer(np.array([0, 0, 0, 9.0, 2.0, 1.0])), (1,), seed=0)
    assert metrics["hit_rate@1"].values.tolist() == [1.0], "the met song ranks first by score but is no candidate"
    assert columns_of_rows(lists) == [[1]]


def test_songs_met_as_trigger_are_no_candidates():
    queries = queries_of(log(("U", "a", 1, "train", "f"), ("U", "e", 1, "test"), ("U", "f", 1, "test")))
    assert columns_of_rows(queries.targets) == [[1]]
    assert columns_of_rows(queries.met) == [[2]]


def test_excluded_users_are_counted():
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
    assert queries_of(events).counts == {
        "users": 1,
        "candidates": 3,
        "targets": 1,
        "history_songs": 1,
        "users_with_short_history": 2,
        "users_without_target": 1,
        "users_not_drawn": 0,
        "events_of_unknown_songs": 1,
    }
    assert queries_of(events, min_history=2).users == []
    assert queries_of(events, known_users=True).users == ["seen"]


def test_validation_period_uses_only_earlier_events():
    songs, splits = [*SONGS, "g"], np.array([*SPLITS, "validation"])
    events = log(
        ("U", "a", 1, "train"),
        ("U", "b", 1, "validation"),
        ("U", "c", 1, "validation"),
        ("U", "d", 1, "test"),
        ("U", "g", 1, "test"),
    )
    queries = queries_of(events, songs=songs, splits=splits, split="validation")
    assert columns_of_rows(queries.history) == [[0]]
    assert queries.candidates.tolist() == [2, 6]
    assert queries.candidates[columns_of_rows(queries.targets)[0]].tolist() == [2]


def test_logs_without_times_use_all_positives():
    events = log(("U", "a", 3, "train"), ("U", "d", 1, "train"), ("U", "e", -1, "train"))
    events["timestamp"] = np.nan
    queries = queries_of(events)
    assert columns_of_rows(queries.history) == [[0]]
    assert columns_of_rows(queries.targets) == [[0]]
    assert columns_of_rows(queries.met) == [[]]


def test_user_sample_does_not_depend_on_other_users():
    users = [f"u{i}" for i in range(200)]
    kept = {users[row] for row in sample_users(users, 50)}
    assert len(kept) == 50
    fewer = [user for user in users if user in kept or int(user[1:]) % 2]
    assert {fewer[row] for row in sample_users(fewer, 50)} == kept
    assert sample_users(users, None) == sample_users(users, 200) == list(range(200))


def test_user_vectors_are_unit_means():
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    vectors_of_users = user_vectors(vectors, histories([0], [0, 1], [0, 2], songs=3))
    np.testing.assert_allclose(vectors_of_users, [[1, 0], [np.sqrt(0.5), np.sqrt(0.5)], [0, 0]])


def test_the_blended_vectors_inner_product_is_the_weighted_sum_of_both_cosines():
    spaces = made_up(20, preference=True).spaces
    for blend in (0, 0.3, 0.5, 1):
        vectors = blended(spaces, blend)
        expected = (1 - blend) * spaces["semantic"] @ spaces["semantic"].T + blend * spaces["preference"] @ spaces[
            "preference"
        ].T
        np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-6)


def test_blending_is_the_weighted_sum_of_both_cosines():
    generator = np.random.default_rng(0)
    first, second = (vector_scorer(unit(generator.normal(size=(9, 4)))) for _ in range(2))
    history, candidates = histories([0, 1], [2], songs=9), np.arange(3, 9)
    blended = blended_scorer(first, second, 0.3)(history, candidates)
    np.testing.assert_allclose(blended, 0.7 * first(history, candidates) + 0.3 * second(history, candidates))


def test_methods_with_knowledge_of_taste_beat_chance_and_others_do_not(listeners: Listeners):
    tasks = {task.name: task for task in recommendation_tasks(listeners.songs, listeners.log, SETTINGS)}
    assert list(tasks) == ["cold", "cold_known_users", "hot", "hot_known_users"]
    for name, task in tasks.items():
        gain = bootstrap.difference(task.methods["preference"]["ndcg@10"], task.methods["random"]["ndcg@10"])
        assert bootstrap.is_significant(gain), name
        for blind in ("semantic", "shuffled", "log_mel", "genre"):
            assert task.methods[blind]["user_auc"].value == pytest.approx(0.5, abs=0.06), (name, blind)
        assert task.methods["random"]["user_auc"].value == 0.5
        assert task.methods["preference"]["user_auc"].value > 0.85
    for name in ("hot", "hot_known_users"):
        for collaborative in ("item_knn", "als"):
            assert tasks[name].methods[collaborative]["user_auc"].value > 0.7, (name, collaborative)
    for name in ("cold", "cold_known_users"):
        assert not {"item_knn", "als"} & set(tasks[name].methods), "they know nothing of cold songs"
        assert tasks[name].methods["popularity"]["item_auc"].value == 0.5
        assert tasks[name].methods["preference"]["item_auc"].value > 0.85


def test_intervals_include_the_uncertainty_of_the_songs(listeners: Listeners):
    """Twelve artists are held out: with the artists of all songs resampled, intervals are wider than those of users
    alone."""
    queries = queries_of(listeners.log, songs=listeners.songs.ids, splits=listeners.songs.splits)
    task = recommendation_tasks(listeners.songs, listeners.log, SETTINGS)[0]
    assert task.over == "users and artists"
    vectors_of_users, _ = rank_users(queries, vector_scorer(listeners.songs.spaces["preference"]), SETTINGS.ks, 0)
    draws = bootstrap.draw(queries.users, SETTINGS.resamples, SETTINGS.seed)
    for name, metric in vectors_of_users.items():
        both, alone = task.methods["preference"][name], bootstrap.mean(metric.values, draws)
        assert both.value == pytest.approx(alone.value)
        (low, high), (before, after) = both.interval, alone.interval
        assert high - low > 1.05 * (after - before), name
        assert low <= both.value <= high
    assert {
        estimate.population for estimate in task.methods["preference"].values() if estimate.resampled is not None
    } != {""}


def test_new_and_known_users_are_disjoint(listeners: Listeners):
    new, known = (
        queries_of(listeners.log, songs=listeners.songs.ids, splits=listeners.songs.splits, known_users=flag)
        for flag in (False, True)
    )
    assert new.users
    assert known.users
    assert all(user[0] == "U" for user in new.users)
    assert all(user[0] == "u" for user in known.users)


def test_the_blend_curve_begins_at_stage_one_and_ends_at_stage_two(listeners: Listeners):
    curve = blend_curve(listeners.songs, listeners.log, SETTINGS)
    cold = recommendation_tasks(listeners.songs, listeners.log, SETTINGS)[0]
    assert [point["blend"] for point in curve] == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1]
    for place, method in ((0, "semantic"), (5, "blend_0.5"), (10, "preference")):
        assert curve[place]["cold"]["ndcg@10"]["value"] == pytest.approx(cold.methods[method]["ndcg@10"].value)
    stage_one = dataclasses.replace(listeners.songs, spaces={"semantic": listeners.songs.spaces["semantic"]})
    assert blend_curve(stage_one, listeners.log, SETTINGS) == []


def test_hot_songs_have_training_listeners_and_no_task_without_times(listeners: Listeners):
    events = listeners.log
    task = {t.name: t for t in recommendation_tasks(listeners.songs, events, SETTINGS)}["hot"]
    training = events[(events["value"] > 0) & (events["period"] == "train") & ~events["held_out_user"]]
    of_train_split = set(np.array(listeners.songs.ids)[listeners.songs.splits == "train"])
    assert task.counts["candidates"] == len(set(training["song_id"]) & of_train_split)
    timeless = events.assign(timestamp=np.nan)
    assert [t.name for t in recommendation_tasks(listeners.songs, timeless, SETTINGS)] == ["cold", "cold_known_users"]


def test_an_empty_log_has_no_tasks(listeners: Listeners):
    assert recommendation_tasks(listeners.songs, listeners.log[:0], SETTINGS) == []
    assert blend_curve(listeners.songs, listeners.log[:0], SETTINGS) == []
