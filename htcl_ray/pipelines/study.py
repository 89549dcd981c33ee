"""A search while it runs: Optuna's suggestions get numbers, Ray Tune's results go into the trial table, and a person sees both."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution
from ray.tune import Callback
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from htcl_ray.pipelines.report_to_tune import CONTROLLER
from htcl_ray.pipelines.train import CHECKPOINT_LIST
from htcl_ray.pipelines.trial import trial_folder, trial_version
from htcl_ray.storage import Workspace
from htcl_ray.training.metrics_log import METRICS
from htcl_ray.tuning.live_table import live_table, progress_line
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.trials import NUMBER, Trial, write_trials
from htcl_ray.tuning.wording import short_names, value_text

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_TABLES = 60.0
DUPLICATES_IN_A_ROW = 50
ABORT_SECONDS = 30


class StudyTable:
    """The trials of a study, kept in the workspace; this process is the only one that writes them."""

    def __init__(self, workspace: Workspace, study: str, trials: Sequence[Trial]) -> None:
        self.workspace, self.study = workspace, study
        self.trials = {trial.number: trial for trial in trials}

    def begin(self, parameters: Parameters) -> Trial:
        """A new trial with the next number."""
        trial = Trial(number=max(self.trials, default=-1) + 1, parameters=dict(parameters))
        self.trials[trial.number] = trial
        self.save()
        return trial

    def same_as(self, parameters: Parameters) -> Trial | None:
        """The trial that has these parameters."""
        return next((trial for trial in self.trials.values() if trial.parameters == parameters), None)

    def save(self) -> None:
        """Write the table."""
        write_trials(self.workspace, self.study, self.trials.values())


class StudySearch(OptunaSearch):
    """Optuna's suggestions as `{"number": …, "parameters": …}`; a point that was tried is not tried again."""

    def __init__(
        self, space: Mapping[str, BaseDistribution], metrics: Sequence[str], study: optuna.Study, storage: Any, table: StudyTable
    ) -> None:
        single = len(metrics) == 1
        super().__init__(
            space=dict(space),
            metric=metrics[0] if single else list(metrics),
            mode="max" if single else ["max"] * len(metrics),
            sampler=study.sampler,
            study_name=study.study_name,
            storage=storage,
        )
        self._table = table

    def suggest(self, trial_id: str) -> Any:
        """The next point, or FINISHED when the space has no other."""
        for _ in range(DUPLICATES_IN_A_ROW):
            parameters = super().suggest(trial_id)
            asked = self._ot_trials[trial_id]
            number = asked.user_attrs.get(NUMBER)
            before = self._table.same_as(parameters) if number is None else None
            if before is None:
                if number is None:
                    number = self._table.begin(parameters).number
                    asked.set_user_attr(NUMBER, number)
                return {"number": number, "parameters": parameters}
            self._ot_study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)
        return Searcher.FINISHED


