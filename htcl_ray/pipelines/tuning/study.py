"""A running search: adapters that connect the trial table to Ray Tune's searcher, scheduler and callbacks."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
from optuna.distributions import BaseDistribution
from ray.tune import Callback
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from rich.console import Console

from htcl_ray.cluster.ray_internals import optuna_study as optuna_study_of
from htcl_ray.cluster.ray_internals import optuna_trials as optuna_trials_of
from htcl_ray.config.sections import TuneSettings
from htcl_ray.pipelines.tuning.report_to_tune import CONTROLLER
from htcl_ray.progress import Throttle, print_line
from htcl_ray.training.metrics_log import METRICS
from htcl_ray.training.runs import CHECKPOINT_LIST
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.labels import short_names, value_text
from htcl_ray.tuning.live_table import live_table, progress_line
from htcl_ray.tuning.optuna_study import NUMBER, end_state, optuna_study, sampler, suggest
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.study_folder import TrialTable, trial_folder, trial_version
from htcl_ray.tuning.trials import Trial, failure_reason, measurement
from htcl_ray.workspace.storage import Workspace

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_TABLES = 60.0
ABORT_SECONDS = 30
REDUCTION = 3
"""Reduction factor of ASHA: at each rung one trial of this many continues."""


class StudySearch(OptunaSearch):  # type: ignore[misc]  # the library has no types
    """Searcher of Ray Tune with points `{"number": …, "parameters": …}` of the trial table, without duplicates."""

    def __init__(
        self,
        space: Mapping[str, BaseDistribution],
        objectives: Mapping[str, str],
        table: TrialTable,
        *,
        seed: int,
        rows: int,
    ) -> None:
        """Continue the study of the table. `objectives`: name → metric of the workers. `rows`: of a whole trial."""
        metrics = list(objectives.values())
        single = len(metrics) == 1
        storage = optuna.storages.InMemoryStorage()
        study = optuna_study(table.trials.values(), space, list(objectives), storage=storage)
        super().__init__(
            space=dict(space),
            metric=metrics[0] if single else metrics,
            mode="max" if single else ["max"] * len(metrics),
            sampler=sampler(seed, 0, 0),
            study_name=study.study_name,
            storage=storage,
        )
        self._distributions = dict(space)
        self._objectives, self._table, self._search_seed, self._rows = dict(objectives), table, seed, rows
        self._reported: dict[str, int] = {}

    def enqueue(self, parameters: Parameters) -> None:
        """Suggest these parameters before any others."""
        optuna_study_of(self).enqueue_trial(parameters)

    def suggest(self, trial_id: str) -> Any:
        """The next point, or FINISHED when the space is exhausted."""
        table = self._table
        suggestion = suggest(
            optuna_study_of(self),
            self._distributions,
            table.trials.values(),
            seed=self._search_seed,
            number=table.next_number,
        )
        if suggestion is None:
            return Searcher.FINISHED
        optuna_trials_of(self)[trial_id] = suggestion
        if NUMBER not in suggestion.user_attrs:
            suggestion.set_user_attr(NUMBER, table.begin(suggestion.params).number)
        return {"number": suggestion.user_attrs[NUMBER], "parameters": suggestion.params}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report a measurement to Optuna, with the rows seen as its step: Tune's own count restarts on resume."""
        rows = int(result["rows_seen"])
        # A resumed trial repeats its last measurement.
        if len(self._objectives) == 1 and rows > self._reported.get(trial_id, 0):
            self._reported[trial_id] = rows
            optuna_trials_of(self)[trial_id].report(result[self.metric], rows)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """End the trial in Optuna: pruned if it was stopped early, otherwise complete or failed."""
        stopped = bool(result) and not error and result["rows_seen"] < self._rows  # type: ignore[index]
        if stopped and end_state(True, self._objectives) == optuna.trial.TrialState.PRUNED:
            optuna_study_of(self).tell(optuna_trials_of(self)[trial_id], state=optuna.trial.TrialState.PRUNED)
        else:
            super().on_trial_complete(trial_id, result, error)


