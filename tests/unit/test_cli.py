"""The `htcl` command: exit codes, one sentence on stderr, the same flags everywhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from htcl_ray import cli
from htcl_ray.errors import HtclError, InputError, MismatchError, StepError
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "htcl_ray.cli", *arguments], capture_output=True, text=True, cwd=REPOSITORY, timeout=120)


def test_config_show_prints_what_will_run(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "show", "--preset", "demo", "--set", "pretrain.epochs=3", "--workspace", "/w"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["preset"], shown["pretrain"]["epochs"], shown["workspace"]) == ("demo", 3, "/w")
    assert cli.main(["config", "show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["workspace"] == str(Path.cwd() / "workspace"), "saved, it works anywhere"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "show", "--set", "pretrain.epoch=3"], "did you mean 'pretrain.epochs'"),
        (["config", "show", "--preset", "nothing"], "there is no preset 'nothing'"),
        (["config", "print"], "invalid choice: 'print'"),
        (["trane"], "invalid choice: 'trane'"),
        (["search", "--text", "a", "--song-id", "b"], "not allowed with"),
        (["search"], "one of the arguments --text --audio --song-id is required"),
        (["pretrain", "--workspace", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("htcl: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize("step", ["pretrain", "finetune", "tune", "embed", "index", "evaluate"])
def test_steps_name_the_step_that_is_missing(step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """An empty workspace is the commonest mistake; no Ray is started to find it."""
    assert cli.main([step, "--preset", "demo", "--workspace", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "run 'htcl " in shown.err
    assert "Ray:" not in shown.out


def test_a_remote_job_refuses_a_relative_workspace(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("RAY_ADDRESS", "192.0.2.7:6379")
    assert cli.main(["pretrain", "--preset", "demo"]) == 2
    assert "is relative, and on a remote cluster" in capsys.readouterr().err
    tracked = ["--set", "tracking.trackers=mlflow", "--set", "tracking.mlflow_uri=sqlite:///runs.db"]
    assert cli.main(["pretrain", "--preset", "demo", "--workspace", "s3://bucket/htcl", *tracked]) == 2
    assert "tracking.mlflow_uri is 'sqlite:///runs.db', a relative file" in capsys.readouterr().err
    assert cli.main(["config", "show"]) == 0, "what no job runs is not refused"


class Carried(Exception):
    """As Ray carries the exception of a task."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a long report\nwith many lines")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (MismatchError("a is 1, b is 2"), 2, "htcl: error: a is 1, b is 2\n"),
        (StepError("the worker died"), 1, "htcl: failed: the worker died\n"),
        (Carried(InputError("bad file")), 2, "htcl: error: bad file\n"),
    ],
)
def test_errors_become_exit_codes(error: Exception, code: int, shown: str, capsys: pytest.CaptureFixture[str]):
    assert cli._report(error) == code
    assert capsys.readouterr().err == shown


def test_a_fault_of_ours_keeps_its_traceback(capsys: pytest.CaptureFixture[str]):
    assert cli._report(ValueError("unexpected")) == 1
    assert "ValueError: unexpected" in capsys.readouterr().err


def test_every_error_class_has_an_exit_code():
    classes = [HtclError]
    for cls in classes:
        classes += cls.__subclasses__()
    assert len(classes) >= 8
    assert {cls.exit_code for cls in classes if issubclass(cls, InputError)} == {2}
    assert {cls.exit_code for cls in classes if not issubclass(cls, InputError)} == {1}


def test_the_installed_command_answers():
    assert "htcl-ray" in run("--version").stdout
    listed = run("--help").stdout
    for command in ("demo", "preprocess", "pretrain", "finetune", "embed", "index", "evaluate", "serve", "search", "config"):
        assert command in listed
