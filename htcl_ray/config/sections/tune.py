"""The search: what is varied, how long a trial lasts, and what it is judged by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from htcl_ray.config.sections.base import Seed, Settings, nearest, one_or_many

Value = str | int | float | bool | None
Objective = Literal["semantic", "preference"]


class Dimension(Settings):
    """The values that a search may give one configuration key: a list, or a range."""

    values: tuple[Value, ...] | None = None
    """Chosen from."""
    low: float | None = None
    """Lowest value of a range, itself possible."""
    high: float | None = None
    """Highest value of a range, itself possible."""
    log: bool = False
    """Whether equal ratios of the range are equally likely, rather than equal differences."""

    @field_validator("values", mode="before")
    @classmethod
    def _check_values(cls, value: Any) -> Any:
        for item in value if isinstance(value, list | tuple) else ():
            if not isinstance(item, Value) or (isinstance(item, float) and not math.isfinite(item)):
                raise ValueError(f"{item!r} is among its values; expected finite numbers, strings, true, false or null")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.values is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("it has values and a range; expected either values, or low and high")
            if len(self.values) < 2 or len({repr(value) for value in self.values}) < len(self.values):
                raise ValueError(f"values is {list(self.values)}; expected at least two, all different")
            return self
        if self.low is None or self.high is None:
            raise ValueError("it is neither a list nor a range; expected values: [..], or low: and high:")
        if not -math.inf < self.low < self.high < math.inf:
            raise ValueError(f"its range is {self.low:g} to {self.high:g}; expected finite numbers, low less than high")
        if self.log and self.low <= 0:
            raise ValueError(f"low is {self.low:g}; expected more than 0 in a range with log")
        return self


def _values_or_range(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return {"values": value}
    if not isinstance(value, Mapping | Dimension):
        raise ValueError(f"it is {value!r}; expected a list of values, or a range with low and high")
    unknown = [str(name) for name in value if name not in Dimension.model_fields] if isinstance(value, Mapping) else []
    if unknown:
        raise ValueError(f"a range has no '{unknown[0]}'; {nearest(unknown[0], ('low', 'high', 'log'))}")
    return value


class TuneSettings(Settings):
    """A search over configuration keys: each trial trains a stage, or both, and is judged on the validation gallery."""

    stage: Literal["pretrain", "finetune", "both"] = "pretrain"
    """What a trial trains; `finetune` starts every trial from one semantic model."""
    study: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the folder below runs/tune/; null is the name of the stage. The same name continues the search."""
    space: (
        dict[
            str, Annotated[Dimension, BeforeValidator(_values_or_range, json_schema_input_type=Dimension | list[Value])]
        ]
        | None
    ) = None
    """Dotted configuration keys → a list of values, or {low, high, log}; null: temperature, fixed or learned, batch
    size, learning rate."""
    trials: int = Field(20, ge=1)
    """Trials in all. A finished search goes on when there are more."""
    samples: int | None = Field(None, ge=2)
    """Rows that a trial sees in each stage, songs or pairs, whatever its batch size; null is as many as the configured
    run would see."""
    reports: int = Field(10, ge=1)
    """Times that a trial measures itself, after equally many rows each."""
    objectives: (
        Annotated[tuple[Objective, ...], BeforeValidator(one_or_many), Field(min_length=1, max_length=2)] | None
    ) = None
    """semantic: text → audio. preference: trigger → recalled song. Null is what the last stage is for. Two give a
    Pareto front."""
    metric: Literal["recall@10", "ndcg@10"] = "recall@10"
    """Of the objectives, in one fixed gallery of validation songs."""
    early_stopping: bool = True
    """Stop trials that are behind after equally many rows (ASHA, arXiv 1810.05934); with two objectives none is
    stopped."""
    grace_share: float = Field(0.25, gt=0, le=1)
    """Share of its rows that a trial sees before it may be stopped."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Null is as many as the cluster can hold when it has grown as far as it can."""
    seed: Seed = 0
    """Of the search; the seeds of training are those of the stages, the same in every trial."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.space is not None and not self.space:
            raise ValueError("space is empty; expected at least one configuration key, or null for the default space")
        if self.objectives is not None and len(set(self.objectives)) < len(self.objectives):
            raise ValueError(f"objectives is {list(self.objectives)}; expected each once")
        if self.stage == "pretrain" and "preference" in (self.objectives or ()):
            raise ValueError(
                "objectives names preference, which stage 1 does not learn; expected stage finetune or both"
            )
        return self

    @property
    def stages(self) -> tuple[Literal["pretrain", "finetune"], ...]:
        """The stages that a trial trains, in order."""
        return ("pretrain", "finetune") if self.stage == "both" else (self.stage,)

    @property
    def judged_by(self) -> tuple[Objective, ...]:
        """The objectives."""
        return self.objectives or (("semantic",) if self.stage == "pretrain" else ("preference",))

    @property
    def name(self) -> str:
        """Name of the study."""
        return self.study or self.stage
