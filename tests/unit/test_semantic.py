"""Text ↔ sound retrieval on vectors whose answers are known."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from htcl_ray.evaluation import bootstrap, semantic
from htcl_ray.settings import EvaluateSettings
from tests.evaluation_songs import encode_genre, made_up, unit

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)


def test_rank_equals_naive_reference_in_any_chunk():
    generator = np.random.default_rng(0)
    queries, gallery = unit(generator.normal(size=(17, 8))), unit(generator.normal(size=(60, 8)))
    query_group, gallery_group = generator.permutation(17), np.r_[np.arange(17), generator.integers(0, 17, 43)]
    scores = queries @ gallery.T
    expected = []
    for row, group in zip(scores, query_group, strict=True):
        order = np.argsort(-row)
        expected.append(1 + min(place for place, item in enumerate(order) if gallery_group[item] == group))
    for cells in (1, 150, 10_000):
        assert semantic.first_correct_rank(queries, gallery, query_group, gallery_group, cells=cells).tolist() == expected


def test_a_collapsed_model_is_at_chance_and_not_shown():
    songs = made_up()
    flat = np.ones((len(songs.ids), 8), dtype=np.float32) / np.sqrt(8, dtype=np.float32)
    tasks = semantic.semantic_tasks(
        dataclasses.replace(songs, spaces={"semantic": flat}), lambda texts: {"semantic": flat[: len(texts)]}, SETTINGS
    )
    for task in tasks[:2]:
        ours, chance = task.methods["semantic"], task.methods["random"]
        assert ours["median_rank"].value == pytest.approx(chance["median_rank"].value, rel=0.4)
        assert ours["recall@1"].value == 0
    zero_shot = next(task for task in tasks if task.name == "zero_shot_genre")
    assert zero_shot.methods["semantic"]["accuracy"].value == pytest.approx(0.25)
    assert bootstrap.is_shown(bootstrap.difference(*(zero_shot.methods[name]["accuracy"] for name in ("semantic", "random")))) is False


def test_tied_rank_is_its_mean_over_random_orders():
    generator = np.random.default_rng(3)
    group = np.array([0, 0, 1, 1, 1])
    same = np.ones((5, 2), dtype=np.float32)
    rank = semantic.first_correct_rank(same[:1], same, np.array([0]), group)[0]
    drawn = [1 + np.flatnonzero(generator.permutation(group) == 0)[0] for _ in range(20_000)]
    assert rank == pytest.approx(np.mean(drawn), abs=0.03)


def test_identical_texts_are_one_correct_set():
    songs = made_up(8)
    vectors = np.zeros((8, 2), dtype=np.float32)
    vectors[1::2] = unit(np.array([[0.5, 1.0], [1.0, 0.1], [0.1, 1.0], [0.1, 1.0]]))  # the first is nearer to the other text
    songs = dataclasses.replace(songs, texts=["x", "a", "x", "a", "x", "b", "x", "b"], spaces={"semantic": vectors})
    to_audio, to_text = semantic.semantic_tasks(
        songs,
        lambda texts: {"semantic": np.eye(2, dtype=np.float32)[[ord(t[0]) - 97 for t in texts]]},
        EvaluateSettings(ks=(1, 2), probe_columns=(), resamples=100),
    )
    assert to_audio.counts == {"unique_texts": 2, "songs": 4}
    assert to_audio.methods["semantic"]["recall@1"].value == 1
    assert to_audio.methods["semantic"]["recall@1"].n == 2
    assert to_text.methods["semantic"]["recall@1"].n == 4
    assert to_text.methods["semantic"]["recall@1"].value == pytest.approx(3 / 4)
    assert to_text.methods["random"]["recall@1"].value == pytest.approx(1 / 2)


def test_chance_equals_random_orders():
    generator = np.random.default_rng(5)
    correct = np.array([1, 1, 3, 8])
    drawn = np.array([[1 + generator.permutation(30)[:count].min() for count in correct] for _ in range(4000)]).ravel()
    expected = semantic.chance_figures(30, correct, (1, 5, 50), bootstrap.draw(list("abcd"), 100, 0))
    assert expected["recall@1"].value == pytest.approx((drawn <= 1).mean(), abs=0.01)
    assert expected["recall@5"].value == pytest.approx((drawn <= 5).mean(), abs=0.015)
    assert expected["recall@50"].value == pytest.approx(1)
    assert expected["mrr"].value == pytest.approx((1 / drawn).mean(), abs=0.01)
    assert expected["median_rank"].value == pytest.approx(np.median(drawn), abs=1)


def test_rank_figures():
    draws = bootstrap.draw(list("abc"), 100, 0)
    found = semantic.rank_figures(np.array([1.0, 2.0, 4.0]), (1, 3), draws)
    values = {name: item.value for name, item in found.items()}
    assert values == {"recall@1": pytest.approx(1 / 3), "recall@3": pytest.approx(2 / 3), "mrr": pytest.approx(1.75 / 3), "median_rank": 2}


def test_the_true_vectors_are_shown_and_the_shuffled_ones_are_not():
    songs = made_up(noise=0.15)
    tasks = {task.name: task for task in semantic.semantic_tasks(songs, encode_genre, SETTINGS)}
    assert list(tasks) == ["text_to_audio", "audio_to_text", "zero_shot_genre", "probe_genre", "zero_shot_tags", "probe_tags"]
    methods = tasks["text_to_audio"].methods
    assert bootstrap.is_shown(bootstrap.difference(methods["semantic"]["recall@10"], methods["random"]["recall@10"]))
    assert bootstrap.is_shown(bootstrap.difference(methods["shuffled"]["recall@10"], methods["random"]["recall@10"])) is False
    assert tasks["zero_shot_genre"].methods["semantic"]["accuracy"].value > 0.9


def test_the_same_twice_is_the_same():
    first, second = (semantic.semantic_tasks(made_up(), encode_genre, SETTINGS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for method, figures in one.methods.items():
            for name, item in figures.items():
                assert item.value == other.methods[method][name].value
                np.testing.assert_array_equal(item.resampled, other.methods[method][name].resampled)
