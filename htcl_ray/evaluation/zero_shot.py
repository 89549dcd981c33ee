"""Zero-shot classification: a label is named by the text that is nearest to the song, and nothing is trained on labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.bootstrap import Draws
from htcl_ray.evaluation.figures import Task
from htcl_ray.evaluation.probes import label_figures
from htcl_ray.evaluation.songs import Songs
from htcl_ray.settings import EvaluateSettings


def zero_shot_task(
    songs: Songs,
    column: str,
    held_out: np.ndarray,
    draws: Draws,
    encode: Callable[[Sequence[str]], dict[str, np.ndarray]],
    settings: EvaluateSettings,
) -> Task | None:
    """The held-out songs' labels of a column as prompts, or None when there are fewer than two.

    One label a song: `accuracy`, a tie counting as its share of right labels, so that equal vectors give chance. Several: `roc_auc` and
    `map` of the cosines, means over labels.
    """
    values = songs.values(column)
    asked = np.array([place for place, row in enumerate(held_out) if values[row]], dtype=np.int64)
    rows = held_out[asked]
    labels = sorted({value for row in rows for value in values[row]})
    if len(labels) < 2:
        return None
    prompts = encode([settings.label_prompt.replace("{label}", label) for label in labels])
    truth = np.array([[label in values[row] for label in labels] for row in rows])
    several = any(len(value) > 1 for value in values)
    units = draws.of(asked)
    methods = {}
    kept = truth.any(axis=0) & ~truth.all(axis=0)
    for space, vectors in songs.spaces.items():
        scores = vectors[rows] @ prompts[space].T
        if several:
            methods[space] = label_figures(scores[:, kept], truth[:, kept], units)
        else:
            best = scores == scores.max(axis=1, keepdims=True)
            methods[space] = {"accuracy": bootstrap.mean((best & truth).sum(axis=1) / best.sum(axis=1), units)}
    if several:
        methods["random"] = label_figures(np.zeros(truth[:, kept].shape), truth[:, kept], units)
    else:
        methods["random"] = {"accuracy": bootstrap.mean(np.full(len(rows), 1 / len(labels)), units)}
    return Task(
        f"zero_shot_{column}", f"zero-shot: {column}", "songs", "artists", "random", methods, {"labels": len(labels), "songs": len(rows)}
    )
