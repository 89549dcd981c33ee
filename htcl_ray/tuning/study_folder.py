"""The folder of a study: its record (study.json) and the table of its trials (trials.jsonl).

The record holds everything that has to stay the same while the study lasts. The study is rebuilt from the table, which
has one line of JSON for each trial; the file is always written whole, as object storage requires.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pydantic import TypeAdapter, ValidationError

from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, Dimension
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.space import Parameters, Space
from htcl_ray.tuning.trials import Trial
from htcl_ray.workspace.storage import Workspace

RECORD = "study.json"
TRIALS = "trials.jsonl"


def trial_folder(study: str, number: int) -> str:
    """Folder of a trial, below the workspace's root."""
    return f"{study}/trials/{number:04d}"


def trial_version(study: str, number: int) -> str:
    """Name of a trial's runs, in the workspace and in MLflow and W&B."""
    return f"{study.rpartition('/')[2]}-{number:04d}"


def read_trials(workspace: Workspace, study: str) -> list[Trial]:
    """Trials of a study by number; empty when the study does not exist. Raises WorkspaceError with the damaged line."""
    path = f"{study}/{TRIALS}"
    lines = workspace.read_bytes(path).splitlines() if workspace.exists(path) else []
    adapter, trials = TypeAdapter(Trial), []
    for number, line in enumerate(lines, 1):
        try:
            trials.append(adapter.validate_json(line))
        except ValidationError:
            raise WorkspaceError(
                f"line {number} of {workspace.uri_of(path)} is not a trial; remove the study's folder, "
                "or name another with tune.study"
            ) from None
    return trials


def write_trials(workspace: Workspace, study: str, trials: Iterable[Trial]) -> None:
    """Write the whole table."""
    lines = [json.dumps(asdict(trial)) for trial in sorted(trials, key=lambda trial: trial.number)]
    workspace.write_bytes(f"{study}/{TRIALS}", "".join(f"{line}\n" for line in lines).encode())


class TrialTable:
    """The trials of a study and their file. The process of the search is the only writer."""

    def __init__(self, workspace: Workspace, study: str, trials: Sequence[Trial]) -> None:
        self.workspace, self.study = workspace, study
        self.trials = {trial.number: trial for trial in trials}

    @property
    def next_number(self) -> int:
        """Number of the next new trial."""
        return max(self.trials, default=-1) + 1

    def begin(self, parameters: Parameters) -> Trial:
        """Add a trial with the next number, and save the table."""
        trial = Trial(number=self.next_number, parameters=dict(parameters))
        self.trials[trial.number] = trial
        self.save()
        return trial

    def save(self) -> None:
        """Write the table."""
        write_trials(self.workspace, self.study, self.trials.values())


def study_record(
    config: Config,
    space: Space,
    budgets: Mapping[str, Budget],
    gallery: Mapping[str, Any],
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """The record of a study. `gallery`: description of the validation gallery; `inputs`: versions by kind."""
    return {
        "stage": config.tune.stage,
        "space": {
            key: dimension.model_dump(mode="json", exclude_defaults=True) for key, dimension in sorted(space.items())
        },
        "objectives": list(config.tune.judged_by),
        "metric": config.tune.metric,
        "rows": {name: [budget.rows_per_report, budget.reports] for name, budget in budgets.items()},
        "inputs": dict(inputs),
        "gallery": dict(gallery),
        "configuration": _fixed_settings(config, space),
    }


def check_same_study(recorded: Mapping[str, Any], current: Mapping[str, Any], location: str) -> None:
    """Check that a command continues the recorded study. Raises ConfigError with the first difference."""
    before, now = _flat(recorded), _flat(current)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"the study in {location} was begun with {name} {before.get(name)}, and this command says "
                f"{now.get(name)}; name another study with tune.study, or search as before"
            )


def _fixed_settings(config: Config, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """Configured values that determine a model and are not searched: equal in every trial."""
    sections = {name: getattr(config, name) for name in ("audio", "model", "text")}
    sections |= {name: getattr(config, name).resolved() for name in config.tune.stages}
    tree = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
        if f"{section}.{key}" not in space
        and not (section in config.tune.stages and key in (*NOT_IN_MODEL, "epochs", "best_metric"))
    }


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with one entry for each value; the space is one entry."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        inner = value if isinstance(value, dict) and name != "space" else {"": value}
        flat |= {" ".join(filter(None, (name, key))): of_key for key, of_key in inner.items()}
    return flat