class StudyCallback(Callback):
    """Keeps the table and the terminal level with Ray Tune."""

    def __init__(self, table: StudyTable, objectives: Mapping[str, str], total: int, rows: int) -> None:
        """`objectives`: name → metric that the workers report. `total`: trials of the study; `rows`: of a whole trial."""
        self.table, self.objectives, self.total, self.rows = table, objectives, total, rows
        self.started = self.line_at = self.table_at = time.monotonic()
        self.changed = False
        self.rows_before = sum(trial.last.get("rows", 0) for trial in table.trials.values())
        self.controllers: dict[int, Any] = {}

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """A measurement."""
        ours = self._ours(trial)
        figures = {name: float(result[metric]) for name, metric in self.objectives.items()}
        self.controllers[ours.number] = result.pop(CONTROLLER)
        ours.measure({"rows": result["rows_seen"], **figures, "songs_per_second": result["songs_per_second"]})
        for work in (*result["earlier_work"], result["work"]):
            ours.worked(work["started"], work["nodes"], work["seconds"])
        self._save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial has seen all its rows, or was stopped early."""
        ours = self._ours(trial)
        if not ours.history:
            self._end(ours, "failed", "it ended without a measurement")
        else:
            self._end(ours, "finished" if ours.last["rows"] >= self.rows else "stopped")
        controller = self.controllers.pop(ours.number, None)
        if ours.state == "stopped" and controller is not None:
            # Tune would let go of the trial's process, or keep it for later, and leave the CPUs to an actor of Train that asks Ray's
            # dashboard whether the controller is gone: on a private cluster, for ever.
            ray.wait([controller.abort.remote()], timeout=ABORT_SECONDS)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the search goes on."""
        file = Path(trial.error_file) if trial.error_file else None
        self._end(self._ours(trial), "failed", sentence(file.read_text(encoding="utf-8") if file and file.exists() else ""))

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Say how far the search is, every few seconds."""
        now, ours = time.monotonic(), list(self.table.trials.values())
        if now - self.line_at < SECONDS_BETWEEN_LINES:
            return
        self.line_at = now
        print(
            progress_line(ours, list(self.objectives), self.total, self.rows, now - self.started, rows_before=self.rows_before), flush=True
        )
        if self.changed and now - self.table_at >= SECONDS_BETWEEN_TABLES:
            self.table_at, self.changed = now, False
            Console().print(live_table(ours, list(self.objectives), self.total, self.rows))

    def _ours(self, trial: Any) -> Trial:
        return self.table.trials[trial.config["number"]]

    def _end(self, trial: Trial, state: Any, error: str | None = None) -> None:
        trial.state, trial.error = state, error
        found = ", ".join(f"{name} {trial.last[name]:.4f}" for name in self.objectives if name in trial.last)
        after = f" after {trial.last['rows']:,.0f} rows" if trial.history else ""
        names = short_names(trial.parameters)
        tried = ", ".join(f"{names[key]} {value_text(value)}" for key, value in trial.parameters.items())
        print(f"tune  trial {trial.number} {state}{after}: {error or found}  ({tried})", flush=True)
        self._save()
        tidy(self.table.workspace, self.table.study, trial)

    def _save(self) -> None:
        self.changed = True
        self.table.save()


def catch_up(workspace: Workspace, study: str, trial: Trial, stage: str, objectives: Mapping[str, str], rows: int) -> None:
    """Take what a trial of a killed search had measured before its end from its metrics; it is finished if it had seen all its `rows`."""
    file = f"{trial_folder(study, trial.number)}/runs/{stage}/{trial_version(study, trial.number)}/{METRICS}"
    lines = workspace.read_bytes(file).decode().splitlines() if workspace.exists(file) else []
    for line in map(json.loads, lines):
        figures = {name: line[metric] for name, metric in objectives.items()}
        trial.measure({"rows": line["rows_seen"], **figures, "songs_per_second": line["songs_per_second"]})
    if trial.history and trial.last["rows"] >= rows:
        trial.state = "finished"


def sentence(trace: str) -> str:
    """What went wrong, from the text of a trace: its last line, without the name of the error."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1])[:500] if lines else "no reason was given"


def tidy(workspace: Workspace, study: str, trial: Trial) -> None:
    """Remove the checkpoints and models of a trial that has ended, so that only running trials take space; its metrics stay."""
    folder = trial_folder(study, trial.number)
    if workspace.exists(f"{folder}/models"):
        workspace.fs.delete_dir(workspace.full(f"{folder}/models"))
    runs = [
        f"{folder}/runs/{step}/{run}"
        for step in workspace.children(f"{folder}/runs")
        for run in workspace.children(f"{folder}/runs/{step}")
    ]
    for run in runs:
        for name in workspace.children(run):
            if name == CHECKPOINT_LIST:
                workspace.fs.delete_file(workspace.full(f"{run}/{name}"))
            elif name.startswith("checkpoint_"):
                workspace.fs.delete_dir(workspace.full(f"{run}/{name}"))
