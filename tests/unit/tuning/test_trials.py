"""Trials: their table, the study that is rebuilt from it, and the decisions about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from htcl_ray.errors import WorkspaceError
from htcl_ray.tuning.optuna_study import NUMBER, optuna_study, sampler
from htcl_ray.tuning.study_folder import read_trials, write_trials
from htcl_ray.tuning.trials import Trial, failure_reason, measurement, remaining, winners
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit
SPACE: dict[str, BaseDistribution] = {
    "pretrain.temperature": FloatDistribution(0.02, 0.5, log=True),
    "pretrain.learn_temperature": CategoricalDistribution((True, False)),
    "pretrain.batch_size": CategoricalDistribution((32, 64, 128)),
    "pretrain.max_gradient_norm": CategoricalDistribution((None, 1.0)),
    "model.layers": IntDistribution(1, 4),
}
STATES = ("finished", "stopped", "failed", "running", "finished", "failed", "finished")
"""Used in turn; every first failure of two was not measured."""


def table(number: int, objectives: list[str]) -> list[Trial]:
    """Trials of every kind, with reproducible points and values."""
    source = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    trials = []
    for index in range(number):
        trial = Trial(index, dict(source.ask(SPACE).params))
        state = STATES[index % len(STATES)]
        for report in range(0 if index % len(STATES) == 2 else 1 + index % 4):
            trial.measure(
                {
                    "rows": 640.0 * (report + 1),
                    **{name: (index * 7 + report + len(name)) % 10 / 10 for name in objectives},
                }
            )
        trial.add_cost(1e9 + index, 2, 10.5 + index)
        trial.state = state  # type: ignore[assignment]
        trial.error = "a sentence,\u2028with  every ‘sign’\n" if state == "failed" else None
        trials.append(trial)
    return trials


def reported(trials: list[Trial], objectives: list[str]) -> optuna.Study:
    """The study that results when the same trials are reported to Optuna one by one."""
    study = optuna.create_study(directions=["maximize"] * len(objectives))
    for trial in trials:
        study.enqueue_trial(trial.parameters)
        suggestion = study.ask(SPACE)
        if trial.state == "running":
            continue
        if len(objectives) == 1:
            for item in trial.history:
                suggestion.report(item[objectives[0]], int(item["rows"]))
        if trial.state == "failed":
            study.tell(suggestion, state=optuna.trial.TrialState.FAIL)
        elif trial.state == "stopped" and len(objectives) == 1:
            study.tell(suggestion, state=optuna.trial.TrialState.PRUNED)
        else:
            study.tell(suggestion, [trial.history[-1][name] for name in objectives])
    return study


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "workspace"))


def test_the_table_round_trips(workspace: Workspace):
    assert read_trials(workspace, "runs/tune/pretrain") == []
    trials = table(15, ["semantic", "preference"])
    write_trials(workspace, "runs/tune/pretrain", reversed(trials))
    again = read_trials(workspace, "runs/tune/pretrain")
    assert again == trials
    assert [repr(trial.parameters) for trial in again] == [repr(trial.parameters) for trial in trials]
    write_trials(workspace, "runs/tune/pretrain", trials[:3])
    assert read_trials(workspace, "runs/tune/pretrain") == trials[:3]


@pytest.mark.parametrize(
    "damage",
    [
        lambda line: line[: len(line) // 2],
        lambda line: b"\xff\xfe" + line,
        lambda _: b"[1, 2]",
        lambda _: b"3",
        lambda _: b"",
        lambda _: b'{"number": 3}',
        lambda line: line.replace(b'"state"', b'"status"'),
        lambda line: line.replace(b'"number"', b'"extra": 1, "number"', 1),
        lambda line: line.replace(b'"finished"', b'"done"', 1),
        lambda line: line.replace(b'"history": [', b'"history": [3, ', 1),
        lambda line: line.replace(b'"parameters": {', b'"parameters": [], "error": {', 1),
    ],
)
def test_a_damaged_table_is_refused_with_its_line_and_a_remedy(workspace: Workspace, damage: Any):
    write_trials(workspace, "runs/tune/x", table(2, ["semantic"])[:1])
    line = workspace.read_bytes("runs/tune/x/trials.jsonl")
    workspace.write_bytes("runs/tune/x/trials.jsonl", line + damage(line.strip()) + b"\n")
    with pytest.raises(WorkspaceError, match=r"^line 2 of .*runs/tune/x/trials\.jsonl is not a trial; .*tune\.study$"):
        read_trials(workspace, "runs/tune/x")


def test_a_repeated_measurement_replaces_the_old_one():
    trial = Trial(0, {})
    assert (trial.last, trial.values(["semantic"]), trial.ended) == ({}, None, False)
    for rows, value in ((64, 0.1), (128, 0.2), (192, 0.3), (128, 0.25)):
        trial.measure({"rows": rows, "semantic": value})
    assert trial.history == [{"rows": 64, "semantic": 0.1}, {"rows": 128, "semantic": 0.25}]
    trial.measure({"rows": 192, "semantic": 0.35})
    assert [item["semantic"] for item in trial.history] == [0.1, 0.25, 0.35]
    assert trial.values(["semantic"]) == (0.35,)


def test_node_seconds_are_summed_over_attempts(workspace: Workspace):
    trial = Trial(0, {})
    trial.add_cost(1000.0, 2, 5.0)
    trial.add_cost(1000.0, 2, 9.0)  # the same workers, later
    trial.add_cost(2000.5, 1, 4.0)
    assert trial.node_seconds == 2 * 9 + 4
    write_trials(workspace, "study", [trial])
    (again,) = read_trials(workspace, "study")
    again.add_cost(1000.0, 3, 10.0)
    assert again.node_seconds == 3 * 10 + 4


@pytest.mark.parametrize("objectives", [["semantic"], ["semantic", "preference"]])
def test_a_rebuilt_study_equals_one_that_was_reported_to_optuna(workspace: Workspace, objectives: list[str]):
    trials = table(24, objectives)
    write_trials(workspace, "study", trials)
    rebuilt, direct = optuna_study(read_trials(workspace, "study"), SPACE, objectives), reported(trials, objectives)
    assert rebuilt.directions == direct.directions
    assert len(rebuilt.trials) == len(direct.trials) == len(trials)
    for trial, actual, expected in zip(trials, rebuilt.trials, direct.trials, strict=True):
        assert actual.user_attrs[NUMBER] == trial.number
        if trial.state == "running":
            assert actual.state == optuna.trial.TrialState.WAITING
            assert actual.system_attrs["fixed_params"] == trial.parameters
            continue
        assert actual.state == expected.state
        assert actual.values == expected.values
        assert repr(actual.params) == repr(expected.params)
        assert actual.distributions == expected.distributions
        assert actual.intermediate_values == expected.intermediate_values
    best = [[trial.number for trial in study.best_trials] for study in (rebuilt, direct)]
    assert best[0] == best[1]
    if len(objectives) == 1:
        assert rebuilt.best_trial.number == direct.best_trial.number
    failed = [trial for trial in rebuilt.trials if trial.state == optuna.trial.TrialState.FAIL]
    assert failed
    assert all(trial.values is None for trial in failed)


@pytest.mark.parametrize("objectives", [["semantic"], ["semantic", "preference"]])
def test_a_rebuilt_study_suggests_the_same_points(objectives: list[str]):
    trials = table(24, objectives)  # more than the sampler's first ten, which are drawn at random
    running = [trial.parameters for trial in trials if trial.state == "running"]
    rebuilt, direct, other = (
        optuna_study(trials, SPACE, objectives),
        reported(trials, objectives),
        optuna_study(trials, SPACE, objectives),
    )
    for study in (rebuilt, other):
        assert [study.ask(SPACE).params for _ in running] == running, "running trials come first"
    proposals: list[list[dict[str, Any]]] = []
    for study, seed in ((rebuilt, 5), (direct, 5), (other, 6)):
        proposals.append([])
        for number in range(len(trials), len(trials) + 4):
            study.sampler = sampler(seed, number, 0)
            proposals[-1].append(study.ask(SPACE).params)
    assert proposals[0] == proposals[1]
    assert proposals[0] != proposals[2]
    assert len({repr(point) for point in proposals[0]}) == 4


def test_a_suggestion_depends_on_seed_number_and_attempt_alone():
    def proposal(*key: int) -> dict[str, Any]:
        study = optuna_study([], SPACE, ["semantic"])
        study.sampler = sampler(*key)
        return dict(study.ask(SPACE).params)

    keys = [(seed, number, attempt) for seed in (0, 1, 2**32 - 1) for number in (0, 1, 2) for attempt in (0, 1)]
    points = {key: repr(proposal(*key)) for key in keys}
    assert points == {key: repr(proposal(*key)) for key in reversed(keys)}
    assert len(set(points.values())) == len(keys), "seed 0 at trial 1 is not seed 1 at trial 0"


def test_an_ended_trial_without_a_measurement_is_left_out_of_the_study():
    assert optuna_study([Trial(0, {}, state="finished"), Trial(1, {}, state="stopped")], {}, ["semantic"]).trials == []


scores = some.sampled_from([0.0, 0.1, 0.2, 0.3])
candidates = some.lists(
    some.tuples(some.sampled_from(["finished", "stopped", "failed", "running"]), scores, scores), max_size=12
)


@settings(deadline=None, derandomize=True)
@given(candidates=candidates)
def test_winners_equal_a_brute_force_search_with_the_first_of_equals(candidates: list[tuple[Any, float, float]]):
    trials = [
        Trial(number, {}, state, [{"rows": 64, "semantic": first, "preference": second}])
        for number, (state, first, second) in enumerate(candidates)
    ]
    points = {
        trial.number: (trial.last["semantic"], trial.last["preference"])
        for trial in trials
        if trial.state == "finished"
    }
    front = [
        number
        for number, (first, second) in points.items()
        if not any(a >= first and b >= second and (a > first or b > second) for a, b in points.values())
        and not any(points[earlier] == (first, second) for earlier in points if earlier < number)
    ]
    numbers = [trial.number for trial in winners(reversed(trials), ["semantic", "preference"])]
    assert sorted(numbers) == front
    assert numbers == sorted(front, key=lambda number: (-sum(points[number]), number))
    single = [trial.number for trial in winners(trials, ["preference"])]
    assert single == sorted(points, key=lambda number: (-points[number][1], number))[:1]


def test_winners_are_the_pareto_front_of_optuna():
    objectives = ["semantic", "preference"]
    trials = [trial for trial in table(80, objectives) if trial.state == "finished"]
    study = optuna_study(trials, SPACE, objectives)
    assert {trial.values(objectives) for trial in winners(trials, objectives)} == {
        tuple(trial.values) for trial in study.best_trials
    }


def test_error_messages_of_trials_stay_on_their_line(workspace: Workspace):
    trials = [trial for trial in table(7, ["semantic"]) if trial.error]
    write_trials(workspace, "study", trials)
    lines = workspace.read_bytes("study/trials.jsonl").decode().splitlines()
    assert [json.loads(line)["error"] for line in lines] == [trial.error for trial in trials]


@pytest.mark.parametrize(
    ("rows", "state", "error"),
    [([], "failed", "it ended without a measurement"), ([64], "stopped", None), ([64, 128], "finished", None)],
)
def test_a_completed_trial_is_finished_stopped_or_failed_by_its_rows(rows: list[int], state: str, error: str | None):
    trial = Trial(0, {}, history=[{"rows": seen, "semantic": 0.1} for seen in rows])
    trial.complete(128)
    assert (trial.state, trial.error) == (state, error)


@pytest.mark.parametrize(
    ("state", "rows", "stopped_after", "settled", "expected"),
    [
        ("running", [64, 128, 192], None, "running", 3),
        ("running", [64, 128, 192, 256], None, "finished", 4),
        ("running", [64, 128, 192], 2, "stopped", 2),
        ("running", [64, 128, 192, 256], 4, "stopped", 4),
        ("running", [], None, "running", 0),
        ("failed", [64], 1, "failed", 1),
    ],
)
def test_a_resumed_search_ends_trials_that_the_killed_one_would_have_ended(
    state: Any, rows: list[int], stopped_after: int | None, settled: str, expected: int
):
    trial = Trial(0, {}, state, [{"rows": seen, "semantic": 0.1} for seen in rows])
    assert trial.settle(256, stopped_after) is (settled != state)
    assert (trial.state, len(trial.history)) == (settled, expected)


def test_a_failed_trial_restarts_with_its_number_parameters_and_cost():
    failed = Trial(3, {"a": 1}, "failed", [{"rows": 64, "semantic": 0.1}], {"1.000": [2, 30]}, "no such workspace")
    assert failed.restarted() == Trial(3, {"a": 1}, attempts={"1.000": [2, 30]})


def test_remaining_trials_are_those_that_have_not_ended():
    trials = [Trial(number, {}, state) for number, state in enumerate(("finished", "stopped", "failed", "running"))]
    assert [remaining(trials, wanted) for wanted in (2, 3, 4, 10)] == [0, 0, 1, 7]


def test_a_measurement_has_rows_objectives_and_speed():
    result = {"rows_seen": 64, "validation_recall@10": 0.5, "songs_per_second": 9.0, "loss": 1.0}
    assert measurement(result, {"semantic": "validation_recall@10"}) == {
        "rows": 64,
        "semantic": 0.5,
        "songs_per_second": 9.0,
    }


@pytest.mark.parametrize(
    ("trace", "reason"),
    [
        (
            "Traceback:\n  File x\nhtcl_ray.errors.StepError: pretrain: the gradient is nan\n\n",
            "pretrain: the gradient is nan",
        ),
        ("ray.exceptions.RayActorError: The actor died\n", "The actor died"),
        ("KeyError: 'a'", "'a'"),
        ("", "no reason was given"),
    ],
)
def test_the_reason_of_a_failure_is_the_last_line_of_its_trace(trace: str, reason: str):
    assert failure_reason(trace) == reason
