"""Trackers follow metrics.jsonl: a fake one shows what is sent when. The real MLflow and W&B are in
tests/ray/test_tracking.py."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from htcl_ray.config.sections import TrackingSettings
from htcl_ray.errors import ConfigError
from htcl_ray.training.metrics_log import MetricsLog
from htcl_ray.training.trackers import Trackers, check_tracking
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit
RUN = "runs/pretrain/abc"


class Server:
    """Keeps what it gets, like a tracker's server: runs by id."""

    name = "server"

    def __init__(self, target: str = "server one") -> None:
        self.target = target
        self.runs: dict[str, list[tuple[float, float]]] = {}
        self.ended: list[bool] = []
        self.down = False

    def open(self, run_id: str | None) -> str:
        if self.down:
            raise ConnectionError("no route to host\nsecond line")
        self.current = run_id or f"run-{len(self.runs)}"
        self.runs.setdefault(self.current, [])
        return self.current

    def write(self, metrics: dict[str, float]) -> None:
        if self.down:
            raise ConnectionError("no route to host")
        self.runs[self.current].append((metrics["step"], metrics["loss"]))

    def close(self, finished: bool) -> None:
        self.ended.append(finished)


def line(epoch: int, loss: float = 1.0) -> dict[str, float]:
    return {"epoch": epoch, "step": 10 * epoch, "loss": loss}


def log_of(workspace: Workspace, *servers: Server, epochs_done: int = 0, said: list[str] | None = None) -> MetricsLog:
    said = [] if said is None else said
    return MetricsLog(workspace, RUN, 10 * epochs_done, Trackers(workspace, RUN, servers, said.append))


def test_a_resumed_run_goes_on_in_the_same_place_without_repeating(tmp_path: Path):
    workspace, server = Workspace(str(tmp_path)), Server()
    log = log_of(workspace, server)
    for epoch in (1, 2, 3):
        log.write(line(epoch))
    log.close(finished=False)
    for _ in range(
        2
    ):  # the third epoch's checkpoint was never stored, and the second run ended before it wrote anything
        log = log_of(workspace, server, epochs_done=2)
    log.write(line(3, loss=2.0))
    log.write(line(4))
    log.close()
    assert server.runs == {"run-0": [(10, 1.0), (20, 1.0), (30, 1.0), (40, 1.0)]}
    assert server.ended == [False, True]


def test_what_could_not_be_sent_is_sent_later_and_training_goes_on(tmp_path: Path):
    workspace, server, said = Workspace(str(tmp_path)), Server(), []
    log = log_of(workspace, server, said=said)
    log.write(line(1))
    server.down = True
    log.write(line(2))
    assert said == ["server cannot be reached (no route to host); its metrics wait in metrics.jsonl"]
    assert len(workspace.read_bytes(f"{RUN}/metrics.jsonl").splitlines()) == 2
    server.down = False
    log.write(line(3))
    assert server.runs == {"run-0": [(10, 1.0), (20, 1.0), (30, 1.0)]}


def test_a_tracker_that_is_added_later_gets_the_epochs_before(tmp_path: Path):
    workspace, first, second = Workspace(str(tmp_path)), Server(), Server("server two")
    log_of(workspace, first).write(line(1))
    log_of(workspace, first, second, epochs_done=1).write(line(2))
    assert first.runs == second.runs == {"run-0": [(10, 1.0), (20, 1.0)]}


def test_a_tracker_that_does_not_open_is_one_sentence(tmp_path: Path):
    server = Server()
    server.down = True
    with pytest.raises(
        ConfigError, match=r"^server cannot be opened at server one \(no route to host\); correct the tracking section"
    ):
        log_of(Workspace(str(tmp_path)), server)


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else find_spec(name, *rest)
    )
    with pytest.raises(
        ConfigError, match=r"names wandb, which is not installed here; run: pip install 'htcl-ray\[wandb\]'"
    ):
        check_tracking(TrackingSettings(trackers="wandb"))


def test_mlflow_needs_an_address_that_workers_in_other_folders_find(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"neither tracking\.mlflow_uri nor MLFLOW_TRACKING_URI is set"):
        check_tracking(TrackingSettings(trackers=("mlflow",)))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert check_tracking(TrackingSettings(trackers=("mlflow",))).mlflow_uri == "http://host:5000"
    checked = check_tracking(TrackingSettings(trackers=("mlflow",), mlflow_uri="sqlite:///here.db"))
    assert checked.mlflow_uri == f"sqlite:///{os.getcwd()}/here.db"
    assert check_tracking(checked) == checked
