"""What every task of an evaluation gives: figures of several methods on the same questions, each with its
uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from htcl_ray.evaluation.stats.bootstrap import Estimate

LOWER_IS_BETTER = (
    "loss",
    "median_rank",
    "gini",
    "popularity_lift",
    "audio_mean_cosine",
    "text_mean_cosine",
    "repeat_difference",
    "batch_difference",
    "padding_difference",
    "stored_difference",
    "from_audio_difference",
)
"""Metrics, without `@k`, of which less is better; `lower_is_better` reads any metric's name."""
HIGHER_IS_BETTER = (
    "recall",
    "hit_rate",
    "ndcg",
    "mrr",
    "auc",
    "user_auc",
    "item_auc",
    "roc_auc",
    "map",
    "accuracy",
    "coverage",
    "artist_diversity",
    "audio_effective_rank",
    "text_effective_rank",
)
"""Metrics, without `@k`, of which more is better."""


def lower_is_better(metric: str) -> bool:
    """Direction of a metric: of an evaluation (`gini@10`, `knn_map_folds`) or of training
    (`validation_pair_median_rank`).

    A name that is in neither list, such as a mistyped one in a gate file, has no values and counts as higher is better.
    """
    name = (
        metric.partition("@")[0]
        .removeprefix("validation_")
        .removeprefix("pair_")
        .removeprefix("knn_")
        .removesuffix("_folds")
    )
    return name in LOWER_IS_BETTER


@dataclass(frozen=True)
class Task:
    """One task: the same questions put to several methods."""

    name: str
    """Key in the report and in a gate's bounds, such as `text_to_audio`."""
    title: str
    """For people, such as `text → audio`."""
    unit: str
    """What `n` counts, in the plural: texts, songs, users."""
    over: str
    """What the intervals resample: artists or users."""
    control: str | None
    """The method that knows nothing: a figure is shown when its paired difference from this one's is."""
    methods: dict[str, dict[str, Estimate]]
    """By method (a space of the model, a baseline or a control) and figure."""
    counts: dict[str, int] = field(default_factory=dict)
    """What the questions are made of, and what was left out."""


@dataclass(frozen=True)
class Measured:
    """What an evaluation found, before it becomes a report."""

    data: dict[str, Any]
    """How many songs, artists and texts were asked about."""
    leakage: dict[str, Any]
    tasks: list[Task]
    pictures: dict[str, Any]
    """What the plots show, as plain numbers: see pictures.py; `blend_curve` is null without stage 2 or without a
    log."""
