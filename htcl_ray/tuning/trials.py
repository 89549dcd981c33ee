"""The trial table: what each trial tried, how far it came and what it cost. A study is rebuilt from it, so it is all
that is kept.

One line of JSON a trial, in the study's folder; rewritten whole, so that it works on object storage.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from pydantic import ConfigDict, TypeAdapter, ValidationError

from htcl_ray.errors import WorkspaceError
from htcl_ray.tuning.space import Parameters
from htcl_ray.workspace.storage import Workspace

State = Literal["running", "finished", "stopped", "failed"]
TABLE = "trials.jsonl"
NUMBER = "number"


@dataclass
class Trial:
    """One trial of a study."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    number: int
    """From 0; names its folder."""
    parameters: Parameters
    state: State = "running"
    """running: also while it waits for a node, and after a search that was killed. stopped: early, being behind.
    failed: see `error`."""
    history: list[dict[str, float]] = field(default_factory=list)
    """A measurement each: `rows` seen of the last stage, each objective, `songs_per_second`."""
    attempts: dict[str, list[float]] = field(default_factory=dict)
    """Start of a group of workers, in epoch seconds, → nodes that they were on, seconds until the last measurement."""
    error: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state != "running"

    @property
    def last(self) -> Mapping[str, float]:
        """The newest measurement; empty before the first."""
        return self.history[-1] if self.history else {}

    @property
    def node_seconds(self) -> float:
        """Nodes × seconds, from the start of workers to their last measurement, over stages and attempts that measured
        anything.
        """
        return sum(nodes * seconds for nodes, seconds in self.attempts.values())

    def values(self, objectives: Sequence[str]) -> tuple[float, ...] | None:
        """The newest value of each objective; None before the first measurement."""
        return tuple(self.last[name] for name in objectives) if self.history else None

    def measure(self, figures: Mapping[str, float]) -> None:
        """Add a measurement. One that a resumed trial repeats takes the place of the old one."""
        self.history = [item for item in self.history if item["rows"] < figures["rows"]] + [dict(figures)]

    def worked(self, started: float, nodes: float, seconds: float) -> None:
        """Note what a group of workers has cost until now."""
        self.attempts[f"{started:.3f}"] = [nodes, seconds]


def read_trials(workspace: Workspace, study: str) -> list[Trial]:
    """The trials of the study in this folder, by number; empty when there is none. Raises WorkspaceError when the table
    is damaged.
    """
    path = f"{study}/{TABLE}"
    lines = workspace.read_bytes(path).splitlines() if workspace.exists(path) else []
    one, trials = TypeAdapter(Trial), []
    for number, line in enumerate(lines, 1):
        try:
            trials.append(one.validate_json(line))
        except ValidationError:
            raise WorkspaceError(
                f"line {number} of {workspace.uri_of(path)} is not a trial; remove the study's folder, or name another with tune.study"
            ) from None
    return trials


def write_trials(workspace: Workspace, study: str, trials: Iterable[Trial]) -> None:
    """Write the table, whole."""
    lines = [json.dumps(asdict(trial)) for trial in sorted(trials, key=lambda trial: trial.number)]
    workspace.write_bytes(f"{study}/{TABLE}", "".join(f"{line}\n" for line in lines).encode())


def sampler(seed: int, number: int, attempt: int) -> optuna.samplers.BaseSampler:
    """The sampler of one proposal: the `attempt`-th for the trial of this number.

    What it proposes is a function of these and of the study, and not of earlier proposals, so a search that was killed
    and resumed proposes what an uninterrupted one would.
    """
    (derived,) = np.random.SeedSequence([seed, number, attempt]).generate_state(1)
    with quiet_optuna():
        return optuna.samplers.TPESampler(seed=int(derived), constant_liar=True)


def optuna_study(
    trials: Iterable[Trial],
    space: Mapping[str, BaseDistribution],
    objectives: Sequence[str],
    *,
    storage: optuna.storages.BaseStorage | None = None,
) -> optuna.Study:
    """The study that these trials make up, in the order of their numbers; to be maximised.

    A finished trial is complete, a stopped one pruned (with two objectives, of which Optuna prunes none: complete), and
    one that failed has no value. One that was running is enqueued, so that it is the next to be asked for, with the
    same parameters.
    """
    with quiet_optuna():
        study = optuna.create_study(directions=["maximize"] * len(objectives), storage=storage)
        for trial in sorted(trials, key=lambda trial: trial.number):
            values = trial.values(objectives)
            if not trial.ended:
                study.enqueue_trial(trial.parameters, user_attrs={NUMBER: trial.number})
            if not trial.ended or (values is None and trial.state != "failed"):
                continue
            failed = trial.state == "failed"
            study.add_trial(
                optuna.trial.create_trial(
                    state=optuna.trial.TrialState.FAIL if failed else told_state(trial.state == "stopped", objectives),
                    values=None if failed else values,
                    params=trial.parameters,
                    distributions=dict(space),
                    user_attrs={NUMBER: trial.number},
                    intermediate_values={}
                    if len(objectives) > 1
                    else {int(item["rows"]): item[objectives[0]] for item in trial.history},
                )
            )
    return study


def told_state(stopped: bool, objectives: Sequence[str]) -> optuna.trial.TrialState:
    """What Optuna is told of a trial that measured something and did not fail."""
    return optuna.trial.TrialState.PRUNED if stopped and len(objectives) == 1 else optuna.trial.TrialState.COMPLETE


def winners(trials: Iterable[Trial], objectives: Sequence[str]) -> list[Trial]:
    """The finished trials that none beats, of equals the first: the best, or with two objectives the Pareto front, best
    sum first.
    """
    finished = [(trial, trial.values(objectives)) for trial in trials if trial.state == "finished" and trial.history]
    front = [
        (trial, values)
        for trial, values in finished
        if not any(
            _beats(other, values) or (other == values and before.number < trial.number) for before, other in finished
        )
    ]
    return [trial for trial, values in sorted(front, key=lambda item: (-sum(item[1] or ()), item[0].number))]


def _beats(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> bool:
    assert first is not None
    assert second is not None
    return first != second and all(a >= b for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna's lines about every trial, and about what it calls experimental, stay out of the terminal."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
