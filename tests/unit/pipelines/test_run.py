"""`htcl run`: the order of the steps, the model that each one gets, what is left out, and exit codes. No step does its work here."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from htcl_ray import cli
from htcl_ray.commands import flags as command_flags
from htcl_ray.config import resolve
from htcl_ray.errors import InputError, StepError
from htcl_ray.pipelines import run as run_module
from htcl_ray.pipelines.run import STEPS, build, run
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit

Calls = list[tuple[str, str | None]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Calls:
    """The calls of the steps, (step, model), each replaced by one that returns a result; one test song of ten."""
    made: Calls = []
    splits = {"train": 8, "validation": 1, "test": 1}
    Workspace(str(tmp_path)).finish(
        "features/preprocess-1", build_manifest("features", config={}, inputs={}, quality={"splits": splits})
    )

    def replaced(step: str) -> Any:
        def run_it(config: Any, model: str | None = None, gate: str | None = None) -> StepResult:
            assert config.gate.require == "off"
            made.append((step, model))
            return StepResult(step, f"{tmp_path}/{step}/{step}-1", "made", 1.0, skipped=step == "pretrain")

        return run_it

    names = {step: "build_index" if step == "index" else step for step in STEPS} | {"gate": "evaluate_and_judge"}
    for step, function in names.items():
        monkeypatch.setattr(run_module, function, replaced(step))
    return made


def configured(tmp_path: Path, **overrides: Any) -> Any:
    tables = {"data.catalog": "songs.csv", "data.interactions": "log.csv", "workspace": str(tmp_path)}
    return resolve("demo").with_overrides({**tables, **{k.replace("__", "."): v for k, v in overrides.items()}})


def test_every_step_runs_once_in_order_with_the_models_of_this_run(calls: Calls, tmp_path: Path):
    reported: list[str] = []
    result = run(configured(tmp_path), report=lambda result: reported.append(result.step))
    assert calls == [
        ("preprocess", None),
        ("pretrain", None),
        ("finetune", "pretrain-1"),
        ("embed", "finetune-1"),
        ("index", "finetune-1"),
        ("evaluate", "finetune-1"),
    ]
    assert reported == list(STEPS)
    assert (result.step, result.summary) == ("run", "6 steps, 1 of them already done")
    assert result.location.endswith("index-1")


def test_without_a_log_stage_2_is_left_out_and_the_models_are_those_of_stage_1(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(configured(tmp_path, data__interactions=[]), report=lambda result: None)
    assert [step for step, _ in calls] == ["preprocess", "pretrain", "embed", "index", "evaluate"]
    assert {model for _, model in calls[2:]} == {"pretrain-1"}
    assert "finetune is left out: data.interactions names no log" in capsys.readouterr().out


@pytest.mark.parametrize("until", STEPS)
def test_until_ends_with_that_step(calls: Calls, tmp_path: Path, until: str):
    run(configured(tmp_path), until=until, report=lambda result: None)
    assert [step for step, _ in calls] == list(STEPS[: STEPS.index(until) + 1])


def test_until_evaluate_builds_everything_before_it(calls: Calls, tmp_path: Path):
    assert list(build(configured(tmp_path, gate__require="off"), until="evaluate", report=lambda result: None)) == list(
        STEPS[:-1]
    )
    assert len(calls) == 5


def test_without_held_out_songs_the_evaluation_is_left_out(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run(configured(tmp_path, evaluate__split="validation"), report=lambda result: None)
    assert calls[-1][0] == "evaluate"
    Workspace(str(tmp_path)).finish(
        "features/preprocess-1", build_manifest("features", config={}, inputs={}, quality={"splits": {"train": 10}})
    )
    calls.clear()
    run(configured(tmp_path), report=lambda result: None)
    assert calls[-1][0] == "index"
    assert "evaluate is left out: no song is in the test split" in capsys.readouterr().out
    run(configured(tmp_path), gate="default", report=lambda result: None)
    assert calls[-1] == ("gate", "finetune-1"), "a given gate is never left out"


@pytest.fixture
def nothing_started(calls: Calls) -> Iterator[None]:
    yield
    assert not calls


@pytest.mark.usefixtures("nothing_started")
@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        ({"data__interactions": []}, {"until": "finetune"}, "--until finetune needs preference pairs"),
        ({}, {"until": "index", "gate": "default"}, "--until index stops before it"),
        ({}, {"gate": "absent.yaml"}, "cannot read the gate absent.yaml"),
        ({"evaluate__probe_columns": ["gnre"]}, {}, "evaluate.probe_columns names 'gnre'"),
        ({"pretrain__num_workers": 64}, {}, "pretrain.num_workers × pretrain.cpus_per_worker is 64 CPUs"),
        ({"finetune__num_workers": 64}, {}, "finetune.num_workers × finetune.cpus_per_worker is 64 CPUs"),
        ({"text__name_or_path": "/nowhere"}, {}, "/nowhere"),
        ({"pretrain__warm_start": "absent"}, {}, "'absent' is neither a model folder nor a model"),
        ({"finetune__warm_start": "absent"}, {}, "'absent' is neither a model folder nor a model"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_the_first(
    tmp_path: Path, overrides: dict[str, Any], options: dict[str, str], message: str
):
    with pytest.raises(InputError, match=message):
        run(configured(tmp_path, **overrides), **options, report=lambda result: None)


def test_a_later_step_that_is_not_reached_is_not_checked(calls: Calls, tmp_path: Path):
    run(configured(tmp_path, finetune__num_workers=64, data__interactions=[]), report=lambda result: None)
    run(configured(tmp_path, finetune__num_workers=64), until="pretrain", report=lambda result: None)
    run(configured(tmp_path, pretrain__num_workers=64), until="preprocess", report=lambda result: None)
    assert calls[-1] == ("preprocess", None)


def test_the_command_prints_a_line_for_each_step_and_the_total(
    calls: Calls, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    flags = ["--preset", "demo", "--workspace", str(tmp_path), "--set", "data.catalog=songs.csv"]
    assert cli.main(["run", *flags]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in shown if ": done in " in line or ": already done" in line] == [
        "preprocess",
        "pretrain",
        "embed",
        "index",
        "evaluate",
        "run",
    ]
    assert "pretrain: already done: made → " in "\n".join(shown)
    assert cli.main(["run", *flags, "--until", "tune"]) == 2
    assert "invalid choice: 'tune'" in capsys.readouterr().err
    assert command_flags.RUN_STEPS == STEPS


def test_a_failed_gate_exits_1(calls: Calls, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def failed(*arguments: Any) -> StepResult:
        raise StepError("the gate failed: 1 of 3 bounds do not hold")

    monkeypatch.setattr(run_module, "evaluate_and_judge", failed)
    flags = ["--preset", "demo", "--workspace", str(tmp_path), "--set", "data.catalog=songs.csv"]
    assert cli.main(["run", *flags, "--gate", "default"]) == 1
    assert [step for step, _ in calls] == ["preprocess", "pretrain", "embed", "index"]
