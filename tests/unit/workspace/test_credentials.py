"""Credentials of URIs: usable in this process, removed from everything written, printed, logged or sent."""

from __future__ import annotations

import dataclasses
import json
import logging
import pickle
from pathlib import Path

import pytest
import yaml

from htcl_ray import errors
from htcl_ray.catalog.quarantine import NullCells, rejected_rows
from htcl_ray.cli import main
from htcl_ray.config import Config, resolve
from htcl_ray.config.sections import TrackingSettings
from htcl_ray.errors import AudioError, ConfigError, HtclError, RequestError, WorkspaceError
from htcl_ray.index.live.update_log import store_upload
from htcl_ray.index.song_index import SongIndex
from htcl_ray.schemas import Reason
from htcl_ray.training.trackers import MlflowTracker, Trackers, check_tracking
from htcl_ray.workspace import filesystem
from htcl_ray.workspace.credentials import lacks_credentials, tree_without_credentials, without_credentials
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import unit_vectors

pytestmark = pytest.mark.unit

USER, SECRET = "AKIAUSER", "Secr3tW0rd"
HOST = "bucket.example"
URIS = [
    (f"s3://{USER}:{SECRET}@{HOST}/x", f"s3://***@{HOST}/x"),
    (f"s3://{USER}:{SECRET}%2F1@{HOST}/x?region=eu", f"s3://***@{HOST}/x?region=eu"),
    (f"s3://{USER}:ab/{SECRET}+c@{HOST}/x", f"s3://***@{HOST}/x"),
    (f"https://{USER}:p@{SECRET}@{HOST}:5000/x", f"https://***@{HOST}:5000/x"),
    (f"http://{SECRET}@{HOST}", f"http://***@{HOST}"),
    (f"postgresql+psycopg2://{USER}:a?{SECRET}@{HOST}/db", f"postgresql+psycopg2://***@{HOST}/db"),
    (f"s3://{HOST}/x?access_key={SECRET}&region=eu", f"s3://{HOST}/x?access_key=***&region=eu"),
    (f"https://{HOST}/x?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}&a=1", f"https://{HOST}/x?X-Amz-Credential=***&X-Amz-Signature=***&a=1"),
    (f"https://{HOST}/x?a=1&sig={SECRET}", f"https://{HOST}/x?a=1&sig=***"),
    (f"mysql://{HOST}/db?user=me&password={SECRET}", f"mysql://{HOST}/db?user=me&password=***"),
    (f"https://{HOST}/x?Api-Key={SECRET};token={SECRET}", f"https://{HOST}/x?Api-Key=***;token=***"),
]  # fmt: skip
HARMLESS = [
    f"s3://{HOST}/song@home.wav", f"http://{HOST}:5000/a@b", "http://[::1]:5000/a@b", "sqlite:////a/b@c.db", "recall@10 is 0.5", "a: b@c",
    f"s3://{HOST}/x?region=eu&endpoint_override=localhost:9000", f"see http://{HOST} and recall@10", "title: {label}", "/home/u@x/ws",
    "password=none", f"https://{HOST}/?author=me",
]  # fmt: skip


@pytest.mark.parametrize(("uri", "shown"), URIS)
def test_credentials_are_left_out_of_a_uri_and_of_a_sentence_with_it(uri: str, shown: str):
    assert without_credentials(uri) == shown
    assert without_credentials(f"'{uri}' and '{uri}' differ") == f"'{shown}' and '{shown}' differ"
    assert without_credentials(shown) == shown
    assert lacks_credentials(shown)
    assert not lacks_credentials(uri)


@pytest.mark.parametrize("text", HARMLESS)
def test_anything_else_stays(text: str):
    assert without_credentials(text) == text
    assert not lacks_credentials(text)


PLACES = {
    "workspace": "s3://{}@bucket/ws",
    "data.catalog": ["s3://{}@bucket/songs.csv", "/local/songs.csv"],
    "data.interactions": ["gs://bucket/log.csv?token={}"],
    "text.name_or_path": "https://{}@hub/model",
    "tracking.mlflow_uri": "https://{}@mlflow:5000",
    "tracking.project": "https://{}@x",
    "ray.address": "ray://{}@head:10001",
    "serve.api_keys_file": "https://{}@x/keys.yaml",
    "serve.allowed_origins": ["https://{}@page"],
    "evaluate.label_prompts": "{{label}} https://{}@x",
    "tune.space": {"text.name_or_path": ["https://{}@hub/a", "b"]},
}


