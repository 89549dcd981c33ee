"""Zero-shot classification: the names of labels, as text, against the sound of held-out songs."""

from __future__ import annotations

import numpy as np

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.label_ranking import macro_figures
from htcl_ray.evaluation.task_result import Task
from htcl_ray.evaluation.tasks.labels import Labels


def asked_labels(labels: Labels) -> list[str]:
    """The labels that zero-shot classification chooses from: those of the held-out songs. Empty when there is nothing
    to choose.
    """
    names = labels.rankable() if labels.several else labels.names(labels.held_out)
    return names if labels.several or len(names) > 1 else []


def zero_shot_task(
    labels: Labels, names: list[str], spaces: dict[str, np.ndarray], prompts: dict[str, np.ndarray], draws: Draws
) -> Task:
    """`accuracy` of naming each song's label, or `roc_auc` and `map` (macro over labels) where a song may have several.

    `names`: see `asked_labels`; `spaces`: vectors of the whole catalogue; `prompts`: of `names` [labels, dim], in each
    space; `draws` of the labelled held-out songs. The control is a random choice; `commonest` always names the
    commonest label of training.
    """
    scores = {space: vectors[labels.held_out] @ prompts[space].T for space, vectors in spaces.items()}
    scores["random"] = np.zeros((len(labels.held_out), len(names)))
    if labels.several:
        truth = labels.indicator(labels.held_out, names)
        methods = {method: macro_figures(of, truth, draws) for method, of in scores.items()}
    else:
        answers = np.searchsorted(names, labels.one_each(labels.held_out))
        methods = {method: {"accuracy": bootstrap.mean(chosen(of, answers), draws)} for method, of in scores.items()}
        methods |= commonest(labels, ("accuracy",), draws)
    counts = {"labels": len(names), "test_songs": len(labels.held_out)}
    return Task(
        f"zero_shot_{labels.column}", f"zero-shot {labels.column}", "songs", "artists", "random", methods, counts
    )


def chosen(scores: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """float64 [songs]: 1 where the answer has the highest score, a share of it where it ties. `scores`: [songs,
    labels].
    """
    best = scores == scores.max(axis=1, keepdims=True)
    return best[np.arange(len(scores)), answers] / best.sum(axis=1)


def commonest(labels: Labels, figures: tuple[str, ...], draws: Draws) -> dict[str, dict[str, Estimate]]:
    """The method of always naming the commonest training label (of equals the first), for columns with one label a
    song.
    """
    if not len(labels.training):
        return {}
    names, counts = np.unique(labels.one_each(labels.training), return_counts=True)
    hits = bootstrap.mean((labels.one_each(labels.held_out) == names[counts.argmax()]).astype(np.float64), draws)
    return {"commonest": dict.fromkeys(figures, hits)}
