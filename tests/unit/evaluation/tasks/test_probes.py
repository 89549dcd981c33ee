"""Probes of catalogue columns against scikit-learn's own pipelines, and what they do where labels or artists are too
few."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.multiclass import OneVsRestClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks import probes
from htcl_ray.evaluation.tasks.labels import Labels, column_labels
from tests.worlds.labelled_songs import labelled_world, songs_of

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)


def probe(songs: EvaluatedSongs, column: str, settings: EvaluateSettings = SETTINGS) -> TaskResult | None:
    training, held_out = np.flatnonzero(songs.splits == "train"), np.flatnonzero(songs.splits == "test")
    of_column = column_labels(songs, column, training, held_out)
    assert of_column is not None
    draws = bootstrap.draw([songs.artists[row] for row in of_column.held_out], settings.resamples, 0)
    methods = {"semantic": songs.spaces["semantic"], "log_mel": songs.log_mel}
    return probes.probe_task(of_column, methods, songs.artists, draws, settings)


@pytest.fixture(scope="module")
def songs() -> EvaluatedSongs:
    return labelled_world(signal=2.0)[0]


def test_single_label_probes_match_scikit_learn(songs: EvaluatedSongs):
    x, y = songs.spaces["semantic"], np.array(songs.labels("genre"))
    train, test = songs.splits == "train", songs.splits == "test"
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    near = KNeighborsClassifier(10, metric="cosine")
    groups = np.array(songs.artists)[test]
    expected = {}
    for name, model in (("accuracy", linear), ("knn_accuracy", near)):
        expected[name] = (model.fit(x[train], y[train]).predict(x[test]) == y[test]).mean()
        out_of_fold = cross_val_predict(model, x[test], y[test], groups=groups, cv=GroupKFold(5))
        expected[f"{name}_folds"] = (out_of_fold == y[test]).mean()
    task = probe(songs, "genre")
    assert {metric: estimate.value for metric, estimate in task.methods["semantic"].items()} == pytest.approx(expected)
    assert len(set(expected.values())) > 1
    most_frequent = max(sorted(set(y)), key=lambda label: (y[train] == label).sum())
    assert {estimate.value for estimate in task.methods["commonest"].values()} == {(y[test] == most_frequent).mean()}
    assert task.control == "commonest"
    assert task.counts == {
        "classes": 3, "unseen_label_songs": 0, "train_songs": train.sum(), "test_songs": test.sum(), "folds": 5,
    }  # fmt: skip


def test_multi_label_probes_match_scikit_learn(songs: EvaluatedSongs):
    tags = songs.values("tags")
    has, names = np.array([bool(of_song) for of_song in tags]), [f"tag {j}" for j in range(4)]
    y = np.array([[name in of_song for name in names] for of_song in tags])
    x, train, test = songs.spaces["semantic"], (songs.splits == "train") & has, (songs.splits == "test") & has
    model = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(max_iter=2000)))
    scores = model.fit(x[train], y[train]).decision_function(x[test])
    neighbors = KNeighborsClassifier(10, metric="cosine").fit(x[train], y[train])
    shares = np.array([of_label[:, 1] for of_label in neighbors.predict_proba(x[test])]).T
    out_of_fold = cross_val_predict(
        model, x[test], y[test], groups=np.array(songs.artists)[test], cv=GroupKFold(5), method="decision_function"
    )
    task = probe(songs, "tags")
    values = {metric: estimate.value for metric, estimate in task.methods["semantic"].items()}
    for prefix, suffix, of in (("", "", scores), ("knn_", "", shares), ("", "_folds", out_of_fold)):
        assert values[f"{prefix}roc_auc{suffix}"] == pytest.approx(
            roc_auc_score(y[test], of, average="macro"), abs=1e-4
        )
        assert values[f"{prefix}map{suffix}"] == pytest.approx(
            average_precision_score(y[test], of, average="macro"), abs=1e-3
        )
    assert task.methods["random"].keys() == task.methods["semantic"].keys()
    assert task.methods["random"]["knn_roc_auc_folds"].value == 0.5
    assert task.methods["random"]["map_folds"].value == pytest.approx(y[test].mean())
    assert task.control == "random"


def test_probes_detect_only_information_in_the_vectors(songs: EvaluatedSongs):
    genre, mood, tags = (probe(songs, column) for column in ("genre", "mood", "tags"))
    for task, metric in ((genre, "accuracy"), (tags, "roc_auc")):
        for name in (metric, f"{metric}_folds", f"knn_{metric}", f"knn_{metric}_folds"):
            gain = bootstrap.difference(task.methods["semantic"][name], task.methods[task.control][name])
            assert bootstrap.is_significant(gain), name
            assert gain.value > 0.1
            nothing = bootstrap.difference(task.methods["log_mel"][name], task.methods[task.control][name])
            assert nothing.value < 0.1
    for name, estimate in mood.methods["semantic"].items():
        assert estimate.value == pytest.approx(0.5, abs=0.15), name


def test_unlabelled_songs_are_excluded_and_unseen_labels_are_errors():
    vectors = np.tile([[0.0, 1.0], [0.1, 1.0], [1.0, 0.0], [1.0, 0.1], [0.5, 0.5]], (2, 1))
    genre = [["a"], ["a"], ["b"], ["b"], None, ["a"], ["a"], ["b"], ["new"], None]
    songs = songs_of(["train"] * 5 + ["test"] * 5, list("abcdefghij"), vectors, genre=genre)
    task = probe(songs, "genre", EvaluateSettings(resamples=100, neighbors=1))
    assert task.counts == {"classes": 2, "unseen_label_songs": 1, "train_songs": 4, "test_songs": 4, "folds": 4}
    assert task.methods["semantic"]["accuracy"].value == task.methods["semantic"]["knn_accuracy"].value == 0.75
    assert task.methods["semantic"]["accuracy"].n == 4


@pytest.mark.parametrize("genre", [["a"] * 4 + ["a", "b"] * 2, [None] * 4 + ["a", "b"] * 2])
def test_probe_needs_two_training_labels(genre: list[str | None]):
    songs = songs_of(
        ["train"] * 4 + ["test"] * 4, list("abcdefgh"), np.eye(8), genre=[value and [value] for value in genre]
    )
    assert probe(songs, "genre") is None


def test_labels_without_training_songs_are_left_out():
    generator = np.random.default_rng(0)
    tags = [["x", "y"] if i % 2 else ["x"] for i in range(20)]
    tags[15] = ["y", "new"]
    songs = songs_of(
        ["train"] * 10 + ["test"] * 10, [str(i) for i in range(20)], generator.normal(size=(20, 4)), tags=tags
    )
    assert probe(songs, "tags").counts == {
        "labels": 1,
        "labels_left_out": 2,
        "train_songs": 10,
        "test_songs": 10,
        "folds": 5,
    }
    assert (
        probe(
            songs_of(["train"] * 10 + ["test"] * 10, [str(i) for i in range(20)], np.eye(20), tags=[["x", "z"]] * 20),
            "tags",
        )
        is None
    )


def test_spellings_of_an_artist_share_a_fold():
    """Every artist has its own label and direction: who sees the artist in training names every label, who does not
    none."""
    artists = ["Ann", "ann ", "Bob", "BOB; Guest", "cy", "Cÿ feat. Other"]
    vectors = np.repeat(np.eye(3), 2, axis=0)
    genre = [[name[:2].lower()] for name in ("ann", "ann", "bob", "bob", "cy", "cy")]
    songs = songs_of(
        ["train"] * 6 + ["test"] * 6,
        [f"other {a}" for a in artists] + artists,
        np.vstack([vectors] * 2),
        genre=genre * 2,
    )
    task = probe(songs, "genre", EvaluateSettings(resamples=100, neighbors=1))
    assert task.counts["folds"] == 3
    assert task.methods["semantic"]["accuracy"].value == 1
    assert task.methods["semantic"]["accuracy_folds"].value == task.methods["semantic"]["knn_accuracy_folds"].value == 0


def test_songs_by_one_artist_have_no_folds():
    songs = songs_of(["train"] * 4 + ["test"] * 4, list("abcd") + ["e"] * 4, np.eye(8), genre=[["x"], ["y"]] * 4)
    task = probe(songs, "genre")
    assert set(task.methods["semantic"]) == set(task.methods["commonest"]) == {"accuracy", "knn_accuracy"}
    assert task.counts["folds"] == 0


def test_large_catalogues_train_on_a_sample(songs: EvaluatedSongs, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probes, "MAX_TRAINING_SONGS", 50)
    first, again = probe(songs, "genre"), probe(songs, "genre")
    assert first.counts["train_songs"] == 50
    assert first.counts["train_songs_left_out"] == (songs.splits == "train").sum() - 50
    assert first.methods["semantic"]["accuracy"].value == again.methods["semantic"]["accuracy"].value > 0.6


def test_a_label_that_all_held_out_songs_have_cannot_be_ranked():
    tags = [["x", "y"] if i % 2 else ["z"] for i in range(10)] + [
        ["x", "y"] if i % 2 else ["x", "z"] for i in range(10)
    ]
    vectors = np.random.default_rng(0).normal(size=(20, 4))
    songs = songs_of(["train"] * 10 + ["test"] * 10, [str(i) for i in range(20)], vectors, tags=tags)
    assert probe(songs, "tags").counts == {
        "labels": 2,
        "labels_left_out": 1,
        "train_songs": 10,
        "test_songs": 10,
        "folds": 5,
    }


def test_fold_with_one_training_label_predicts_it():
    """Two artists with a label each: out of fold, the other's is all that was seen."""
    songs = songs_of(["train"] * 4 + ["test"] * 4, list("abcdeeff"), np.eye(8), genre=[["x"], ["x"], ["y"], ["y"]] * 2)
    task = probe(songs, "genre")
    assert task.counts["folds"] == 2
    assert task.methods["semantic"]["accuracy_folds"].value == task.methods["semantic"]["knn_accuracy_folds"].value == 0


def test_training_sample_keeps_rare_labels():
    values = [("common",)] * 9_000 + [("rare",)] * 30 + [("single", "common")]
    of = Labels("tags", values, True, np.arange(len(values)), np.arange(3))
    rows = probes.sample_training_songs(of, 300, seed=0)
    assert len(rows) == len(np.unique(rows)) == 300
    assert ((rows >= 9_000) & (rows < 9_030)).sum() >= 20
    assert 9_030 in rows
    assert rows.tolist() == probes.sample_training_songs(of, 300, seed=0).tolist()