def _filled(value: object) -> object:
    if isinstance(value, str):
        return value.format(f"{USER}:{SECRET}")
    if isinstance(value, list):
        return [_filled(item) for item in value]
    return {name: _filled(item) for name, item in value.items()} if isinstance(value, dict) else value


@pytest.fixture
def config() -> Config:
    return resolve("demo").with_overrides({key: _filled(value) for key, value in PLACES.items()})


def test_a_configuration_is_written_without_and_used_with_them(config: Config):
    section = {"name": "semantic", "tracking": config.tracking.model_dump(mode="json")}
    written = [
        config.as_yaml(), config.model_dump_json(), json.dumps(config.model_dump(mode="json")), repr(config), f"{config}",
        f"{config.tracking!r}",
        json.dumps(build_manifest("index", config=config.model_dump(), inputs={})), json.dumps(section),
    ]  # fmt: skip
    for text in written:
        assert SECRET not in text
        assert USER not in text
    assert "https://***@mlflow:5000" in config.as_yaml()
    for loaded in (
        config,
        config.with_overrides({"pretrain.epochs": 3}),
        config.with_absolute_paths(),
        pickle.loads(pickle.dumps(config)),
    ):
        assert loaded.tracking.mlflow_uri == f"https://{USER}:{SECRET}@mlflow:5000"
        assert loaded.workspace == f"s3://{USER}:{SECRET}@bucket/ws"
        assert loaded.data.catalog == (f"s3://{USER}:{SECRET}@bucket/songs.csv", "/local/songs.csv")
        assert loaded.data.interactions == (f"gs://bucket/log.csv?token={USER}:{SECRET}",)
        assert (loaded.tune.space or {})["text.name_or_path"].values == (f"https://{USER}:{SECRET}@hub/a", "b")


