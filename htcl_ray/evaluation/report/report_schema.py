"""Typed models of `report.json`; its JSON Schema is written next to it as `report.schema.json`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Figure(_Part):
    """One metric of one method."""

    value: float | None
    """Null when the metric has no value. Accuracies, rates and shares are in [0, 1]."""
    low: float | None = None
    """Low end of the 95 % confidence interval; null for metrics that are not resampled."""
    high: float | None = None
    """High end of the interval."""
    n: int
    """Number of texts, songs or users that the metric is computed over."""
    shown: bool | None = None
    """Whether the difference from the control of the task is significant: its paired 95 % interval excludes 0. Null
    without an interval."""


class TaskReport(_Part):
    """Several methods on the same queries."""

    title: str
    unit: str
    """Unit of `n`."""
    over: str
    """Clusters that the intervals resample."""
    control: str | None
    """The method without information."""
    counts: dict[str, int]
    """Number of queries, candidates and excluded rows."""
    methods: dict[str, dict[str, Figure]]
    """By method (`semantic`: stage 1; `preference`: stage 2; `blend_0.5`; baselines; controls) and metric."""


class Difference(_Part):
    """Difference of one metric: stage 2 minus stage 1, a space minus a baseline, or one report minus another."""

    task: str
    figure: str
    method: str
    against: str
    first: float
    """The metric of `method`."""
    second: float
    """The metric of `against`."""
    value: float
    low: float | None
    high: float | None
    n: int
    verdict: str
    """`improved`, `worse`, `not shown` (not significant), or `not comparable` when the two were measured on different
    songs, users or candidates."""


class Report(_Part):
    """`report.json`."""

    run: str
    """Fingerprint of the inputs and settings."""
    format_version: int
    created: str
    command: str
    """Command that repeats the evaluation."""
    config: dict[str, Any]
    inputs: dict[str, str | None]
    """Versions of the artifacts."""
    libraries: dict[str, str | None]
    encoder: dict[str, Any] | None = None
    """The pretrained encoder of the features, with its licence; null for other features."""
    auto_tags: dict[str, Any] | None = None
    """Estimated metadata of the evaluated index: the tagger with its licence, the minimum score, and the songs by
    column. Estimated values are no labels of an evaluation. Null without any."""
    data: dict[str, Any]
    """Numbers of songs, artists and texts, and the spaces."""
    leakage: dict[str, Any]
    """Overlap of training and evaluation."""
    tasks: dict[str, TaskReport]
    differences: list[Difference]
    """Stage 2 against stage 1; empty without stage 2."""
    baselines: list[Difference]
    """For each task with a control its primary metric (NDCG, accuracy, ROC-AUC or recall): the best space against each
    method that needs no model."""
    pictures: dict[str, Any] = Field(default_factory=dict)
    """Data of the plots of report.html."""


def report_schema() -> dict[str, Any]:
    """JSON Schema of `report.json`."""
    return Report.model_json_schema()
