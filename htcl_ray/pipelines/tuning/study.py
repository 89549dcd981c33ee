"""A search while it runs: Optuna's suggestions get numbers, Ray Tune's results go into the trial table, and a person
sees both.
"""

from __future__ import annotations

import copy
import json
import re
import time
from collections.abc import Mapping, Sequence
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
from htcl_ray.pipelines.train import CHECKPOINT_LIST
from htcl_ray.pipelines.tuning.report_to_tune import CONTROLLER
from htcl_ray.pipelines.tuning.trial import trial_folder, trial_version
from htcl_ray.training.metrics_log import METRICS
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.live_table import live_table, progress_line
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.trials import NUMBER, Trial, optuna_study, sampler, told_state, write_trials
from htcl_ray.tuning.wording import short_names, value_text
from htcl_ray.workspace.storage import Workspace

SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_TABLES = 60.0
DUPLICATES_IN_A_ROW = 50
ABORT_SECONDS = 30
REDUCTION = 3
"""ASHA lets one trial in this many go on."""


class StudyTable:
    """The trials of a study, kept in the workspace; this process is the only one that writes them."""

    def __init__(self, workspace: Workspace, study: str, trials: Sequence[Trial]) -> None:
        self.workspace, self.study = workspace, study
        self.trials = {trial.number: trial for trial in trials}

    @property
    def next_number(self) -> int:
        """Number of the next new trial."""
        return max(self.trials, default=-1) + 1

    def begin(self, parameters: Parameters) -> Trial:
        """A new trial with the next number."""
        trial = Trial(number=self.next_number, parameters=dict(parameters))
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
        self,
        space: Mapping[str, BaseDistribution],
        objectives: Mapping[str, str],
        table: StudyTable,
        *,
        seed: int,
        rows: int,
    ) -> None:
        """`objectives`: name → metric that the workers report. `rows`: of a whole trial.

        The study continues with the trials of the table; one that was running is the next to be suggested.
        """
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
        self._objectives, self._table, self._search_seed, self._rows = dict(objectives), table, seed, rows
        self._reported: dict[str, int] = {}

    def enqueue(self, parameters: Parameters) -> None:
        """Suggest these parameters before any others."""
        optuna_study_of(self).enqueue_trial(parameters)

    def suggest(self, trial_id: str) -> Any:
        """The next point, or FINISHED when the space has no other."""
        for attempt in range(DUPLICATES_IN_A_ROW):
            optuna_study_of(self).sampler = sampler(self._search_seed, self._table.next_number, attempt)
            parameters = super().suggest(trial_id)
            asked = optuna_trials_of(self)[trial_id]
            number = asked.user_attrs.get(NUMBER)
            before = self._table.same_as(parameters) if number is None else None
            if before is None:
                if number is None:
                    number = self._table.begin(parameters).number
                    asked.set_user_attr(NUMBER, number)
                return {"number": number, "parameters": parameters}
            optuna_study_of(self).tell(optuna_trials_of(self).pop(trial_id), state=optuna.trial.TrialState.FAIL)
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """A measurement. Its step is the number of rows seen, since Tune's own count begins again when a trial is
        resumed.
        """
        rows = int(result["rows_seen"])
        if len(self._objectives) == 1 and rows > self._reported.get(
            trial_id, 0
        ):  # a trial may say again what it measured last
            self._reported[trial_id] = rows
            optuna_trials_of(self)[trial_id].report(result[self.metric], rows)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A trial has ended; one that was stopped early is pruned."""
        stopped = bool(result) and not error and result["rows_seen"] < self._rows  # type: ignore[index]
        if stopped and told_state(True, list(self._objectives)) == optuna.trial.TrialState.PRUNED:
            optuna_study_of(self).tell(optuna_trials_of(self)[trial_id], state=optuna.trial.TrialState.PRUNED)
        else:
            super().on_trial_complete(trial_id, result, error)


class StudyScheduler(AsyncHyperBandScheduler):
    """ASHA on rows seen, which knows what trials measured before the search was resumed."""

    def __init__(self, table: StudyTable, objective: str, metric: str, budget: Budget, grace_share: float) -> None:
        super().__init__(
            time_attr="rows_seen",
            metric=metric,
            mode="max",
            grace_period=max(budget.rows_per_report, round(grace_share * budget.reports) * budget.rows_per_report),
            max_t=budget.rows,
            reduction_factor=REDUCTION,
            stop_last_trials=False,  # the trial ends by itself, and its process goes on to the next
        )
        self._table, self._objective = table, objective
        for trial in sorted(table.trials.values(), key=lambda trial: trial.number):
            if trial.ended:
                self.add_ended(trial)

    def add_ended(self, ours: Trial) -> int | None:
        """Take in a trial of an earlier session; returns the number of its measurements when it was, or had to be,
        stopped.
        """
        earlier = SimpleNamespace(trial_id=f"earlier-{ours.number}")
        super().on_trial_add(None, earlier)
        return self._replay(ours, earlier)

    def stops_after(self, ours: Trial) -> int | None:
        """Number of measurements after which a trial that was running has to be stopped; None when it goes on."""
        return copy.deepcopy(self, {id(self._table): self._table}).add_ended(ours)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """A new trial, or one that is resumed, with what it measured before."""
        super().on_trial_add(tune_controller, trial)
        self._replay(self._table.trials[trial.config["number"]], trial)

    def _replay(self, ours: Trial, trial: Any) -> int | None:
        for number, item in enumerate(ours.history, 1):
            measured = {"rows_seen": item["rows"], self._metric: item[self._objective]}
            if super().on_trial_result(None, trial, measured) == TrialScheduler.STOP:
                return number
        return None


def resume(
    table: StudyTable,
    space: Mapping[str, BaseDistribution],
    objectives: Mapping[str, str],
    configured: Parameters | None,
    settings: TuneSettings,
    budget: Budget,
) -> tuple[StudySearch, StudyScheduler | None]:
    """The search and its scheduler as they were when the trials of the table had measured what they have measured.

    A running trial that the killed search would have ended next is ended. `objectives`: name → metric that the workers
    report. `configured`: the point to suggest first in a new study. `budget`: of the last stage.
    """
    new = not table.trials
    scheduler = None
    if settings.early_stopping and len(objectives) == 1:
        ((objective, metric),) = objectives.items()
        scheduler = StudyScheduler(table, objective, metric, budget, settings.grace_share)
    for trial in sorted(table.trials.values(), key=lambda trial: trial.number):
        if trial.state == "running" and trial.history:
            stopped = scheduler.stops_after(trial) if scheduler else None
            if stopped is not None:
                trial.state, trial.history = "stopped", trial.history[:stopped]
            elif trial.last["rows"] >= budget.rows:
                trial.state = "finished"
            if trial.state != "running" and scheduler:
                scheduler.add_ended(trial)
    table.save()
    search = StudySearch(space, objectives, table, seed=settings.seed, rows=budget.rows)
    if new and configured is not None:
        search.enqueue(configured)
    return search, scheduler


class StudyCallback(Callback):
    """Keeps the table and the terminal level with Ray Tune."""

    def __init__(self, table: StudyTable, objectives: Mapping[str, str], total: int, rows: int) -> None:
        """`objectives`: name → metric that the workers report. `total`: trials of the study; `rows`: of a whole
        trial.
        """
        self.table, self.objectives, self.total, self.rows = table, objectives, total, rows
        self.started = self.line_at = self.table_at = time.monotonic()
        self.changed = False
        self.rows_before = sum(trial.last.get("rows", 0) for trial in table.trials.values())
        self.controllers: dict[int, Any] = {}

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
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
            # Tune would let go of the trial's process, or keep it for later, and leave the CPUs to an actor of Train
            # that asks Ray's dashboard whether the controller is gone: on a private cluster, for ever.
            ray.wait([controller.abort.remote()], timeout=ABORT_SECONDS)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """A trial failed; the search goes on."""
        file = Path(trial.error_file) if trial.error_file else None
        self._end(
            self._ours(trial), "failed", sentence(file.read_text(encoding="utf-8") if file and file.exists() else "")
        )

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        """Say how far the search is, every few seconds."""
        now, ours = time.monotonic(), list(self.table.trials.values())
        if now - self.line_at < SECONDS_BETWEEN_LINES:
            return
        self.line_at = now
        print(
            progress_line(
                ours, list(self.objectives), self.total, self.rows, now - self.started, rows_before=self.rows_before
            ),
            flush=True,
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


def catch_up(workspace: Workspace, study: str, trial: Trial, stage: str, objectives: Mapping[str, str]) -> None:
    """Take what a trial of a killed search had measured before its end from its metrics."""
    file = f"{trial_folder(study, trial.number)}/runs/{stage}/{trial_version(study, trial.number)}/{METRICS}"
    lines = workspace.read_bytes(file).decode().splitlines() if workspace.exists(file) else []
    for line in map(json.loads, lines):
        figures = {name: line[metric] for name, metric in objectives.items()}
        trial.measure({"rows": line["rows_seen"], **figures, "songs_per_second": line["songs_per_second"]})


def sentence(trace: str) -> str:
    """What went wrong, from the text of a trace: its last line, without the name of the error."""
    lines = [line.strip() for line in trace.splitlines() if line.strip()]
    return re.sub(r"^[\w.]+(Error|Exception): ", "", lines[-1])[:500] if lines else "no reason was given"


def tidy(workspace: Workspace, study: str, trial: Trial) -> None:
    """Remove the checkpoints and models of a trial that has ended, so that only running trials take space; its metrics
    stay.
    """
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