def test_config_show_prints_none_and_what_it_printed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    uri = f"https://{USER}:{SECRET}@mlflow:5000"
    assert main(["config", "show", "--preset", "demo", "--set", f"tracking.mlflow_uri={uri}"]) == 0
    shown = capsys.readouterr().out
    assert SECRET not in shown
    file = tmp_path / "config.yaml"
    file.write_text(shown)
    assert main(["config", "show", "--config", str(file)]) == 2
    assert "tracking.mlflow_uri is 'https://***@mlflow:5000'" in (said := capsys.readouterr().err)
    assert len(said.splitlines()) == 1
    assert main(["config", "show", "--config", str(file), "--set", f"tracking.mlflow_uri={uri}"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(shown)


@pytest.mark.parametrize(
    "options",
    [
        ["--set", f"no.such.key=https://{USER}:{SECRET}@x"],
        ["--set", f"serve.port=https://{USER}:{SECRET}@x"],
        ["--set", f"https://{USER}:{SECRET}@x"],
        ["--config", f"ftp://{USER}:{SECRET}@x/c.yaml"],
        ["--workspace", f"ftp://{USER}:{SECRET}@x/ws"],
        ["--set", f"ray.address={USER}:{SECRET}@x:1", "--set", f"tracking.mlflow_uri=[https://{USER}:{SECRET}@x]"],
    ],
    ids=lambda options: options[0] + options[1][:12],
)
def test_no_message_of_the_command_line_shows_them(options: list[str], capsys: pytest.CaptureFixture[str]):
    assert main(["index", "--preset", "demo", *options]) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err
    assert USER not in said.out + said.err


def test_an_unexpected_error_shows_none(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    from htcl_ray import cli

    def fail(*_: object) -> None:
        raise RuntimeError(f"cannot open s3://{USER}:{SECRET}@bucket/x")

    monkeypatch.setitem(cli.COMMANDS, "config", dataclasses.replace(cli.COMMANDS["config"], run=fail))
    assert main(["config", "show"]) == 1
    said = capsys.readouterr().err
    assert "RuntimeError: cannot open s3://***@bucket/x" in said
    assert SECRET not in said


def test_errors_of_this_package_remove_credentials():
    text = f"s3://{USER}:{SECRET}@bucket/x cannot be read"
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, HtclError)]
    assert len(kinds) > 15
    for kind in kinds:
        made = {AudioError: (Reason.UNDECODABLE, text), RequestError: (404, "code", text)}.get(kind, (text,))
        error = kind(*made)
        again = pickle.loads(pickle.dumps(error))
        for raised in (error, again):
            assert "s3://***@bucket/x cannot be read" in str(raised)
            assert SECRET not in f"{raised!r} {raised.args} {getattr(raised, 'detail', '')}"


def test_a_workspace_is_opened_with_them_and_named_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(filesystem, "S3_ATTEMPTS", 1)  # no server is reached, and no waiting makes that better
    uri = f"s3://{USER}:{SECRET}@bucket/ws?region=us-east-1&endpoint_override=127.0.0.1:9"
    for workspace in (opened := Workspace(uri), pickle.loads(pickle.dumps(opened))):
        assert SECRET not in workspace.uri + workspace.uri_of("a") + repr(workspace)
        assert workspace.location == uri
        options = workspace.fs.__reduce__()[1][0]
        assert (options["access_key"], options["secret_key"]) == (USER, SECRET)
    with pytest.raises(HtclError) as caught:
        opened.check_writable()
    assert SECRET not in str(caught.value)
    plain = Workspace(f"s3://{USER}:{SECRET}@bucket/ws?region=x")
    assert plain.location_of("a") == f"s3://{USER}:{SECRET}@bucket/ws/a?region=x"
    assert plain.uri_of("a") == "s3://***@bucket/ws/a?region=x"
    assert Workspace(plain.location_of("a")).root == plain.full("a")


def test_stored_upload_can_be_read(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    assert Path(store_upload(workspace, b"audio", "a.wav")).read_bytes() == b"audio"


def test_tables_of_rejected_rows_name_their_source_without():
    source = f"s3://{USER}:{SECRET}@bucket/songs.csv"
    table = rejected_rows(["a", None], [0, 1], source, Reason.UNDECODABLE, [f"{source} is broken", "too short"])
    assert SECRET not in str(table.to_pylist())
    assert table["source"].to_pylist() == ["s3://***@bucket/songs.csv"] * 2
    import pyarrow as pa

    cells = NullCells()
    cells.add("year", pa.chunked_array([["x"]]), pa.array([None], pa.int32()), source, 0)
    assert SECRET not in f"{cells} {cells.examples}"


class BrokenTracker:
    """The error of MLflow's client when its server does not respond."""

    def __init__(self, tracker: MlflowTracker, opens: bool) -> None:
        self.name, self.target, self.uri, self.opens = tracker.name, tracker.target, tracker.uri, opens

    def open(self, run_id: str | None) -> str:
        if not self.opens:
            raise RuntimeError(f"API request to {self.uri}/api/2.0 failed with exception")
        return "run-1"

    def write(self, metrics: object) -> None:
        raise RuntimeError(f"API request to {self.uri}/api/2.0 failed with exception")

    close = write


def test_a_tracker_gets_the_address_whole_and_nothing_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    uri = f"https://{USER}:{SECRET}@mlflow:5000"
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    settings = check_tracking(TrackingSettings(trackers=("mlflow",), mlflow_uri=uri))
    tracker = MlflowTracker(settings, "pretrain", "v1", {})
    assert tracker.uri == uri
    assert SECRET not in tracker.target
    workspace, said = Workspace(str(tmp_path)), list[str]()
    trackers = Trackers(workspace, "runs/pretrain/v1", [BrokenTracker(tracker, opens=True)], said.append)
    trackers.catch_up([{"step": 1, "loss": 1.0}])
    trackers.close(finished=True)
    assert len(said) == 2
    assert SECRET not in str(said) + workspace.read_bytes("runs/pretrain/v1/trackers.json").decode()
    with pytest.raises(ConfigError) as caught:
        Trackers(workspace, "runs/pretrain/v2", [BrokenTracker(tracker, opens=False)], said.append)
    import traceback

    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_an_index_that_is_saved_tells_none(tmp_path: Path, config: Config, caplog: pytest.LogCaptureFixture):
    index = SongIndex.build(["a", "b"], unit_vectors(0, 2))
    with caplog.at_level(logging.DEBUG):
        index.save(tmp_path / "index", config=config.model_dump(), inputs={})
    for file in (tmp_path / "index").rglob("*"):
        assert SECRET.encode() not in file.read_bytes()
    assert SECRET not in caplog.text


def test_a_tree_keeps_its_shape():
    tree = {"a": [1, None, (f"s3://{USER}:{SECRET}@b",)], "c": {"d": True}}
    assert tree_without_credentials(tree) == {"a": [1, None, ["s3://***@b"]], "c": {"d": True}}
    assert isinstance(WorkspaceError("x"), HtclError)
