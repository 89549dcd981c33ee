"""The trial table of a study, from which the whole study is rebuilt.

One line of JSON for each trial, in the study's folder. The file is always written whole, as object storage requires.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict

from pydantic import TypeAdapter, ValidationError

from htcl_ray.errors import WorkspaceError
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.trials import Trial
from htcl_ray.workspace.storage import Workspace

FILE = "trials.jsonl"


def trial_folder(study: str, number: int) -> str:
    """Folder of a trial, below the workspace's root."""
    return f"{study}/trials/{number:04d}"


def trial_version(study: str, number: int) -> str:
    """Name of a trial's runs, in the workspace and in MLflow and W&B."""
    return f"{study.rpartition('/')[2]}-{number:04d}"


def read_trials(workspace: Workspace, study: str) -> list[Trial]:
    """Trials of a study by number; empty when the study does not exist. Raises WorkspaceError with the damaged line."""
    path = f"{study}/{FILE}"
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
    workspace.write_bytes(f"{study}/{FILE}", "".join(f"{line}\n" for line in lines).encode())


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
