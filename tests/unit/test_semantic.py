"""Text ↔ sound retrieval and the probe, on vectors whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.evaluation import semantic

pytestmark = pytest.mark.unit


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


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


def test_a_collapsed_model_is_at_chance():
    songs = np.ones((9, 4), dtype=np.float32) / 2
    figures = semantic.retrieval(songs, songs[:9], np.arange(9), (1, 5))
    assert figures["text_to_audio"]["median_rank"] == 5
    assert figures["text_to_audio"]["recall@1"] == 0


def test_tied_rank_is_its_mean_over_random_orders():
    generator = np.random.default_rng(3)
    group = np.array([0, 0, 1, 1, 1])
    same = np.ones((5, 2), dtype=np.float32)
    rank = semantic.first_correct_rank(same[:1], same, np.array([0]), group)[0]
    drawn = [1 + np.flatnonzero(generator.permutation(group) == 0)[0] for _ in range(20_000)]
    assert rank == pytest.approx(np.mean(drawn), abs=0.03)


def test_identical_texts_are_one_correct_set():
    texts = unit(np.array([[1.0, 0.0], [0.0, 1.0]]))
    songs = unit(np.array([[0.5, 1.0], [1.0, 0.1], [0.1, 1.0]]))  # the first is nearer to the other text
    figures = semantic.retrieval(songs, texts, np.array([0, 0, 1]), (1, 2))
    assert figures["text_to_audio"]["queries"] == 2
    assert figures["text_to_audio"]["gallery"] == 3
    assert figures["text_to_audio"]["recall@1"] == 1
    assert figures["audio_to_text"]["queries"] == 3
    assert figures["audio_to_text"]["gallery"] == 2
    assert figures["audio_to_text"]["recall@1"] == pytest.approx(2 / 3)
    assert figures["audio_to_text"]["chance"]["recall@1"] == pytest.approx(1 / 2)


def test_chance_equals_random_orders():
    generator = np.random.default_rng(5)
    correct = np.array([1, 1, 3, 8])
    drawn = np.array([[1 + generator.permutation(30)[:count].min() for count in correct] for _ in range(4000)]).ravel()
    expected = semantic.chance(30, correct, (1, 5, 50))
    assert expected["recall@1"] == pytest.approx((drawn <= 1).mean(), abs=0.01)
    assert expected["recall@5"] == pytest.approx((drawn <= 5).mean(), abs=0.015)
    assert expected["recall@50"] == 1
    assert expected["mrr"] == pytest.approx((1 / drawn).mean(), abs=0.01)
    assert expected["median_rank"] == pytest.approx(np.median(drawn), abs=1)


def test_rank_summary():
    summary = semantic.rank_summary(np.array([1.0, 2.0, 4.0]), (1, 3))
    assert summary == {"recall@1": pytest.approx(1 / 3), "recall@3": pytest.approx(2 / 3), "mrr": pytest.approx(1.75 / 3), "median_rank": 2}


def test_probe_reads_a_linear_property_and_only_that():
    generator = np.random.default_rng(0)
    labels = [["rock", "jazz", "folk"][i] for i in generator.integers(0, 3, 300)]
    vectors = generator.normal(size=(300, 16))
    chance = semantic.linear_probe(vectors[:200], labels[:200], vectors[200:], labels[200:])
    assert chance is not None
    assert chance["accuracy"] < 0.5
    for i, label in enumerate(labels):
        vectors[i, ["rock", "jazz", "folk"].index(label)] += 6
    found = semantic.linear_probe(vectors[:200], labels[:200], vectors[200:], labels[200:])
    assert found is not None
    assert found["accuracy"] > 0.95
    commonest = max(set(labels[:200]), key=labels[:200].count)
    assert found["chance"] == pytest.approx(labels[200:].count(commonest) / 100)
    assert (found["classes"], found["train_songs"], found["test_songs"]) == (3, 200, 100)


def test_probe_counts_unseen_labels_as_errors_and_leaves_out_missing_ones():
    vectors = np.array([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1], [0.5, 0.5]])
    found = semantic.linear_probe(vectors, ["a", "a", "b", "b", None], vectors, ["a", "a", "b", "new", None])
    assert found is not None
    assert (found["accuracy"], found["train_songs"], found["test_songs"], found["unseen_label_songs"]) == (0.75, 4, 4, 1)
    assert semantic.linear_probe(vectors, ["a"] * 5, vectors, ["a"] * 5) is None
    assert semantic.linear_probe(vectors, ["a", "b"] + [None] * 3, vectors, [None] * 5) is None
