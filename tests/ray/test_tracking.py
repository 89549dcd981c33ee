"""The real MLflow and Weights & Biases: an SQLite file read with MLflow's client, and W&B's offline files read record
by record."""

from __future__ import annotations

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from htcl_ray.config import Config
from htcl_ray.config.sections import TrackingSettings
from htcl_ray.errors import ConfigError
from htcl_ray.pipelines.train import pretrain
from htcl_ray.training.trackers import open_trackers
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.ray
RUN = "runs/pretrain/abc"
PARAMETERS = {"model": {"dim": 16}, "pretrain": {"batch_size": 32, "seed": 0}}


def metrics(epoch: int) -> dict[str, float]:
    return {"epoch": epoch, "step": 10 * epoch, "loss": 1 / epoch, "validation_recall@10": 0.25 * epoch}


def train_and_resume(workspace: Workspace, settings: TrackingSettings) -> None:
    """Two epochs, an end that is none, and a run that resumes from epoch 1."""
    first = open_trackers(settings, workspace, RUN, PARAMETERS, print)
    first.catch_up([metrics(1), metrics(2)])
    first.close(finished=False)
    again = open_trackers(settings, workspace, RUN, {**PARAMETERS, "pretrain": {"batch_size": 64, "seed": 0}}, print)
    again.catch_up([metrics(1), metrics(2), metrics(3)])
    again.close(finished=True)


def test_mlflow_holds_one_run_with_every_step_once(tmp_path: Path):
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    train_and_resume(
        Workspace(str(tmp_path / "workspace")), TrackingSettings(trackers=("mlflow",), project="songs", mlflow_uri=uri)
    )
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("songs")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["htcl.step"]) == ("abc", "FINISHED", "pretrain")
    assert run.data.params == {"model.dim": "16", "pretrain.batch_size": "32", "pretrain.seed": "0"}
    for name, values in (("loss", [1, 1 / 2, 1 / 3]), ("validation_recall_at_10", [0.25, 0.5, 0.75])):
        assert [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)] == list(
            zip((10, 20, 30), values, strict=True)
        )


def test_wandb_writes_one_run_with_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train_and_resume(Workspace(str(tmp_path)), TrackingSettings(trackers=("wandb",), project="songs"))
    files = sorted((tmp_path / RUN / "wandb").glob("offline-run-*/*.wandb"))
    records = [finished_wandb_records(file) for file in files]
    assert [[step for step, _ in part["history"]] for part in records] == [[10, 20], [30]]
    assert [values["validation_recall@10"] for part in records for _, values in part["history"]] == [0.25, 0.5, 0.75]
    assert [(part["project"], part["name"], part["exit"]) for part in records] == [
        ("songs", "abc", 1),
        ("songs", "abc", 0),
    ]
    (run_id,) = {part["id"] for part in records}
    assert json.loads((tmp_path / RUN / "trackers.json").read_text()) == {"wandb songs": {"run": run_id, "step": 30}}
    assert records[0]["config"]["pretrain.batch_size"] == 32


def finished_wandb_records(file: Path) -> dict[str, Any]:
    """W&B writes in a process of its own, which may be a moment behind when `finish` returns; the exit is the last
    record."""
    deadline = time.monotonic() + 30
    while "exit" not in (recorded := wandb_records(file)):
        assert time.monotonic() < deadline, f"{file} has no end: {recorded}"
        time.sleep(0.1)
    return recorded


def wandb_records(file: Path) -> dict[str, Any]:
    """What an offline run holds: blocks of 32 KiB with (checksum, length, kind) before each piece, as LevelDB's log,
    after 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, piece = file.read_bytes(), 7, b""
    recorded: dict[str, Any] = {"history": []}
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        piece += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind not in (1, 4):  # whole, or last part
            continue
        record = wandb_internal_pb2.Record.FromString(piece)
        piece = b""
        if record.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            recorded["history"].append((items["_step"], items))
        elif record.WhichOneof("record_type") == "run":
            config = {item.key: json.loads(item.value_json) for item in record.run.config.update}
            recorded |= {
                "id": record.run.run_id,
                "project": record.run.project,
                "name": record.run.display_name,
                "config": config,
            }
        elif record.WhichOneof("record_type") == "exit":
            recorded["exit"] = record.exit.exit_code
    return recorded


def test_an_address_that_does_not_respond_is_one_sentence(tmp_path: Path):
    settings = TrackingSettings(trackers=("mlflow",), mlflow_uri=f"sqlite:///{tmp_path}/absent/folder/mlflow.db")
    (tmp_path / "absent").write_text("a file where a folder should be")
    with pytest.raises(
        ConfigError, match=r"^mlflow cannot be opened at mlflow sqlite:///.* \(.+\); correct the tracking section"
    ):
        open_trackers(settings, Workspace(str(tmp_path / "workspace")), RUN, PARAMETERS, print)


def test_wandb_offline_needs_a_folder_that_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    elsewhere = Workspace(str(tmp_path))
    monkeypatch.setattr(Workspace, "is_local", False)
    with pytest.raises(ConfigError, match="W&B is offline and the workspace is not on this machine"):
        open_trackers(TrackingSettings(trackers=("wandb",)), elsewhere, RUN, PARAMETERS, print)


def test_workers_send_what_metrics_jsonl_holds(tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch):
    """Through the pipeline, with an address relative to the caller's folder; and tracking is no part of what a model
    is."""
    from mlflow.tracking import MlflowClient

    monkeypatch.chdir(tmp_path)
    config: Config = tiny_config(tmp_path / "workspace", **{"pretrain.num_workers": 1, "pretrain.epochs": 2})
    write_features(config)
    tracked = config.with_overrides({"tracking.trackers": ["mlflow"], "tracking.mlflow_uri": "sqlite:///mlflow.db"})
    result = pretrain(tracked)
    workspace = Workspace(config.workspace)
    run = f"runs/pretrain/{Path(result.location).name}"
    lines = [json.loads(line) for line in workspace.read_bytes(f"{run}/metrics.jsonl").splitlines()]
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (recorded,) = client.search_runs([client.get_experiment_by_name("htcl-ray").experiment_id])
    assert (recorded.info.run_name, recorded.info.status) == (Path(result.location).name, "FINISHED")
    assert recorded.data.params["model.dim"] == "16"
    for name in lines[0]:
        if name != "step":
            sent = [
                (point.step, point.value)
                for point in client.get_metric_history(recorded.info.run_id, name.replace("@", "_at_"))
            ]
            assert sent == [(line["step"], line[name]) for line in lines], name
    assert pretrain(config).skipped
