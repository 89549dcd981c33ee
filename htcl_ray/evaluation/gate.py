"""The gate: bounds on an evaluation's figures, and whether they hold.

A bound on one figure holds for its value. A bound on the difference from another figure holds for the end of the paired
95 % interval that makes it harder: at least 0 means that the whole interval is from 0 up.
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
from htcl_ray.evaluation.report.resamples import Key
from htcl_ray.evaluation.stats.bootstrap import ROUNDING, Estimate, comparable, difference
from htcl_ray.evaluation.task_result import lower_is_better

DEFAULT = "default"
FORM = "expected TASK.METHOD.FIGURE, such as cold.preference.ndcg@10"


class Bound(Settings):
    """What is asked of one figure."""

    figure: str
    """TASK.METHOD.FIGURE; the method may hold dots, as in `cold.blend_0.5.ndcg@10`."""
    over: str | None = None
    """Compare with the same figure of this method."""
    over_served: bool = False
    """Compare with the model that is being served, which is evaluated on the same songs, users and candidates for
    it."""
    at_least: float | None = None
    """Of the value; of a difference, its interval's low end."""
    at_most: float | None = None
    """Of the value; of a difference, its interval's high end."""
    ratio_at_least: float | None = None
    """Of the value divided by the other's; for metrics of which more is better."""
    shown: bool = False
    """The difference's interval lies on the better side of 0."""
    optional: bool = False
    """Holds when something was not measured, which otherwise fails. Once a model is being served, an `over_served`
    bound needs its value all the same, unless it is about stage 2 and neither model has one."""

    @property
    def key(self) -> Key:
        """Task, method, figure."""
        task, rest = self.figure.split(".", 1)
        method, figure = rest.rsplit(".", 1)
        return task, method, figure

    @property
    def is_difference(self) -> bool:
        """Whether another figure is subtracted."""
        return (self.over is not None or self.over_served) and self.ratio_at_least is None

    @property
    def asked(self) -> str:
        """The bound in words."""
        other = "the model being served" if self.over_served else self.over
        value = f"{self.figure} over {other}" if self.is_difference else self.figure
        wants = [f"at least {self.at_least:g}"] if self.at_least is not None else []
        wants += [f"at most {self.at_most:g}"] if self.at_most is not None else []
        wants += [f"at least {self.ratio_at_least:g} of {other}"] if self.ratio_at_least is not None else []
        wants += ["shown to be better"] if self.shown else []
        return f"{value}: {' and '.join(wants)}"

    @field_validator("figure")
    @classmethod
    def _check_figure(cls, value: str) -> str:
        parts = value.split(".")
        if len(parts) < 3 or not all(parts):
            raise ValueError(f"'{value}' names no figure; {FORM}")
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
                f"{self.figure} is better when it is lower, which ratio_at_least would forbid; bound the difference with at_most"
            )
        ends = self.at_least is not None or self.at_most is not None or self.shown
        if ends == (self.ratio_at_least is not None):
            raise ValueError(f"{self.figure} needs at_least, at_most or shown, or else ratio_at_least alone")
        return self


class Gate(Settings):
    """Content of a gate file."""

    bounds: tuple[Bound, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Result:
    """One bound, and what was measured."""

    bound: Bound
    value: float | None
    """The figure, its difference or its ratio; None when it could not be measured."""
    low: float | None
    """Of the 95 % interval; None where there is none."""
    high: float | None
    note: str = ""
    required: bool = False
    """Whether it fails without a value although the bound is optional: a model is being served that it must be compared
    with."""

    @property
    def passed(self) -> bool:
        """Whether the bound holds for what was measured."""
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
        """For the report and for gate.json: the bound, the same in words, what was measured, whether it holds."""
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
            "asked": self.bound.asked,
            **measured,
            "bound": self.bound.model_dump(exclude_defaults=True),
        }

    @classmethod
    def from_json(cls, tree: Mapping[str, Any]) -> Result:
        """What `as_json` was called on; `passed` is judged anew. Raises ValueError, KeyError or TypeError for anything
        else.
        """
        value, low, high = (None if tree[name] is None else float(tree[name]) for name in ("value", "low", "high"))
        return cls(Bound.model_validate(tree["bound"]), value, low, high, str(tree["note"]), bool(tree["required"]))


