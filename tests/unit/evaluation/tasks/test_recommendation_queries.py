"""Queries and item AUC of random logs against loops over their rows, and events that methods must not use."""

from __future__ import annotations

import sys

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.tasks.item_auc import item_auc, item_queries
from htcl_ray.evaluation.tasks.recommendation import recommendation_tasks
from htcl_ray.evaluation.tasks.recommendation_queries import user_activity, user_queries
from htcl_ray.evaluation.tasks.scorers import vector_scorer
from tests.worlds.evaluation_songs import unit
from tests.worlds.recommendation_logs import Listeners, columns_of_rows, log

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)
SONGS = [f"s{i:02}" for i in range(24)]
SPLITS = np.array(["train", "test", "validation"])[np.arange(24) % 3]
COLD = SPLITS == "test"


def random_log(seed: int, feedback: bool, timeless: bool) -> pd.DataFrame:
    generator = np.random.default_rng(seed)
    events = log(
        *(
            (
                f"{'U' if generator.random() < 0.5 else 'u'}{generator.integers(40)}",
                f"s{generator.integers(26):02}",  # two songs are not in the catalogue
                float(generator.choice([-1, 0, 1, 2] if feedback else [1, 2])),
                str(generator.choice(["train", "validation", "test"], p=[0.3, 0.2, 0.5])),
                f"s{generator.integers(26):02}" if generator.random() < 0.3 else None,
            )
            for _ in range(1800)
        )
    )
    return events.assign(timestamp=np.nan) if timeless else events


class UserEvents:
    """What one user of a log met and liked, event by event."""

    def __init__(self, events: pd.DataFrame, user: str, timeless: bool) -> None:
        self.history, self.met, self.liked, self.exposed = (set() for _ in range(4))
        for event in events[events["user_id"] == user].itertuples():
            early, late = timeless or event.period != "test", timeless or event.period == "test"
            if early and not timeless:
                self.met |= {event.song_id, event.trigger_song_id}
            if early and event.value > 0 and event.song_id in SONGS and SPLITS[SONGS.index(event.song_id)] != "test":
                self.history.add(event.song_id)
            if late:
                self.exposed.add(event.song_id)
                if event.value > 0:
                    self.liked.add(event.song_id)


CASES = [
    (feedback, timeless, known) for feedback in (False, True) for timeless in (False, True) for known in (False, True)
]


@pytest.mark.parametrize(("feedback", "timeless", "known"), CASES)
def test_user_queries_match_a_loop_over_the_events(feedback: bool, timeless: bool, known: bool):
    events = random_log(0, feedback, timeless)
    candidates = COLD if timeless else ~COLD & (np.arange(24) % 2 == 0)
    settings = EvaluateSettings(min_history=3)
    queries = user_queries(user_activity(SONGS, COLD, events, "test"), candidates, settings, known_users=known)
    names = [song for song, is_candidate in zip(SONGS, candidates, strict=True) if is_candidate]
    expected = {}
    for user in sorted(set(events["user_id"])):
        events_of = UserEvents(events, user, timeless)
        targets = {song for song in events_of.liked - events_of.met if song in names}
        if user.isupper() != known and len(events_of.history) >= 3 and targets:
            expected[user] = (events_of.history, targets, {song for song in events_of.met if song in names})
    assert queries.users == list(expected)
    assert queries.users
    for part, ids_of, marks in ((0, SONGS, queries.history), (1, names, queries.targets), (2, names, queries.met)):
        assert [{ids_of[place] for place in row} for row in columns_of_rows(marks)] == [
            sets[part] for sets in expected.values()
        ]


@pytest.mark.parametrize(("feedback", "timeless", "known"), CASES)
def test_item_auc_matches_loops_over_songs_and_users(feedback: bool, timeless: bool, known: bool):
    events = random_log(1, feedback, timeless)
    vectors = unit(np.random.default_rng(2).normal(size=(24, 4)))
    queries = item_queries(
        user_activity(SONGS, COLD, events, "test"),
        COLD,
        EvaluateSettings(min_item_users=2, min_history=2),
        known_users=known,
    )
    aucs = dict(zip(queries.songs.tolist(), item_auc(queries, vector_scorer(vectors))[0], strict=True))
    events_of = {
        user: UserEvents(events, user, timeless) for user in sorted(set(events["user_id"])) if user.isupper() != known
    }
    expected = {}
    for row in np.flatnonzero(COLD).tolist():
        labels, scores = [], []
        for one in events_of.values():
            if len(one.history) < 2 or SONGS[row] in one.met or (feedback and SONGS[row] not in one.exposed):
                continue
            mean = vectors[[SONGS.index(song) for song in one.history]].mean(axis=0)
            labels.append(SONGS[row] in one.liked)
            scores.append(vectors[row] @ mean / np.linalg.norm(mean))
        if min(sum(labels), len(labels) - sum(labels)) >= 2:
            expected[row] = roc_auc_score(labels, scores)
    assert aucs == pytest.approx(expected)
    assert aucs