class StudyScheduler(AsyncHyperBandScheduler):  # type: ignore[misc]  # the library has no types
    """ASHA on the number of rows seen, with the measurements from before the search was resumed."""

    def __init__(self, table: TrialTable, objective: str, metric: str, budget: Budget, grace_share: float) -> None:
        super().__init__(
            time_attr="rows_seen",
            metric=metric,
            mode="max",
            grace_period=max(budget.rows_per_report, round(grace_share * budget.reports) * budget.rows_per_report),
            max_t=budget.rows,
            reduction_factor=REDUCTION,
            stop_last_trials=False,  # the trial ends by itself, and its process is used for the next one
        )
        self._table, self._objective = table, objective
        for trial in sorted(table.trials.values(), key=lambda trial: trial.number):
            if trial.ended:
                self.add_ended(trial)

    def add_ended(self, trial: Trial) -> int | None:
        """Add a trial of an earlier session; return the number of measurements after which ASHA stops it, or None."""
        earlier = SimpleNamespace(trial_id=f"earlier-{trial.number}")
        super().on_trial_add(None, earlier)
        return self._replay(trial, earlier)

    def stops_after(self, trial: Trial) -> int | None:
        """Number of measurements after which ASHA stops a running trial; None when the trial continues."""
        return copy.deepcopy(self, {id(self._table): self._table}).add_ended(trial)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a new trial, or a resumed one with its earlier measurements."""
        super().on_trial_add(tune_controller, trial)
        self._replay(self._table.trials[trial.config["number"]], trial)

    def _replay(self, trial: Trial, of_tune: Any) -> int | None:
        for number, item in enumerate(trial.history, 1):
            result = {"rows_seen": item["rows"], self._metric: item[self._objective]}
            if super().on_trial_result(None, of_tune, result) == TrialScheduler.STOP:
                return number
        return None


def resume(
    table: TrialTable,
    space: Mapping[str, BaseDistribution],
    objectives: Mapping[str, str],
    configured: Parameters | None,
    settings: TuneSettings,
    budget: Budget,
) -> tuple[StudySearch, StudyScheduler | None]:
    """Restore the searcher and the scheduler to their states after the measurements in the table.

    Ends running trials that the killed search would have ended next. `objectives`: name → metric of the workers.
    `configured`: point to suggest first in a new study. `budget`: of the last stage.
    """
    new = not table.trials
    scheduler = None
    if settings.early_stopping and len(objectives) == 1:
        ((objective, metric),) = objectives.items()
        scheduler = StudyScheduler(table, objective, metric, budget, settings.grace_share)
    for trial in sorted(table.trials.values(), key=lambda trial: trial.number):
        if trial.state == "running" and trial.history:
            stopped_after = scheduler.stops_after(trial) if scheduler else None
            if trial.settle(budget.rows, stopped_after) and scheduler:
                scheduler.add_ended(trial)
    table.save()
    search = StudySearch(space, objectives, table, seed=settings.seed, rows=budget.rows)
    if new and configured is not None:
        search.enqueue(configured)
    return search, scheduler


class StudyCallback(Callback):  # type: ignore[misc]  # the library has no types
    """Callback of Ray Tune that records results in the trial table and reports them on the terminal."""

    def __init__(self, table: TrialTable, objectives: Mapping[str, str], total: int, rows: int) -> None:
        """`objectives`: name → metric of the workers. `total`: trials of the study. `rows`: of a whole trial."""
        self.table, self.objectives, self.total, self.rows = table, objectives, total, rows
        self.started = time.monotonic()
        self.lines, self.tables = Throttle(SECONDS_BETWEEN_LINES), Throttle(SECONDS_BETWEEN_TABLES)
        self.changed = False
        self.rows_before = sum(trial.last.get("rows", 0) for trial in table.trials.values())
        self.controllers: dict[int, Any] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """Record a measurement and the cost until then."""
        own = self._trial_of(trial)
        self.controllers[own.number] = result.pop(CONTROLLER)
        own.measure(measurement(result, self.objectives))
        for work in (*result["earlier_work"], result["work"]):
            own.add_cost(work["started"], work["nodes"], work["seconds"])
        self._save()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial saw all its rows or was stopped early."""
        own = self._trial_of(trial)
        own.complete(self.rows)
        self._end(own)
        controller = self.controllers.pop(own.number, None)
        if own.state == "stopped" and controller is not None:
            # Tune would let go of the trial's process, or keep it for later, and leave the CPUs to an actor of Train
            # that polls Ray's dashboard for the end of the controller: on a private cluster, for ever.
            ray.wait([controller.abort.remote()], timeout=ABORT_SECONDS)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Record that a trial failed; the search continues."""
        file = Path(trial.error_file) if trial.error_file else None
        own = self._trial_of(trial)
        own.fail(failure_reason(file.read_text(encoding="utf-8") if file and file.exists() else ""))
        self._end(own)

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Report the progress of the search every few seconds, and the table of trials when it has changed."""
        if not self.lines.is_due():
            return
        self.lines.restart()
        own, seconds = list(self.table.trials.values()), time.monotonic() - self.started
        print_line(
            progress_line(own, list(self.objectives), self.total, self.rows, seconds, rows_before=self.rows_before)
        )
        if self.changed and self.tables.is_due():
            self.tables.restart()
            self.changed = False
            Console().print(live_table(own, list(self.objectives), self.total, self.rows))

    def _trial_of(self, trial: Any) -> Trial:
        """The trial in the table of a trial of Ray Tune."""
        return self.table.trials[trial.config["number"]]

    def _end(self, trial: Trial) -> None:
        """Report a trial that has ended, save the table and remove the trial's checkpoints."""
        values = ", ".join(f"{name} {trial.last[name]:.4f}" for name in self.objectives if name in trial.last)
        after = f" after {trial.last['rows']:,.0f} rows" if trial.history else ""
        names = short_names(trial.parameters)
        point = ", ".join(f"{names[key]} {value_text(value)}" for key, value in trial.parameters.items())
        print_line(f"tune  trial {trial.number} {trial.state}{after}: {trial.error or values}  ({point})")
        self._save()
        remove_checkpoints(self.table.workspace, self.table.study, trial)

    def _save(self) -> None:
        self.changed = True
        self.table.save()


def read_measurements(
    workspace: Workspace, study: str, trial: Trial, stage: str, objectives: Mapping[str, str]
) -> None:
    """Add the measurements that a trial's workers wrote before their search was killed, from the file of metrics."""
    file = f"{trial_folder(study, trial.number)}/runs/{stage}/{trial_version(study, trial.number)}/{METRICS}"
    for line in workspace.read_bytes(file).splitlines() if workspace.exists(file) else ():
        trial.measure(measurement(json.loads(line), objectives))


def remove_checkpoints(workspace: Workspace, study: str, trial: Trial) -> None:
    """Remove the checkpoints and models of a trial that has ended; its metrics are kept."""
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
