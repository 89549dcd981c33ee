"""Trials of a study: their records, the decisions about them, and the best of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import ConfigDict

from htcl_ray.tuning.space import Parameters

State = Literal["running", "finished", "stopped", "failed"]
MAX_REASON = 500
"""Characters of a failure's reason."""


@dataclass
class Trial:
    """One trial of a study: its parameters, measurements and cost."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    number: int
    """From 0; part of the name of its folder."""
    parameters: Parameters
    state: State = "running"
    """`running`: also while it waits for a node, and after its search was killed. `stopped`: pruned, by ASHA. `failed`:
    see `error`."""
    history: list[dict[str, float]] = field(default_factory=list)
    """One item for each measurement: `rows` seen of the last stage, each objective, `songs_per_second`."""
    attempts: dict[str, list[float]] = field(default_factory=dict)
    """Start of a group of workers, in epoch seconds → number of their nodes, seconds until their last measurement."""
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether the trial will not be measured again."""
        return self.state != "running"

    @property
    def last(self) -> Mapping[str, float]:
        """The newest measurement; empty before the first."""
        return self.history[-1] if self.history else {}

    @property
    def node_seconds(self) -> float:
        """Nodes × seconds from the start of the workers to their last measurement, over all stages and attempts."""
        return sum(nodes * seconds for nodes, seconds in self.attempts.values())

    def values(self, objectives: Sequence[str]) -> tuple[float, ...] | None:
        """The newest value of each objective; None before the first measurement."""
        return tuple(self.last[name] for name in objectives) if self.history else None

    def measure(self, measurement: Mapping[str, float]) -> None:
        """Add a measurement. It replaces those of as many or more rows, which a resumed trial repeats."""
        self.history = [item for item in self.history if item["rows"] < measurement["rows"]] + [dict(measurement)]

    def add_cost(self, started: float, nodes: float, seconds: float) -> None:
        """Record the nodes and seconds of a group of workers; a later call for the same group replaces them."""
        self.attempts[f"{started:.3f}"] = [nodes, seconds]

    def complete(self, rows: int) -> None:
        """End the trial: finished if it saw all `rows`, stopped if fewer, failed if nothing was measured."""
        if not self.history:
            self.fail("it ended without a measurement")
        else:
            self.state = "finished" if self.last["rows"] >= rows else "stopped"

    def fail(self, reason: str) -> None:
        """End the trial as failed."""
        self.state, self.error = "failed", reason

    def settle(self, rows: int, stopped_after: int | None) -> bool:
        """End a running trial that a killed search would have ended next; return whether it did.

        `rows`: of a whole trial. `stopped_after`: number of measurements after which the scheduler stops the trial;
        None when it continues.
        """
        if self.ended or not self.history:
            return False
        if stopped_after is not None:
            self.state, self.history = "stopped", self.history[:stopped_after]
        elif self.last["rows"] >= rows:
            self.state = "finished"
        return self.ended

    def restarted(self) -> Trial:
        """The same trial before its first measurement; the cost of its attempts is kept."""
        return Trial(self.number, self.parameters, attempts=self.attempts)


def measurement(result: Mapping[str, Any], objectives: Mapping[str, str]) -> dict[str, float]:
    """Item of `Trial.history` from an epoch's metrics. `objectives`: name → metric of the workers."""
    values = {name: float(result[metric]) for name, metric in objectives.items()}
    return {"rows": result["rows_seen"], **values, "songs_per_second": result["songs_per_second"]}


def same_point(trials: Iterable[Trial], parameters: Parameters) -> Trial | None:
    """The trial with these parameters, if any."""
    return next((trial for trial in trials if trial.parameters == parameters), None)


def remaining(trials: Iterable[Trial], wanted: int) -> int:
    """Number of trials that still have to end before `wanted` have; at least 0."""
    return max(wanted - sum(trial.ended for trial in trials), 0)


def winners(trials: Iterable[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The best finished trial; with two objectives the Pareto front, highest sum first.

    Of trials with equal values the one with the lowest number is kept.
    """
    finished = [(trial, trial.values(objectives)) for trial in trials if trial.state == "finished" and trial.history]
    front = [
        (trial, values)
        for trial, values in finished
        if not any(
            _dominates(other, values) or (other == values and before.number < trial.number)
            for before, other in finished
        )
    ]
    return [trial for trial, values in sorted(front, key=lambda item: (-sum(item[1] or ()), item[0].number))]


def _dominates(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> bool:
    assert first is not None
    assert second is not None
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))


def best_so_far(trials: Iterable[Trial], objective: str) -> Trial | None:
    """The best finished trial; before any has finished, the trial with the highest newest value."""
    measured = [trial for trial in trials if trial.history and trial.state != "failed"]
    finished = winners(measured, [objective])
    if finished:
        return finished[0]
    return max(measured, key=lambda trial: (trial.last[objective], -trial.number), default=None)


def failure_reason(trace: str) -> str:
    """Last line of a traceback, without the name of the exception."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1])[:MAX_REASON] if lines else "no reason was given"
