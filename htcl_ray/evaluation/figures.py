"""What every task of an evaluation gives: figures of several methods on the same questions, each with its uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from htcl_ray.evaluation.bootstrap import Estimate

LOWER_IS_BETTER = (
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
"""Figures of which less is better; of all others more is."""


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
    """What the plots show, as plain numbers: see pictures.py; `blend_curve` is null without stage 2 or without a log."""
