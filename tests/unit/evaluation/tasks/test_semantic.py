"""Text-to-audio and audio-to-text retrieval and zero-shot classification on vectors with known results."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks import semantic
from htcl_ray.pipelines.evaluate import run_tasks
from tests.worlds.labelled_songs import labelled_world, songs_of, unit

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings(resamples=200)


def tasks_of(
    songs: EvaluatedSongs, vector_of_word: dict[str, np.ndarray], settings: EvaluateSettings = SETTINGS
) -> dict[str, TaskResult]:
    """Tasks with texts whose vector is that of the first known word in them, or noise."""
    generator = np.random.default_rng(1)

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        assert len(set(texts)) == len(texts)
        noise = generator.normal(size=(len(texts), songs.spaces["semantic"].shape[1]))
        known = [next((vector for word, vector in vector_of_word.items() if word in text), None) for text in texts]
        vectors = unit(np.array([noise[i] if vector is None else vector for i, vector in enumerate(known)]))
        return {
            space: vectors if of.shape[1] == vectors.shape[1] else np.hstack([vectors] * 2) / 2**0.5
            for space, of in songs.spaces.items()
        }

    return {task.name: task for task in semantic.semantic_tasks(songs, encode, settings)}


@pytest.fixture(scope="module")
def world() -> tuple[EvaluatedSongs, dict[str, np.ndarray]]:
    return labelled_world()


@pytest.fixture(scope="module")
def tasks(world: tuple[EvaluatedSongs, dict[str, np.ndarray]]) -> dict[str, TaskResult]:
    return tasks_of(*world)


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
        assert (
            semantic.first_correct_rank(queries, gallery, query_group, gallery_group, cells=cells).tolist() == expected
        )


def test_tied_rank_is_its_mean_over_random_orders():
    generator = np.random.default_rng(3)
    group = np.array([0, 0, 1, 1, 1])
    same = np.ones((5, 2), dtype=np.float32)
    rank = semantic.first_correct_rank(same[:1], same, np.array([0]), group)[0]
    drawn = [1 + np.flatnonzero(generator.permutation(group) == 0)[0] for _ in range(20_000)]
    assert rank == pytest.approx(np.mean(drawn), abs=0.03)


def test_metrics_of_tied_items_are_means_over_random_orders():
    """Two items stand above a tie of five, two of which are correct."""
    generator = np.random.default_rng(0)
    place = semantic.FirstRelevant(np.array([2]), np.array([5]), np.array([2]))
    metrics = semantic.retrieval_metrics(place, bootstrap.draw(["a"], 100, seed=0), (2, 3, 5, 9))
    drawn = np.array([3 + generator.permutation(5)[:2].min() for _ in range(20_000)])
    for k in (2, 3, 5, 9):
        assert metrics[f"recall@{k}"].value == pytest.approx((drawn <= k).mean(), abs=0.01)
    assert metrics["mrr"].value == pytest.approx((1 / drawn).mean(), abs=0.005)
    assert metrics["median_rank"].value == pytest.approx(drawn.mean(), abs=0.03)


def test_a_collapsed_model_equals_the_random_control():
    songs = songs_of(["test"] * 9, list("aabbccdde"), np.ones((9, 4)), texts=list("xxyzuvwqr"))
    for task in tasks_of(songs, {letter: np.ones(4) for letter in "xyzuvwqr"}).values():
        for metric, estimate in task.methods["semantic"].items():
            control = task.methods["random"][metric]
            if metric != "median_rank":
                assert estimate.value == pytest.approx(control.value)
                np.testing.assert_allclose(estimate.resampled, control.resampled)
    assert task.methods["semantic"]["median_rank"].value == pytest.approx((8 + 1) / 2)


def test_identical_texts_are_one_correct_set():
    vectors = np.array([[0.5, 1.0], [1.0, 0.1], [0.1, 1.0]])  # the first is nearer to the other text
    songs = songs_of(["test"] * 3, list("abc"), vectors, texts=["x", "x", "y"])
    tasks = tasks_of(
        songs, {"x": np.array([1.0, 0.0]), "y": np.array([0.0, 1.0])}, EvaluateSettings(resamples=100, ks=(1, 2))
    )
    to_audio, to_text = tasks["text_to_audio"], tasks["audio_to_text"]
    assert (to_audio.counts, to_text.counts) == ({"queries": 2, "gallery": 3}, {"queries": 3, "gallery": 2})
    assert to_audio.methods["semantic"]["recall@1"].value == 1
    assert to_text.methods["semantic"]["recall@1"].value == pytest.approx(2 / 3)
    assert to_audio.methods["random"]["recall@1"].value == pytest.approx((2 / 3 + 1 / 3) / 2)
    assert to_text.methods["random"]["recall@1"].value == pytest.approx(1 / 2)


def test_chance_equals_random_orders():
    generator = np.random.default_rng(5)
    correct = np.array([1, 1, 3, 8])
    drawn = np.array([[1 + generator.permutation(30)[:count].min() for count in correct] for _ in range(4000)]).ravel()
    expected = semantic.chance_metrics(30, correct, (1, 5, 50))
    assert expected["recall@1"] == pytest.approx((drawn <= 1).mean(), abs=0.01)
    assert expected["recall@5"] == pytest.approx((drawn <= 5).mean(), abs=0.015)
    assert expected["recall@50"] == 1
    assert expected["mrr"] == pytest.approx((1 / drawn).mean(), abs=0.01)
    assert expected["median_rank"] == pytest.approx(np.median(drawn), abs=1)


def test_rank_summary():
    summary = semantic.rank_summary(np.array([1.0, 2.0, 4.0]), (1, 3))
    assert summary == {
        "recall@1": pytest.approx(1 / 3),
        "recall@3": pytest.approx(2 / 3),
        "mrr": pytest.approx(1.75 / 3),
        "median_rank": 2,
    }


def test_the_random_control_of_retrieval_is_chance(
    tasks: dict[str, TaskResult], world: tuple[EvaluatedSongs, dict[str, np.ndarray]]
):
    held_out = int((world[0].splits == "test").sum())
    for name in ("text_to_audio", "audio_to_text"):
        expected = semantic.chance_metrics(held_out, np.ones(held_out, dtype=int), SETTINGS.ks)
        assert {metric: estimate.value for metric, estimate in tasks[name].methods["random"].items()} == pytest.approx(
            expected
        )


def test_shuffled_vectors_are_at_chance_and_real_ones_are_not(tasks: dict[str, TaskResult]):
    """Captions name the genre, one of three."""
    for name in ("text_to_audio", "audio_to_text"):
        methods = tasks[name].methods
        assert list(methods) == ["semantic", "preference", "blend_0.5", "shuffled", "random"]
        assert methods["semantic"]["median_rank"].value < methods["random"]["median_rank"].value * 0.6
        assert bootstrap.is_significant(bootstrap.difference(methods["semantic"]["mrr"], methods["random"]["mrr"]))
        assert methods["shuffled"]["median_rank"].value == pytest.approx(
            methods["random"]["median_rank"].value, rel=0.15
        )
        assert methods["shuffled"]["mrr"].value == pytest.approx(methods["random"]["mrr"].value, rel=0.3)


def test_tasks_come_in_order_and_empty_columns_have_none(tasks: dict[str, TaskResult]):
    columns = ("genre", "mood", "tags")
    assert list(tasks) == [
        "text_to_audio",
        "audio_to_text",
        *(f"tag_queries_{count}" for count in (1, 2, 3)),
        *(f"{kind}_{name}" for name in columns for kind in ("zero_shot", "probe")),
    ]


def test_duplicates_of_training_recordings_are_excluded():
    vectors = np.random.default_rng(0).normal(size=(4, 8))
    songs = songs_of(["train", "test", "test", "test"], list("abcd"), vectors, groups=["r", "r", "s", "t"])
    texts = {"semantic": np.eye(8, dtype=np.float32)}
    measured = run_tasks(
        songs,
        lambda batch: {"semantic": texts["semantic"][: len(batch)]},
        None,
        None,
        EvaluateSettings(probe_columns=()),
    )
    assert measured.tasks[0].counts == {"queries": 2, "gallery": 2}
    assert measured.data["copies_left_out"] == 1
    assert semantic.semantic_tasks(songs, lambda texts: {}, EvaluateSettings(split="validation")) == []


def test_zero_shot_predicts_genre_and_not_mood(
    tasks: dict[str, TaskResult], world: tuple[EvaluatedSongs, dict[str, np.ndarray]]
):
    songs, vector_of_word = world
    held_out = songs.splits == "test"
    genre, mood = tasks["zero_shot_genre"], tasks["zero_shot_mood"]
    names = sorted(set(songs.labels("genre")))
    scores = songs.spaces["semantic"][held_out] @ np.array([vector_of_word[name] for name in names]).T
    right = [
        names[best] == label
        for best, label in zip(scores.argmax(axis=1), np.array(songs.labels("genre"))[held_out], strict=True)
    ]
    assert genre.methods["semantic"]["accuracy"].value == pytest.approx(np.mean(right))
    assert np.mean(right) > 0.9
    assert genre.methods["random"]["accuracy"].value == pytest.approx(1 / 3)
    assert mood.methods["random"]["accuracy"].value == 1 / 2
    assert not bootstrap.is_significant(
        bootstrap.difference(mood.methods["semantic"]["accuracy"], mood.methods["random"]["accuracy"])
    )
    training = np.array(songs.labels("genre"))[songs.splits == "train"]
    most_frequent = max(names, key=lambda name: (training == name).sum())
    share = (np.array(songs.labels("genre"))[held_out] == most_frequent).mean()
    assert genre.methods["commonest"]["accuracy"].value == pytest.approx(share)


def test_zero_shot_of_several_labels_matches_scikit_learn(
    tasks: dict[str, TaskResult], world: tuple[EvaluatedSongs, dict[str, np.ndarray]]
):
    songs, vector_of_word = world
    tagged = np.array([bool(tags) for tags in songs.values("tags")])
    rows = np.flatnonzero((songs.splits == "test") & tagged)
    names = [f"tag {j}" for j in range(4)]
    truth = np.array([[name in songs.values("tags")[row] for name in names] for row in rows])
    scores = songs.spaces["semantic"][rows] @ np.array([vector_of_word[name] for name in names]).T
    task = tasks["zero_shot_tags"]
    assert task.methods["semantic"]["roc_auc"].value == pytest.approx(
        roc_auc_score(truth, scores, average="macro"), abs=1e-6
    )
    assert task.methods["semantic"]["map"].value == pytest.approx(
        average_precision_score(truth, scores, average="macro"), abs=1e-6
    )
    assert task.methods["random"]["roc_auc"].value == 0.5
    assert task.methods["random"]["map"].value == pytest.approx(truth.mean())
    assert task.counts == {"labels": 4, "test_songs": len(rows), "prompts": 3}
    assert task.methods["semantic"]["prompt_spread"].value < 1e-12, "the vector of a prompt is that of its label here"


def test_prompts_are_made_of_labels_and_texts_are_encoded_once():
    songs = labelled_world(count=60)[0]
    calls: list[list[str]] = []

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        calls.append(list(texts))
        return {space: unit(np.ones((len(texts), of.shape[1]))) for space, of in songs.spaces.items()}

    semantic.semantic_tasks(
        songs,
        encode,
        EvaluateSettings(resamples=100, probe_columns=("genre",), label_prompts=["a {label} song", "{label} music"]),
    )
    assert len(calls) == 1
    prompts = [f"a {genre} song" for genre in ("folk", "jazz", "rock")]
    prompts += [f"{genre} music" for genre in ("folk", "jazz", "rock")]
    first = calls[0].index("a folk song")
    assert calls[0][first : first + 6] == prompts
    assert {"tag 0", "tag 1"} <= set(calls[0]), "queries of one tag"


def test_prompts_of_a_label_are_averaged_and_their_spread_is_reported():
    """The first prompt is right for two of four songs, the second for the other two, and their mean for all."""
    songs = songs_of(
        ["test"] * 4,
        list("abcd"),
        np.array([[2, 1, 0], [1, 2, 0], [2, 1, 1], [1, 2, 1]]),
        genre=[["x"], ["x"], ["y"], ["y"]],
    )
    vector_of_text = {
        "x one": [1.0, -1.0, 0.5],
        "y one": [-1.0, 1.0, 0.5],
        "x two": [-1.0, 1.0, -1.5],
        "y two": [1.0, -1.0, 0.5],
    }

    def encode(texts: list[str]) -> dict[str, np.ndarray]:
        return {"semantic": unit(np.array([vector_of_text.get(text, [1.0, 0.0, 0.0]) for text in texts]))}

    def accuracy(prompts: list[str]) -> dict[str, float]:
        settings = EvaluateSettings(resamples=100, probe_columns=("genre",), label_prompts=prompts)
        tasks = {task.name: task for task in semantic.semantic_tasks(songs, encode, settings)}
        return {name: of.value for name, of in tasks["zero_shot_genre"].methods["semantic"].items()}

    one, two = accuracy(["{label} one"]), accuracy(["{label} two"])
    both = accuracy(["{label} one", "{label} two"])
    averaged = {
        label: unit(
            np.sum([unit(np.array([vector_of_text[f"{label} {n}"]]))[0] for n in ("one", "two")], axis=0)[None]
        )[0]
        for label in "xy"
    }
    scores = songs.spaces["semantic"] @ np.stack([averaged["x"], averaged["y"]]).T
    expected = np.mean(scores.argmax(axis=1) == [0, 0, 1, 1])
    assert "prompt_spread" not in one
    assert both["accuracy"] == expected
    assert both["prompt_spread"] == pytest.approx(abs(one["accuracy"] - two["accuracy"]) / 2)
