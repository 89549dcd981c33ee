"""Probes on vectors with known content, and the weighted ROC-AUC and average precision behind them beside scikit-learn's."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.probes import _folds, label_figures, probe_task
from htcl_ray.evaluation.songs import Songs
from htcl_ray.evaluation.weighted import weighted_auc, weighted_average_precision
from htcl_ray.evaluation.zero_shot import zero_shot_task
from htcl_ray.settings import EvaluateSettings
from tests.evaluation_songs import DIM, GENRES, TAGS, made_up, metadata

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)


def task(songs: Songs, column: str = "genre", settings: EvaluateSettings = SETTINGS):
    held_out = np.flatnonzero(songs.splits == "test")
    draws = bootstrap.draw([songs.artists[row] for row in held_out], settings.resamples, settings.seed)
    return probe_task(songs, column, held_out, draws, settings)


def with_column(songs: Songs, **columns: list) -> Songs:
    return dataclasses.replace(songs, metadata=metadata(len(songs.ids), artist=songs.metadata["artist"].to_pylist(), **columns))


@pytest.mark.parametrize("ties", [False, True])
def test_weighted_figures_equal_those_of_scikit_learn(ties: bool):
    generator = np.random.default_rng(0)
    scores = generator.normal(size=50)
    if ties:
        scores = np.round(scores)
    relevant = generator.random(50) < 0.3
    weights = generator.integers(0, 4, size=(30, 50)).astype(np.float32)
    auc, precision = weighted_auc(scores, relevant, weights), weighted_average_precision(scores, relevant, weights)
    for row, of in enumerate(weights):
        assert auc[row] == pytest.approx(roc_auc_score(relevant, scores, sample_weight=of))
        assert precision[row] == pytest.approx(average_precision_score(relevant, scores, sample_weight=of))


def test_a_resample_without_an_example_has_no_figure():
    scores, relevant = np.array([3.0, 2.0, 1.0]), np.array([True, False, False])
    weights = np.array([[0, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=np.float32)
    assert np.isnan(weighted_auc(scores, relevant, weights)).tolist() == [True, True, False]
    assert np.isnan(weighted_average_precision(scores, relevant, weights)).tolist() == [True, False, False]


def test_means_over_labels_equal_those_of_scikit_learn():
    generator = np.random.default_rng(1)
    scores, truth = generator.normal(size=(40, 5)), generator.random((40, 5)) < 0.4
    found = label_figures(scores, truth, bootstrap.draw([str(i) for i in range(40)], 100, 0))
    assert found["roc_auc"].value == pytest.approx(roc_auc_score(truth, scores, average="macro"))
    assert found["map"].value == pytest.approx(average_precision_score(truth, scores, average="macro"))


def test_a_probe_reads_a_linear_property_and_only_that():
    probe = task(made_up(noise=0.1))
    assert {name for name, found in probe.methods.items() if found["accuracy"].value > 0.95} == {"semantic"}
    for name in ("log_mel", "shuffled", "commonest"):
        for figure, item in probe.methods[name].items():
            assert item.value < 0.45, (name, figure)
    assert probe.methods["semantic"]["knn_accuracy_folds"].value > 0.95
    assert probe.methods["semantic"]["accuracy"].n == 120


def test_the_control_names_the_commonest_training_label():
    songs = made_up()
    labels = ["rock" if i % 2 == 0 and i < 160 else "jazz" for i in range(len(songs.ids))]
    probe = task(with_column(songs, genre=[[label] for label in labels]))
    assert probe.methods["commonest"]["accuracy"].value == 0.0, "rock is commonest in training, and no test song is rock"


def test_unseen_labels_are_errors_and_missing_ones_take_no_part():
    songs = made_up(noise=0.05)
    genres = [label for label in songs.labels("genre")]
    genres[1] = "polka"
    genres[3] = None
    genres[0] = None
    probe = task(with_column(songs, genre=[[g] if g else None for g in genres]))
    assert probe.counts["unseen_label_songs"] == 1
    assert probe.counts["train_songs"] == 119
    assert probe.methods["semantic"]["accuracy"].n == 119
    assert probe.methods["semantic"]["accuracy"].value <= 118 / 119


def test_a_column_without_two_labels_is_no_task():
    songs = made_up()
    assert task(songs, "mood") is None
    assert task(with_column(songs, genre=[["rock"]] * len(songs.ids))) is None


def test_an_artist_is_in_one_fold():
    artists = [f"a{i % 7}" for i in range(60)]
    asked = []
    for learned, test in _folds(artists, 5):
        assert not {artists[i] for i in learned} & {artists[i] for i in test}
        asked += test.tolist()
    assert sorted(asked) == list(range(60))
    assert len(_folds(["a", "b", "a"], 5)) == 2
    assert _folds(["a"] * 4, 5) == []


def test_folds_hide_what_belongs_to_an_artist_alone():
    """Vectors that name the artist and nothing else: random folds would read the genre through the artist, ours cannot."""
    songs = made_up()
    artists = np.unique(songs.artists, return_inverse=True)[1]
    vectors = np.eye(artists.max() + 1, dtype=np.float32)[artists]
    genre = [[GENRES[number % 4]] for number in artists]
    songs = dataclasses.replace(with_column(songs, genre=genre), spaces={"semantic": vectors})
    assert task(songs).methods["semantic"]["accuracy_folds"].value < 0.4


def test_several_labels_a_song():
    probe = task(made_up(noise=0.1), "tags")
    semantic, chance = probe.methods["semantic"], probe.methods["random"]
    assert semantic["roc_auc"].value > 0.75 > 0.5 == chance["roc_auc"].value
    assert semantic["knn_roc_auc"].value > 0.7
    songs = made_up(noise=0.1)
    shares = [
        np.mean([tag in value for value, split in zip(songs.values("tags"), songs.splits, strict=True) if split == "test"]) for tag in TAGS
    ]
    assert chance["map"].value == pytest.approx(np.mean(shares))
    assert bootstrap.is_shown(bootstrap.difference(probe.methods["shuffled"]["roc_auc"], chance["roc_auc"])) is False


def test_zero_shot_asks_with_the_prompt_and_shares_ties():
    songs = made_up(noise=0.05)
    held_out = np.flatnonzero(songs.splits == "test")
    draws = bootstrap.draw([songs.artists[row] for row in held_out], 100, 0)
    asked: list[str] = []

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        asked.extend(texts)
        return {"semantic": np.eye(DIM, dtype=np.float32)[[GENRES.index(text.split()[1]) for text in texts]]}

    settings = EvaluateSettings(label_prompt="a {label} song", resamples=100)
    found = zero_shot_task(songs, "genre", held_out, draws, encode, settings)
    assert asked == [f"a {label} song" for label in sorted(GENRES)]
    assert found.methods["semantic"]["accuracy"].value > 0.95
    assert found.methods["random"]["accuracy"].value == 0.25
    two_alike = zero_shot_task(
        songs, "genre", held_out, draws, lambda texts: {"semantic": np.eye(DIM, dtype=np.float32)[[0, 0, 2, 2]]}, settings
    )
    assert two_alike.methods["semantic"]["accuracy"].value < 0.5
    several = zero_shot_task(
        songs, "tags", held_out, draws, lambda texts: {"semantic": np.eye(DIM, dtype=np.float32)[: len(texts)]}, settings
    )
    assert set(several.methods["semantic"]) == {"roc_auc", "map"}
    assert zero_shot_task(songs, "mood", held_out, draws, encode, settings) is None
