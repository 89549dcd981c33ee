"""Zero-shot classification: held-out songs against the names of labels, encoded as text."""

from __future__ import annotations

from collections.abc import Sequence

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
    labels: Labels,
    names: list[str],
    spaces: dict[str, np.ndarray],
    prompts: Sequence[dict[str, np.ndarray]],
    draws: Draws,
) -> TaskResult:
    """`accuracy` of each song's label, or `roc_auc` and `map` (macro over labels) where songs may have several.

    `names`: see `zero_shot_labels`; `spaces`: vectors of the whole catalogue; `prompts`: for each prompt, the vectors
    of `names` [labels, dim] in each space, which are averaged; `draws` of the labelled held-out songs. With several
    prompts, `prompt_spread` is the standard deviation of the accuracy, or else of the ROC-AUC, over single prompts. The
    control is a random choice; `commonest` predicts the most frequent training label for every song.
    """
    truth = labels.indicator(labels.held_out, names) if labels.several else np.empty(0)
    correct = np.empty(0) if labels.several else np.searchsorted(names, labels.single(labels.held_out))

    def measure(scores: np.ndarray) -> dict[str, Estimate]:
        if labels.several:
            return macro_metrics(scores, truth, draws)
        return {"accuracy": bootstrap.mean(expected_accuracy(scores, correct), draws)}

    methods = {}
    for space, vectors in spaces.items():
        of_prompts = [of_prompt[space] for of_prompt in prompts]
        songs = vectors[labels.held_out]
        methods[space] = measure(songs @ _unit(np.mean(of_prompts, axis=0)).T)
        if len(of_prompts) > 1:
            single = [measure(songs @ of_prompt.T) for of_prompt in of_prompts]
            methods[space]["prompt_spread"] = _spread([next(iter(of.values())) for of in single])
    methods["random"] = measure(np.zeros((len(labels.held_out), len(names))))
    if not labels.several:
        methods |= most_frequent_label(labels, ("accuracy",), draws)
    counts = {"labels": len(names), "test_songs": len(labels.held_out), "prompts": len(prompts)}
    return TaskResult(
        f"zero_shot_{labels.column}", f"zero-shot {labels.column}", "songs", "artists", "random", methods, counts
    )


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows scaled to unit norm; zeros, of prompts that cancel out, stay zeros."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: np.ndarray = vectors / np.where(norms > 0, norms, 1)
    return scaled


def _spread(parts: Sequence[Estimate]) -> Estimate:
    """Standard deviation over estimates; without an interval, since that of resamples is biased upwards."""
    return Estimate(float(np.std([part.value for part in parts])), parts[0].n, None, parts[0].population)


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
