"""The `htcl` command: exit codes, error messages, output, and the flags that all commands share."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from htcl_ray import cli
from htcl_ray.cluster.connection import RAY_SOCKET, connect, ray_folder
from htcl_ray.commands import terminal
from htcl_ray.config import resolve
from htcl_ray.errors import AccessDeniedError, HtclError, InputError, MismatchError, StepError, StorageError
from htcl_ray.workspace.filesystem import storage_failure
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit


def test_config_show_prints_the_resolved_configuration(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["config", "show", "--preset", "demo", "--set", "pretrain.epochs=3", "--workspace", "/w"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["preset"], shown["pretrain"]["epochs"], shown["workspace"]) == ("demo", 3, "/w")
    assert cli.main(["config", "show"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["workspace"] == str(Path.cwd() / "workspace"), (
        "saved, it works anywhere"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "show", "--set", "pretrain.epoch=3"], "did you mean 'pretrain.epochs'"),
        (["config", "show", "--preset", "nothing"], "unknown preset 'nothing'"),
        (["config", "print"], "invalid choice: 'print'"),
        (["trane"], "invalid choice: 'trane'"),
        (["search", "--text", "a", "--song-id", "b"], "not allowed with"),
        (["search"], "one of the arguments --text --audio --song-id is required"),
        (["pretrain", "--workspace", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_invalid_input_exits_2_with_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("htcl: error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err


@pytest.mark.parametrize("step", ["pretrain", "finetune", "tune", "embed", "index", "evaluate"])
def test_steps_on_an_empty_workspace_name_the_missing_step(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """An empty workspace is the commonest mistake; no Ray is started to find it."""
    assert cli.main([step, "--preset", "demo", "--workspace", str(tmp_path)]) == 2
    shown = capsys.readouterr()
    assert "run 'htcl " in shown.err
    assert "Ray:" not in shown.out


def test_remote_job_with_relative_workspace_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
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
    assert terminal.report_error(error) == code
    assert capsys.readouterr().err == shown


def test_unexpected_error_prints_its_traceback(capsys: pytest.CaptureFixture[str]):
    assert terminal.report_error(ValueError("unexpected")) == 1
    assert "ValueError: unexpected" in capsys.readouterr().err


def test_every_error_class_has_an_exit_code():
    classes = [HtclError]
    for cls in classes:
        classes += cls.__subclasses__()
    assert len(classes) >= 8
    assert {cls.exit_code for cls in classes if issubclass(cls, InputError)} == {2}
    assert {cls.exit_code for cls in classes if not issubclass(cls, InputError)} == {1}


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("error", "code", "shown"),
    [
        (FULL, 1, "htcl: failed: no space left on the device of /w; "),
        (OSError(28, "No space left on device", "/tmp/x"), 1, "htcl: failed: no space left on the device of /tmp/x; "),
        (Carried(FULL), 1, "htcl: failed: no space left on the device of /w; "),
        (
            RuntimeError("Error in faiss::write_index: write error in /w/index: 1 != 2 (No space left on device)"),
            1,
            "htcl: failed: no space left",
        ),
        (
            Carried(OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28]")),
            1,
            "htcl: failed: no space left",
        ),
        (OSError(5, "Input/output error"), 1, "htcl: failed: /w cannot be read or written (Input/output error)"),
        (
            Carried(OSError("When listing: AWS Error SLOW_DOWN during PutObject")),
            1,
            "htcl: failed: /w cannot be read or written",
        ),
        (
            PermissionError(13, "Permission denied", "/etc/x"),
            2,
            "htcl: error: access denied to /etc/x (Permission denied)",
        ),
    ],
)
def test_storage_failure_is_one_sentence(error: Exception, code: int, shown: str, capsys: pytest.CaptureFixture[str]):
    assert terminal.report_error(error, "/w") == code
    said = capsys.readouterr().err
    assert said.startswith(shown)
    assert said.count("\n") == 1


def test_errors_of_ray_tasks(capsys: pytest.CaptureFixture[str]):
    """Ray's error of a task is also of its cause's class."""
    from ray.exceptions import RayTaskError

    causes = {
        StorageError("no room"): (1, "failed: no room"),
        AccessDeniedError("closed"): (2, "error: closed"),
        FULL: (1, "failed: no space"),
    }
    for cause, (code, said) in causes.items():
        assert (
            terminal.report_error(RayTaskError("task", "a traceback\nof many lines", cause).as_instanceof_cause())
            == code
        )
        shown = capsys.readouterr().err
        assert shown.startswith(f"htcl: {said}")
        assert shown.count("\n") == 1


def test_errors_of_ray_data(capsys: pytest.CaptureFixture[str]):
    """Ray Data replaces the error of a task by one of its own, and only the traceback names it."""
    from ray.exceptions import RayTaskError, UserCodeException

    text = "Traceback\n  File x\nhtcl_ray.errors.AccessDeniedError: access denied to s3://b/x (403); do\n\nThe above"
    error = RayTaskError("task", text, UserCodeException("UDF failed")).as_instanceof_cause()
    assert terminal.report_error(error) == 2
    assert capsys.readouterr().err == "htcl: error: access denied to s3://b/x (403); do\n"


def test_a_full_disk_at_every_kind_of_write(small_disk: Path):
    """The libraries that write artifacts, on a real full file system."""
    import faiss
    import torch

    from htcl_ray.training.checkpoint import TRAINING_STATE, save_checkpoint

    workspace = Workspace(str(small_disk / "ws"))
    workspace.check_writable()
    table = pa.table({"x": np.random.default_rng(0).random(100_000)})
    (small_disk.parent / "made").mkdir()
    (small_disk.parent / "made" / "x").write_bytes(bytes(400_000))
    index = faiss.IndexFlatL2(64)
    index.add(np.zeros((10_000, 64), np.float32))

    class Model:
        def save_pretrained(self, folder: Path) -> None:
            folder.mkdir(parents=True)

    state = SimpleNamespace(optimizer=torch.zeros(200_000))
    writes = {
        "table": lambda: workspace.write_table("x.parquet", table),
        "publish": lambda: workspace.publish(small_disk.parent / "made", "models/a/1", {}),
        "torch": lambda: save_checkpoint(small_disk / "checkpoint", Model(), state),
        "faiss": lambda: faiss.write_index(index, str(small_disk / "index.faiss")),
        "numpy": lambda: np.save(small_disk / "x.npy", np.zeros(200_000)),
        "probe": workspace.check_writable,
    }
    for name, write in writes.items():
        with pytest.raises(Exception) as caught:  # noqa: PT011
            write()
        failure = (
            storage_failure(caught.value, str(small_disk))
            if not isinstance(caught.value, StorageError)
            else caught.value
        )
        assert "no space left on the device of " in str(failure), name
        if name == "torch":
            assert (small_disk / "checkpoint" / TRAINING_STATE).exists()
        if name == "numpy":  # fill what the others left
            with contextlib.suppress(OSError), open(small_disk / "rest", "wb") as file:
                while file.write(bytes(512)):
                    file.flush()


@pytest.mark.parametrize(
    "error",
    [
        Exception(
            "The current node timed out during startup. This could happen because some of the raylet failed to startup."
        ),
        TimeoutError("Timed out after 60 seconds"),
        ConnectionError("no cluster"),
        ValueError("Malformed address"),
    ],
)
def test_ray_start_failure_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch):
    import ray

    def init(**options: Any) -> None:
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    config = resolve("demo")
    with pytest.raises(StepError, match=r"Ray did not start on this machine: .*run the same command again") as caught:
        connect(config)
    assert "\n" not in str(caught.value)


def test_unreachable_ray_address_raises():
    """Ray itself tries for minutes."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for written in (address, f"ray://{address}"):
            with pytest.raises(StepError, match=f"cannot connect to Ray at '{written}': Connection refused"):
                connect(resolve("demo").with_overrides({"ray.address": written, "workspace": "/w"}))


def test_sockets_fit_below_any_folder(monkeypatch: pytest.MonkeyPatch):
    """And no other user can reach them: Ray lets everyone write into its sessions."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        assert ray_folder() == f"{folder}/htcl-{os.geteuid()}/ray"
        assert stat.S_IMODE(Path(ray_folder()).parent.stat().st_mode) == 0o700
        for name in ("x" * 10, "x" * 100, "é" * 40):
            monkeypatch.setenv("TMPDIR", f"{folder}/{name}")
            assert len(os.fsencode(ray_folder() + RAY_SOCKET.removeprefix("/ray"))) <= 103
            assert Path(ray_folder()).parts[:3] in ((*Path(folder).parts,), ("/", "tmp", f"htcl-{os.geteuid()}"))
