"""Zero-shot classification: held-out songs against the names of labels, encoded as text."""

from __future__ import annotations

import numpy as np

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.label_ranking import macro_metrics
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks.labels import Labels


def zero_shot_labels(labels: Labels) -> list[str]:
    """Labels that zero-shot classification chooses from: those of the held-out songs; empty when fewer than two."""
    names = labels.rankable() if labels.several else labels.names(labels.held_out)
    return names if labels.several or len(names) > 1 else []


def zero_shot_task(
    labels: Labels, names: list[str], spaces: dict[str, np.ndarray], prompts: dict[str, np.ndarray], draws: Draws
) -> TaskResult:
    """`accuracy` of each song's label, or `roc_auc` and `map` (macro over labels) where songs may have several.

    `names`: see `zero_shot_labels`; `spaces`: vectors of the whole catalogue; `prompts`: vectors of `names` [labels,
    dim] in each space; `draws` of the labelled held-out songs. The control is a random choice; `commonest` predicts the
    most frequent training label for every song.
    """
    scores = {space: vectors[labels.held_out] @ prompts[space].T for space, vectors in spaces.items()}
    scores["random"] = np.zeros((len(labels.held_out), len(names)))
    if labels.several:
        truth = labels.indicator(labels.held_out, names)
        methods = {method: macro_metrics(of, truth, draws) for method, of in scores.items()}
    else:
        correct = np.searchsorted(names, labels.single(labels.held_out))
        methods = {
            method: {"accuracy": bootstrap.mean(expected_accuracy(of, correct), draws)} for method, of in scores.items()
        }
        methods |= most_frequent_label(labels, ("accuracy",), draws)
    counts = {"labels": len(names), "test_songs": len(labels.held_out)}
    return TaskResult(
        f"zero_shot_{labels.column}", f"zero-shot {labels.column}", "songs", "artists", "random", methods, counts
    )


def expected_accuracy(scores: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """Probability that the correct label is chosen when ties for the highest score are broken at random.

    float64 [songs]. `scores`: [songs, labels]; `correct`: int [songs].
    """
    best = scores == scores.max(axis=1, keepdims=True)
    accuracy: np.ndarray = best[np.arange(len(scores)), correct] / best.sum(axis=1)
    return accuracy


def most_frequent_label(labels: Labels, metrics: tuple[str, ...], draws: Draws) -> dict[str, dict[str, Estimate]]:
    """The method `commonest`, which predicts the most frequent training label (of equals the first) for every song.

    For columns with one label per song; all `metrics` have the accuracy as their value.
    """
    if not len(labels.training):
        return {}
    names, counts = np.unique(labels.single(labels.training), return_counts=True)
    hits = bootstrap.mean((labels.single(labels.held_out) == names[counts.argmax()]).astype(np.float64), draws)
    return {"commonest": dict.fromkeys(metrics, hits)}
