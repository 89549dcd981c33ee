"""The gate: bounds on the metrics of an evaluation.

A bound on one metric applies to its value. A bound on a difference applies to the end of its paired 95 % interval that
is harder to satisfy: at least 0 requires that the whole interval is at least 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from htcl_ray.config.sections.base import Settings, nearest
from htcl_ray.errors import ConfigError, Fault, first_fault
from htcl_ray.evaluation.metrics import lower_is_better
from htcl_ray.evaluation.stats.bootstrap import ROUNDING, Estimate, comparable, difference
from htcl_ray.evaluation.task_result import MetricKey

DEFAULT = "default"
FORM = "expected TASK.METHOD.METRIC, such as cold.preference.ndcg@10"


class Bound(Settings):
    """A bound on one metric."""

    figure: str
    """TASK.METHOD.METRIC; the method may contain dots, as in `cold.blend_0.5.ndcg@10`."""
    over: str | None = None
    """Compare with the same metric of this method."""
    over_served: bool = False
    """Compare with the model being served, which is evaluated on the same songs, users and candidates for this
    purpose."""
    at_least: float | None = None
    """Minimum of the value; for a difference, of the low end of its interval."""
    at_most: float | None = None
    """Maximum of the value; for a difference, of the high end of its interval."""
    ratio_at_least: float | None = None
    """Minimum of the value divided by the other value; for metrics of which higher is better."""
    shown: bool = False
    """Require a significant improvement: the interval of the difference lies on the better side of 0."""
    optional: bool = False
    """Pass when a value is missing, which otherwise fails. While a model is being served, an `over_served` bound
    requires its value all the same, unless it is about stage 2 and neither model has one."""

    @property
    def key(self) -> MetricKey:
        """Task, method, metric."""
        task, rest = self.figure.split(".", 1)
        method, metric = rest.rsplit(".", 1)
        return task, method, metric

    @property
    def is_difference(self) -> bool:
        """Whether the bound applies to a difference."""
        return (self.over is not None or self.over_served) and self.ratio_at_least is None

    @property
    def description(self) -> str:
        """The bound as text."""
        other = "the model being served" if self.over_served else self.over
        value = f"{self.figure} over {other}" if self.is_difference else self.figure
        limits = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        limits += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        limits += [f"at least {self.ratio_at_least:g} of {other}"] if self.ratio_at_least is not None else []
        limits += ["significantly better"] if self.shown else []
        return f"{value}: {' and '.join(limits)}"

    @field_validator("figure")
    @classmethod
    def _check_figure(cls, value: str) -> str:
        parts = value.split(".")
        if len(parts) < 3 or not all(parts):
            raise ValueError(f"'{value}' names no metric; {FORM}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.over is not None and self.over_served:
            raise ValueError(f"{self.figure} has both over and over_served; choose one")
        compared = self.over is not None or self.over_served
        if not compared and (self.ratio_at_least is not None or self.shown):
            raise ValueError(
                f"{self.figure} has {'shown' if self.shown else 'ratio_at_least'} but nothing to compare with; add over"
            )
        if self.ratio_at_least is not None and lower_is_better(self.key[2]):
            raise ValueError(
                f"{self.figure} is better when it is lower, which ratio_at_least would forbid; bound the difference "
                "with at_most"
            )
        ends = self.at_least is not None or self.at_most is not None or self.shown
        if ends == (self.ratio_at_least is not None):
            raise ValueError(f"{self.figure} needs at_least, at_most or shown, or else ratio_at_least alone")
        return self


class Gate(Settings):
    """Content of a gate file."""

    bounds: tuple[Bound, ...] = Field(min_length=1)


@dataclass(frozen=True)
class BoundResult:
    """One bound, and the measured value."""

    bound: Bound
    value: float | None
    """The metric, its difference or its ratio; None when it could not be measured."""
    low: float | None
    """Low end of the 95 % interval; None without one."""
    high: float | None
    """High end of the interval."""
    note: str = ""
    required: bool = False
    """Whether a missing value fails although the bound is optional, because a model is being served."""

    @property
    def passed(self) -> bool:
        """Whether the bound holds."""
        bound, value = self.bound, self.value
        if value is None:
            return bound.optional and not self.required
        if bound.ratio_at_least is not None:
            return value >= bound.ratio_at_least
        low, high = (self.low, self.high) if bound.is_difference else (None, None)
        at_least = bound.at_least is None or (value if low is None else low) >= bound.at_least
        at_most = bound.at_most is None or (value if high is None else high) <= bound.at_most
        if not bound.shown:
            return at_least and at_most
        better = (
            high is not None and high < -ROUNDING
            if lower_is_better(bound.key[2])
            else low is not None and low > ROUNDING
        )
        return at_least and at_most and better

    def as_json(self) -> dict[str, Any]:
        """Content for the report and gate.json: the bound, its description, the measured value and the verdict."""
        measured = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "passed": self.passed,
            "note": self.note,
            "required": self.required,
        }
        return {
            "figure": self.bound.figure,
            "asked": self.bound.description,
            **measured,
            "bound": self.bound.model_dump(exclude_defaults=True),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> BoundResult:
        """Read the result of `as_json`; `passed` is computed again.

        Raises ValueError, KeyError or TypeError for any other content.
        """
        value, low, high = (None if tree[name] is None else float(tree[name]) for name in ("value", "low", "high"))
        return cls(Bound.model_validate(tree["bound"]), value, low, high, str(tree["note"]), bool(tree["required"]))


@dataclass(frozen=True)
class GateVerdict:
    """All bounds of a gate with their measured values."""

    results: tuple[BoundResult, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(result.passed for result in self.results)

    @property
    def failed(self) -> list[BoundResult]:
        """The bounds that do not hold."""
        return [result for result in self.results if not result.passed]


def judge(
    gate: Gate,
    metrics: Mapping[MetricKey, Estimate],
    served: Mapping[MetricKey, Estimate] | None = None,
    *,
    unmeasured: str | None = None,
) -> GateVerdict:
    """Apply the bounds to the metrics of an evaluation.

    `served`: metrics of the model being served on the same test set, None when no model is served; `unmeasured`: the
    reason why the model being served could not be evaluated on it.
    """
    return GateVerdict(tuple(_judge(bound, metrics, served, unmeasured) for bound in gate.bounds))


def read_gate(path: str) -> Gate:
    """Read the gate of a file, or the shipped one for `default`. Raises ConfigError."""
    try:
        if path == DEFAULT:
            text = resources.files("htcl_ray.evaluation").joinpath("gate.yaml").read_text(encoding="utf-8")
        else:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(
            f"cannot read the gate {path}: {error.strerror}; expected a YAML file, or 'default' for the shipped one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"the gate {path} is not YAML: {str(error).splitlines()[0]}") from None
    try:
        return Gate.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"the gate {path} cannot be used: {_explain_fault(first_fault(error))}") from None


def _judge(
    bound: Bound,
    metrics: Mapping[MetricKey, Estimate],
    served: Mapping[MetricKey, Estimate] | None,
    unmeasured: str | None,
) -> BoundResult:
    own_has, served_has = (any(of == bound.key[1] for _, of, _ in known or ()) for known in (metrics, served))
    required = bound.over_served and (unmeasured is not None or (served is not None and (own_has or served_has)))
    own = metrics.get(bound.key)
    if own is None or math.isnan(own.value):
        return BoundResult(bound, None, None, None, _missing(bound.key, metrics), required)
    if bound.over is not None:
        reference = _Reference(metrics, bound.over)
    elif not bound.over_served:
        return BoundResult(bound, own.value, *(own.interval or (None, None)))
    elif unmeasured is not None:
        note = f"the model being served could not be evaluated on this test set: {unmeasured}"
        return BoundResult(bound, None, None, None, note, required)
    elif served is None:
        return BoundResult(bound, None, None, None, "no model is being served", required)
    else:  # a model without stage 2 serves its stage 1
        reference = _Reference(served, bound.key[1] if served_has else "semantic", " of the model being served")
    return _compare(bound, own, reference, required)


@dataclass(frozen=True)
class _Reference:
    """The metrics that a bound compares with."""

    metrics: Mapping[MetricKey, Estimate]
    method: str
    whose: str = ""


def _compare(bound: Bound, own: Estimate, reference: _Reference, required: bool) -> BoundResult:
    task, method, metric = bound.key
    key = (task, reference.method, metric)
    name = f"{'.'.join(key)}{reference.whose}"

    def without_value(note: str) -> BoundResult:
        return BoundResult(bound, None, None, None, note, required)

    other = reference.metrics.get(key)
    if other is None or math.isnan(other.value):
        return without_value(_missing(key, reference.metrics) + reference.whose)
    if not comparable(own, other):
        return without_value(
            f"{name} was measured on other songs, users or candidates, so no paired difference can be computed"
        )
    if bound.ratio_at_least is not None:
        if other.value <= 0:
            return without_value(f"{name} is {other.value:g}, expected more than 0 for a ratio")
        return BoundResult(bound, own.value / other.value, None, None, f"{own.value:.4g} of {other.value:.4g}")
    gain = difference(own, other)
    if own.resampled is not None and gain.interval is None:
        return without_value(f"the difference from {name} has no paired interval")
    note = f"{own.value:.4g} against {other.value:.4g}"
    if reference.method != (bound.over or method):
        note += f" ({reference.method}, as the model being served has no {method} space)"
    low, high = gain.interval or (None, None)
    return BoundResult(bound, gain.value, low, high, note)


def _missing(key: MetricKey, metrics: Mapping[MetricKey, Estimate]) -> str:
    name = ".".join(key)
    if key in metrics:
        return f"{name} has no value"
    return f"{name} was not measured" + (
        f"; {nearest(name, ['.'.join(known) for known in metrics])}" if metrics else ""
    )


def _explain_fault(fault: Fault) -> str:
    if fault.kind == "extra_forbidden":
        known = Bound.model_fields if len(fault.path) > 1 else Gate.model_fields
        return f"unknown key '{fault.key}'; {nearest(fault.path[-1], known)}"
    return f"key '{fault.key}': {fault.message}" if fault.key else f"{fault.message}; expected a list 'bounds:'"