@dataclass(frozen=True)
class Verdict:
    """All bounds of a gate with what was measured."""

    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """Whether every bound holds."""
        return all(result.passed for result in self.results)

    @property
    def failed(self) -> list[Result]:
        """The bounds that do not hold."""
        return [result for result in self.results if not result.passed]


def judge(
    gate: Gate,
    figures: Mapping[Key, Estimate],
    served: Mapping[Key, Estimate] | None = None,
    *,
    unmeasured: str | None = None,
) -> Verdict:
    """Hold the bounds against an evaluation's figures.

    `served`: figures of the model being served on the same test set, None when there is none; `unmeasured`: why there
    is one that could not be evaluated on it.
    """
    return Verdict(tuple(_judge(bound, figures, served, unmeasured) for bound in gate.bounds))


def read_gate(path: str) -> Gate:
    """The gate of a file, or the shipped one for `default`. Raises ConfigError."""
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
    bound: Bound, figures: Mapping[Key, Estimate], served: Mapping[Key, Estimate] | None, unmeasured: str | None
) -> Result:
    task, method, figure = bound.key
    own_has, served_has = (any(of == method for _, of, _ in known or ()) for known in (figures, served))
    required = bound.over_served and (unmeasured is not None or (served is not None and (own_has or served_has)))

    def without_value(note: str) -> Result:
        return Result(bound, None, None, None, note, required)

    own = figures.get(bound.key)
    if own is None or math.isnan(own.value):
        return without_value(_missing(bound.key, figures))
    if bound.over is None and not bound.over_served:
        return Result(bound, own.value, *(own.interval or (None, None)))
    if bound.over_served and unmeasured is not None:
        return without_value(f"the model being served could not be evaluated on this test set: {unmeasured}")
    if bound.over_served and served is None:
        return without_value("no model is being served")
    against, whose, against_method = figures, "", bound.over or method
    if bound.over_served and served is not None:
        against, whose = served, " of the model being served"
        if not served_has:  # it has no stage 2: what it serves is its stage 1
            against_method = "semantic"
    key = (task, against_method, figure)
    other = against.get(key)
    if other is None or math.isnan(other.value):
        return without_value(_missing(key, against) + whose)
    if not comparable(own, other):
        return without_value(
            f"{'.'.join(key)}{whose} was measured on other songs, users or candidates, so there is no paired difference"
        )
    if bound.ratio_at_least is not None:
        if other.value <= 0:
            return without_value(f"{'.'.join(key)}{whose} is {other.value:g}, which nothing can be a share of")
        return Result(bound, own.value / other.value, None, None, f"{own.value:.4g} of {other.value:.4g}")
    gain = difference(own, other)
    if own.resampled is not None and gain.interval is None:
        return without_value(f"the difference from {'.'.join(key)}{whose} has no paired interval")
    low, high = gain.interval or (None, None)
    named = (
        ""
        if against_method == (bound.over or method)
        else f" ({against_method}, as the model being served has no {method} space)"
    )
    return Result(bound, gain.value, low, high, f"{own.value:.4g} against {other.value:.4g}{named}")


def _missing(key: Key, figures: Mapping[Key, Estimate]) -> str:
    name = ".".join(key)
    if key in figures:
        return f"{name} has no value"
    return f"{name} was not measured" + (
        f"; {nearest(name, ['.'.join(known) for known in figures])}" if figures else ""
    )


def _explain_fault(fault: Fault) -> str:
    if fault.kind == "extra_forbidden":
        known = Bound.model_fields if len(fault.path) > 1 else Gate.model_fields
        return f"there is no key '{fault.key}'; {nearest(fault.path[-1], known)}"
    return f"key '{fault.key}': {fault.message}" if fault.key else f"{fault.message}; expected a list 'bounds:'"
