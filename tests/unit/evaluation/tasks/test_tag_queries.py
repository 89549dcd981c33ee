"""Retrieval by tag queries on vectors and tags with known results."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks import tag_queries as module
from htcl_ray.evaluation.tasks.tag_queries import query_text, tag_queries, tag_query_tasks
from tests.worlds.labelled_songs import songs_of, unit

pytestmark = pytest.mark.unit

GENRES, INSTRUMENTS = ("rock", "jazz", "folk"), ("guitar", "piano", "flute", "harp")
SETTINGS = EvaluateSettings(resamples=100, ks=(1, 5))
PLACE = {tag: i for i, tag in enumerate((*GENRES, *INSTRUMENTS))}


def world(songs: int = 60) -> EvaluatedSongs:
    """Songs with a genre and two instruments, whose vector is the sum of the axes of their tags."""
    generator = np.random.default_rng(0)
    genres = [[GENRES[int(generator.integers(3))]] for _ in range(songs)]
    tags = [generator.choice(INSTRUMENTS, 2, replace=False).tolist() for _ in range(songs)]
    vectors = np.zeros((songs, len(PLACE)))
    for row, of_song in enumerate(zip(genres, tags, strict=True)):
        vectors[row, [PLACE[tag] for part in of_song for tag in part]] = 1
    return songs_of(
        ["train"] * 10 + ["test"] * (songs - 10),
        [f"a{row % 20}" for row in range(songs)],
        unit(vectors),
        genre=genres,
        tags=tags,
    )


def measured(songs: EvaluatedSongs, noise: float = 0.0) -> dict[str, TaskResult]:
    held_out = np.flatnonzero(songs.splits == "test")
    queries = tag_queries(songs, held_out)
    generator = np.random.default_rng(1)

    def vectors(query: tuple[str, ...]) -> np.ndarray:
        vector = noise * generator.normal(size=len(PLACE))
        vector[[PLACE[tag] for tag in query]] += 1
        return vector

    texts = [{"semantic": unit(np.array([vectors(query) for query in of_count]))} for of_count in queries]
    return {task.name: task for task in tag_query_tasks(songs, held_out, queries, texts, SETTINGS)}


def test_queries_are_all_sets_of_tags_that_held_out_songs_have():
    songs = world()
    held_out = np.flatnonzero(songs.splits == "test")
    expected = [set(), set(), set()]
    for row in held_out:
        of_song = [*songs.values("genre")[row], *songs.values("tags")[row]]
        for count in (1, 2, 3):
            expected[count - 1] |= {frozenset(subset) for subset in itertools.combinations(of_song, count)}
    queries = tag_queries(songs, held_out)
    assert [{frozenset(query) for query in of_count} for of_count in queries] == expected
    assert [len(of_count) for of_count in queries] == [len(of_count) for of_count in expected]
    orders = {query.index("guitar") for query in queries[1] if "guitar" in query}
    assert orders == {0, 1}, "tags are in no order of columns"


def test_queries_that_every_song_matches_are_left_out_and_their_number_is_bounded(monkeypatch: pytest.MonkeyPatch):
    songs = songs_of(["test"] * 3, list("abc"), np.eye(3), genre=[["rock"]] * 3, tags=[["piano"], ["harp"], ["harp"]])
    queries = tag_queries(songs, np.arange(3))
    assert [{frozenset(query) for query in of} for of in queries] == [
        {frozenset({"piano"}), frozenset({"harp"})},
        {frozenset({"piano", "rock"}), frozenset({"harp", "rock"})},
        set(),
    ]
    monkeypatch.setattr(module, "MAX_QUERIES", 1)
    assert [len(of_count) for of_count in tag_queries(songs, np.arange(3))] == [1, 1, 0]


def test_precision_equals_counting_by_hand():
    songs = world()
    held_out = np.flatnonzero(songs.splits == "test")
    tasks = measured(songs, noise=0.4)
    queries = tag_queries(songs, held_out)
    generator = np.random.default_rng(1)
    for of_count, task in zip(queries, tasks.values(), strict=True):
        precision = []
        for query in of_count:
            vector = 0.4 * generator.normal(size=len(PLACE))
            vector[[PLACE[tag] for tag in query]] += 1
            first = np.argsort(-(songs.spaces["semantic"][held_out] @ unit(vector[None])[0]), kind="stable")[:5]
            tags = [{*songs.values("genre")[held_out[row]], *songs.values("tags")[held_out[row]]} for row in first]
            precision.append(np.mean([set(query) <= of_song for of_song in tags]))
        assert task.counts == {"queries": len(of_count), "gallery": 50}
        assert task.methods["semantic"]["precision@5"].value == pytest.approx(np.mean(precision))


def test_matching_vectors_are_far_above_chance_and_best_bounds_all_methods():
    for task in measured(world()).values():
        semantic, random, best = (task.methods[name]["precision@5"] for name in ("semantic", "random", "best"))
        assert semantic.value == pytest.approx(best.value)
        assert semantic.value > 2 * random.value
        low, high = semantic.interval or (0, 0)
        assert low <= semantic.value <= high
    one = measured(world())["tag_queries_1"]
    share = np.mean([1 / 3] * 3 + [1 / 2] * 4)
    assert one.methods["random"]["precision@5"].value == pytest.approx(share, abs=0.05)
    assert one.methods["shuffled"]["precision@5"].value == pytest.approx(share, abs=0.1)


def test_a_catalogue_without_tags_has_no_task():
    songs = songs_of(["test"] * 3, list("abc"), np.eye(3))
    queries = tag_queries(songs, np.arange(3))
    assert queries == [[], [], []]
    assert tag_query_tasks(songs, np.arange(3), queries, [{"semantic": np.empty((0, 3))}] * 3, SETTINGS) == []


def test_query_text():
    assert query_text(("sad", "guitar")) == "sad guitar"
