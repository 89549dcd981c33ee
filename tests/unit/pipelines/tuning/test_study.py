"""A search that was killed and resumed equals an uninterrupted one, bit for bit: points, results and decisions.

The tests run the loop of Ray Tune for one trial at a time, with the searcher, scheduler and callback of the package and
a closed form in place of training.
"""

from __future__ import annotations

import json
import math
import random
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher

from htcl_ray.config.sections import TuneSettings
from htcl_ray.pipelines.tuning.report_to_tune import CONTROLLER
from htcl_ray.pipelines.tuning.study import StudyCallback, read_measurements, resume
from htcl_ray.tuning.budget import Budget
from htcl_ray.tuning.study_folder import TrialTable, read_trials, trial_folder, trial_version
from htcl_ray.tuning.trials import Trial
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit

STUDY, STAGE = "runs/tune/pretrain", "pretrain"
SPACE: dict[str, BaseDistribution] = {
    "pretrain.temperature": FloatDistribution(0.02, 0.5, log=True),
    "pretrain.learning_rate": FloatDistribution(1e-5, 1e-1, log=True),
    "pretrain.batch_size": CategoricalDistribution((32, 64, 128)),
}
CONFIGURED = {"pretrain.temperature": 0.074, "pretrain.learning_rate": 1e-4, "pretrain.batch_size": 64}
BUDGET = Budget(100, 9)
OBJECTIVES = {"semantic": "validation_recall@10", "preference": "validation_pair_recall@10"}


def measured(parameters: dict[str, Any], rows: int, objective: str) -> float:
    """Closed form of a metric: best at temperature 0.1, learning rate 0.003 and batch size 128; grows with the rows."""
    distance = (
        0.2 * math.log(parameters["pretrain.temperature"] / 0.1) ** 2
        + 0.05 * math.log(parameters["pretrain.learning_rate"] / 3e-3) ** 2
    )
    distance += 0.1 * (128 - parameters["pretrain.batch_size"]) / 128
    return (
        math.exp(-distance)
        * (1 - math.exp(-rows / 300))
        * (1 if objective == "semantic" else 1 - parameters["pretrain.temperature"])
    )


def epoch_metrics(parameters: dict[str, Any], report: int, objectives: dict[str, str]) -> dict[str, float]:
    """Metrics that the workers write for a report, which are counted from 0."""
    rows = (report + 1) * BUDGET.rows_per_report
    metrics = {metric: measured(parameters, rows, name) for name, metric in objectives.items()}
    return {"rows_seen": rows, "songs_per_second": 1.0, **metrics}


def recorded(workspace: Workspace, objectives: dict[str, str]) -> list[Trial]:
    """Trials of the table, with the measurements that running ones wrote before the kill."""
    trials = read_trials(workspace, STUDY)
    for trial in trials:
        if not trial.ended:
            read_measurements(workspace, STUDY, trial, STAGE, objectives)
    return trials


class Killed(Exception):
    """The process of the search was killed."""


def metrics_of(workspace: Workspace, number: int) -> tuple[str, list[dict[str, Any]]]:
    """Path and content of a trial's file of metrics."""
    file = f"{trial_folder(STUDY, number)}/runs/{STAGE}/{trial_version(STUDY, number)}/metrics.jsonl"
    lines = workspace.read_bytes(file).splitlines() if workspace.exists(file) else []
    return file, [json.loads(line) for line in lines]


def session(
    workspace: Workspace,
    settings: TuneSettings,
    objectives: dict[str, str],
    ticks: Iterator[int],
    kill_at: int,
    ahead: int,
) -> None:
    """Run the search until it ends or is killed at a tick.

    `ahead`: measurements that the workers have written and Ray Tune has not processed yet.
    """

    def tick() -> None:
        if next(ticks) == kill_at:
            raise Killed

    table = TrialTable(workspace, STUDY, recorded(workspace, objectives))
    search, scheduler = resume(table, SPACE, objectives, CONFIGURED, settings, BUDGET)
    callback = StudyCallback(table, objectives, settings.trials, BUDGET.rows)
    for _ in range(settings.trials - sum(trial.ended for trial in table.trials.values())):
        tick()
        trial_id = uuid.uuid4().hex[:8]
        point = search.suggest(trial_id)
        if point == Searcher.FINISHED:
            return
        tick()
        trial = SimpleNamespace(trial_id=trial_id, config=point, error_file=None)
        if scheduler is not None:
            scheduler.on_trial_add(None, trial)
        file, written = metrics_of(workspace, point["number"])
        checkpoint = max(len(written) - 1, 0)  # written after the measurement, so a resumed trial repeats one
        for report in range(checkpoint, BUDGET.reports):
            for later in range(len(written), min(report + 1 + ahead, BUDGET.reports)):
                written.append(epoch_metrics(point["parameters"], later, objectives))
                workspace.write_bytes(file, "".join(json.dumps(line) + "\n" for line in written).encode())
                tick()
            result = written[report]
            decision = TrialScheduler.CONTINUE if scheduler is None else scheduler.on_trial_result(None, trial, result)
            search.on_trial_result(trial_id, result)
            tick()
            work = {"started": 0.0, "nodes": 1, "seconds": 0.0}
            callback.on_trial_result(0, [], trial, {**result, "earlier_work": [], "work": work, CONTROLLER: None})
            tick()
            if decision == TrialScheduler.STOP:
                break
        search.on_trial_complete(trial_id, result)
        tick()
        callback.on_trial_complete(0, [], trial)


