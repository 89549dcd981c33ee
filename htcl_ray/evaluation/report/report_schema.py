"""What `report.json` holds, as typed models: its JSON Schema lies beside it as `report.schema.json`."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class Figure(_Part):
    """One figure of one method."""

    value: float | None
    """Null when nothing could be measured. Every accuracy, rate and share is in [0, 1]."""
    low: float | None = None
    """Low end of the 95 % interval; null where resampling has no meaning."""
    high: float | None = None
    n: int
    """How many texts, songs or users it is the figure of."""
    shown: bool | None = None
    """Whether it differs from the control of its task: the paired 95 % interval of the difference does not hold 0. Null
    without one."""


class TaskReport(_Part):
    """The same questions put to several methods."""

    title: str
    unit: str
    """What n counts."""
    over: str
    """What the intervals resample."""
    control: str | None
    """The method that knows nothing."""
    counts: dict[str, int]
    """What the questions are made of, and what was left out."""
    methods: dict[str, dict[str, Figure]]
    """By method (`semantic`: stage 1; `preference`: stage 2; `blend_0.5`; baselines; controls) and figure."""


class Difference(_Part):
    """One figure of stage 2 minus the same of stage 1, of a space minus a baseline, or of one report minus another."""

    task: str
    figure: str
    method: str
    against: str
    first: float
    """The figure of `method`."""
    second: float
    """The figure of `against`."""
    value: float
    low: float | None
    high: float | None
    n: int
    verdict: str
    """`improved`, `worse`, `not shown`, or `not comparable` when the two were measured on other songs, users or
    candidates."""


class Report(_Part):
    """`report.json`."""

    run: str
    """Fingerprint of the inputs and settings."""
    format_version: int
    created: str
    command: str
    """Repeats the evaluation."""
    config: dict[str, Any]
    inputs: dict[str, str | None]
    """Versions of the artifacts."""
    libraries: dict[str, str | None]
    data: dict[str, Any]
    """How many songs, artists and texts were asked about, and the spaces."""
    leakage: dict[str, Any]
    """What training and evaluation share."""
    tasks: dict[str, TaskReport]
    differences: list[Difference]
    """Stage 2 against stage 1; empty without stage 2."""
    baselines: list[Difference]
    """For each task with a control its first metric (NDCG, accuracy, ROC-AUC or recall): the space that is best by it
    against each method that needs no model."""
    pictures: dict[str, Any] = Field(default_factory=dict)
    """What the plots of report.html show, as numbers."""


def report_schema() -> dict[str, Any]:
    """JSON Schema of `report.json`."""
    return Report.model_json_schema()