def test_users_who_met_a_song_before_are_no_negatives():
    """Without feedback all other users are negatives; here all of them met the song before."""
    events = log(
        *((f"U{i}", "s00", 1, "train") for i in range(6)),
        *((f"U{i}", "s01", 1, "test") for i in range(3)),
        *((f"U{i}", "s01", 1, "train") for i in range(3, 6)),
    )
    activity = user_activity(SONGS, COLD, events, "test")
    assert not len(item_queries(activity, COLD, EvaluateSettings(min_item_users=1)).songs)


def test_events_on_cold_songs_before_the_period_are_hidden_from_every_method(listeners: Listeners):
    """Early events of training users on held-out songs do not change the metrics of new users."""
    cold = [song for song, split in zip(listeners.songs.ids, listeners.songs.splits, strict=True) if split == "test"]
    early = log(*((f"early{i}", song, 1.0, "train") for i in range(5) for song in cold[:20]))
    before, after = (
        recommendation_tasks(listeners.songs, events, SETTINGS)[0]
        for events in (listeners.log, pd.concat([listeners.log, early], ignore_index=True))
    )
    assert before.methods.keys() == after.methods.keys()
    for method, metrics in before.methods.items():
        assert {name: item.value for name, item in metrics.items()} == {
            name: item.value for name, item in after.methods[method].items()
        }


def test_max_users_limits_queries_and_the_rest_is_counted(listeners: Listeners):
    settings = SETTINGS.model_copy(update={"max_users": 12})
    every = recommendation_tasks(listeners.songs, listeners.log, SETTINGS)
    for all_of_them, task in zip(every, recommendation_tasks(listeners.songs, listeners.log, settings), strict=True):
        assert task.methods["random"]["mrr"].n == task.counts["users"] == 12
        assert task.counts["users"] + task.counts["users_not_drawn"] == all_of_them.counts["users"]


def test_without_implicit_als_is_left_out_and_counted(listeners: Listeners, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "implicit.cpu.als", None)
    tasks = {task.name: task for task in recommendation_tasks(listeners.songs, listeners.log, SETTINGS)}
    assert tasks["hot"].counts["als_missing"] == 1
    assert "als_missing" not in tasks["cold"].counts
    assert "als" not in tasks["hot"].methods
    assert "item_knn" in tasks["hot"].methods


def test_methods_have_a_fixed_order_and_every_metric_has_n(listeners: Listeners):
    tasks = {task.name: task for task in recommendation_tasks(listeners.songs, listeners.log, SETTINGS)}
    both = ["semantic", "preference", "blend_0.5", "random", "popularity", "shuffled", "log_mel", "genre"]
    assert list(tasks["cold"].methods) == [*both, "artist_mean"]
    assert list(tasks["hot"].methods) == [*both, "item_knn", "als"]
    for name, task in tasks.items():
        per_user = [f"{metric}@{k}" for k in SETTINGS.ks for metric in ("hit_rate", "recall", "precision", "ndcg")] + [
            "mrr",
            "user_auc",
        ]
        of_lists = [f"{metric}@10" for metric in ("coverage", "gini", "artist_diversity", "popularity_lift")]
        for metrics in task.methods.values():
            assert list(metrics) == per_user + of_lists + (["item_auc"] if name.startswith("cold") else [])
            assert all(metrics[metric].n == task.counts["users"] and metrics[metric].interval for metric in per_user)
            assert metrics["coverage@10"].interval is None
            assert metrics["coverage@10"].n == task.counts["candidates"]
            if "item_auc" in metrics:
                assert metrics["item_auc"].n == task.counts["item_auc_songs"]


@pytest.mark.parametrize("feedback", [True, False])
def test_user_sample_keeps_enough_labels_of_each_song(feedback: bool):
    """40,000 users with 2 songs each of 2,000: 100 users drawn by themselves leave no song with five positive ones."""
    generator = np.random.default_rng(0)
    songs = [f"s{i:04}" for i in range(2_000)] + ["past"]
    cold = np.arange(2_001) < 2_000
    rows = [(f"U{user}", "past", 1.0, "train") for user in range(40_000)]
    for user in range(40_000):
        first, second = generator.integers(2_000, size=2)
        rows += [
            (f"U{user}", songs[first], 1.0, "test"),
            (f"U{user}", songs[second], -1.0 if feedback else 1.0, "test"),
        ]
    activity = user_activity(songs, cold, log(*rows), "test")
    queries = item_queries(activity, cold, EvaluateSettings(max_users=200))
    assert queries.history.shape[0] == len(set(queries.users)) == 200
    assert len(queries.songs) >= 15
    assert queries.positive.getnnz(axis=0).min() >= 5
    assert queries.negative is None or queries.negative.getnnz(axis=0).min() >= 5
    again = item_queries(activity, cold, EvaluateSettings(max_users=200))
    assert (again.users, again.population) == (queries.users, queries.population)