def searched(
    folder: Path, settings: TuneSettings, objectives: dict[str, str], kills: list[int], ahead: int = 0
) -> list[Trial]:
    """Trials of a search that was killed at each of these ticks, which are counted from each start."""
    workspace = Workspace(str(folder))
    for kill_at in kills:
        with pytest.raises(Killed):
            session(workspace, settings, objectives, iter(range(10**9)), kill_at, ahead)
    session(workspace, settings, objectives, iter(range(10**9)), -1, ahead)
    return read_trials(workspace, STUDY)


def outcome(trials: list[Trial]) -> list[tuple[Any, ...]]:
    return [(trial.number, repr(trial.parameters), trial.state, trial.history) for trial in trials]


@pytest.fixture(scope="module", params=["asha", "whole", "two objectives"])
def whole(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TuneSettings, dict[str, str], list[Trial]]:
    """Settings, objectives, and the trials of an uninterrupted search."""
    objectives = OBJECTIVES if request.param == "two objectives" else {"semantic": OBJECTIVES["semantic"]}
    settings = TuneSettings(trials=16, early_stopping=request.param == "asha", seed=3)
    trials = searched(tmp_path_factory.mktemp("whole"), settings, objectives, [])
    return settings, objectives, trials


def test_the_uninterrupted_search_has_different_points_and_outcomes(
    whole: tuple[TuneSettings, dict[str, str], list[Trial]],
):
    settings, _, trials = whole
    assert trials[0].parameters == CONFIGURED
    assert len({repr(trial.parameters) for trial in trials}) == settings.trials == 16
    states = [trial.state for trial in trials]
    if settings.early_stopping:
        assert states.count("stopped") >= 4
        assert states.count("finished") >= 4
    else:
        assert set(states) == {"finished"}


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("seed", range(3))
def test_a_killed_search_ends_as_the_uninterrupted_one(
    whole: tuple[TuneSettings, dict[str, str], list[Trial]], tmp_path: Path, seed: int, ahead: int
):
    """Killed three times: around a suggestion, a measurement, a decision or a write of the table."""
    settings, objectives, trials = whole
    draw = random.Random(f"{seed} {ahead}")
    # Ticks of the uninterrupted search, whose sampler draws at random in the first half.
    last = 315 if settings.early_stopping else 480
    kills = [draw.randrange(2 * last // 3), draw.randrange(last // 8), draw.randrange(last // 8)]
    assert outcome(searched(tmp_path, settings, objectives, kills, ahead)) == outcome(trials)


def test_a_search_may_be_killed_at_every_step_of_a_trial(tmp_path: Path):
    """Killed once at each tick of two trials that are stopped, and of the ends of those before and after them."""
    objectives = {"semantic": OBJECTIVES["semantic"]}
    settings = TuneSettings(trials=5, seed=3)
    expected = outcome(searched(tmp_path / "whole", settings, objectives, []))
    assert "stopped" in {state for _, _, state, _ in expected}
    for tick in (*range(28, 32), *range(57, 80)):
        assert outcome(searched(tmp_path / str(tick), settings, objectives, [tick])) == expected, tick


def test_more_trials_continue_a_finished_search(tmp_path: Path):
    objectives = {"semantic": OBJECTIVES["semantic"]}
    expected = outcome(searched(tmp_path / "whole", TuneSettings(trials=14, seed=1), objectives, []))
    for trials in (6, 11, 14):
        continued = searched(tmp_path / "grown", TuneSettings(trials=trials, seed=1), objectives, [])
        assert outcome(continued) == expected[:trials]


def test_another_seed_is_another_search(tmp_path: Path):
    objectives = {"semantic": OBJECTIVES["semantic"]}
    first, other = (
        searched(tmp_path / str(seed), TuneSettings(trials=3, seed=seed), objectives, []) for seed in (0, 1)
    )
    assert first[0].parameters == other[0].parameters == CONFIGURED
    assert first[1].parameters != other[1].parameters
