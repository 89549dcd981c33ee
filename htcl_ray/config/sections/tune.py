"""Section `tune`: search space, length of trials, and objectives."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from htcl_ray.config.sections.base import Seed, Settings, nearest, one_or_many

Value = str | int | float | bool | None
Objective = Literal["semantic", "preference"]


class Dimension(Settings):
    """Values of one configuration key in a search: a list or a range."""

    values: tuple[Value, ...] | None = None
    """List of values to choose from, at least two; null when the dimension is a range."""
    low: float | None = None
    """Lowest value of a range, inclusive."""
    high: float | None = None
    """Highest value of a range, inclusive."""
    log: bool = False
    """Whether a range is sampled uniformly on a logarithmic scale rather than a linear one."""

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
    """Hyperparameter search. Each trial trains one stage or both and is evaluated on validation songs."""

    stage: Literal["pretrain", "finetune", "both"] = "pretrain"
    """Stage or stages that each trial trains. `finetune` starts every trial from the same semantic model."""
    study: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the study and of its folder below `runs/tune/`. A search with the name of an earlier study continues it.
    Null: the name of the stage."""
    space: (
        dict[
            str, Annotated[Dimension, BeforeValidator(_values_or_range, json_schema_input_type=Dimension | list[Value])]
        ]
        | None
    ) = None
    """Search space: dotted configuration keys with a list of values, or a range {low, high, log}. Null: temperature,
    whether it is learned, batch size and learning rate."""
    trials: int = Field(20, ge=1)
    """Total number of trials. A finished search continues when this number is increased."""
    samples: int | None = Field(None, ge=2)
    """Number of songs or pairs that a trial trains on in each stage, for any batch size. Null: as many as the
    configured run."""
    reports: int = Field(10, ge=1)
    """Number of evaluations of a trial, each after the same number of songs or pairs."""
    objectives: (
        Annotated[tuple[Objective, ...], BeforeValidator(one_or_many), Field(min_length=1, max_length=2)] | None
    ) = None
    """One or two objectives: `semantic` (text to audio retrieval) and `preference` (trigger song to recalled song). Two
    yield a Pareto front. Null: that of the last stage."""
    metric: Literal["recall@10", "ndcg@10"] = "recall@10"
    """Metric of the objectives, in one fixed gallery of validation songs."""
    early_stopping: bool = True
    """Whether to stop trials that are behind others after the same number of songs or pairs (ASHA, arXiv 1810.05934).
    With two objectives no trial is stopped."""
    grace_share: float = Field(0.25, gt=0, le=1)
    """Share of its training, above 0 and up to 1, that a trial completes before it can be stopped."""
    max_concurrent_trials: int | None = Field(None, ge=1)
    """Maximum number of trials at the same time. Null: as many as fit on the cluster at its maximum size."""
    seed: Seed = 0
    """Seed of the search. The seeds of training are those of the stages, the same in every trial."""

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
        """The stages that a trial trains, in this order."""
        return ("pretrain", "finetune") if self.stage == "both" else (self.stage,)

    @property
    def judged_by(self) -> tuple[Objective, ...]:
        """The objectives, or the default of the stage."""
        return self.objectives or (("semantic",) if self.stage == "pretrain" else ("preference",))

    @property
    def name(self) -> str:
        """The name of the study."""
        return self.study or self.stage
