"""Input of `htcl preprocess` that the user has to correct is refused before Ray starts."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray.catalog import tables
from htcl_ray.catalog.tables import read_part
from htcl_ray.cluster import connection
from htcl_ray.config import Config, resolve
from htcl_ray.errors import InputError
from htcl_ray.interactions.logs import LogShape, normalise
from htcl_ray.pipelines.events import plan_log
from htcl_ray.pipelines.preprocess import preprocess

pytestmark = pytest.mark.unit

CATALOG = "song_id,audio_path,title\na,a.wav,One\nb,b.wav,Two\n"
LOG = "user_id,trigger_song_id,song_id,feedback,timestamp\nu,a,b,like,1700000000\n"


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Valid input; a connection to Ray raises AssertionError."""

    def started(config: Config) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr(connection, "connect", started)
    for name in ("a.wav", "b.wav"):
        soundfile.write(tmp_path / name, np.zeros(16000), 16000)
    (tmp_path / "songs.csv").write_text(CATALOG)
    (tmp_path / "log.csv").write_text(LOG)
    keys = {
        "workspace": str(tmp_path / "ws"),
        "data.catalog": str(tmp_path / "songs.csv"),
        "data.interactions": str(tmp_path / "log.csv"),
    }
    return resolve("demo").with_overrides(keys)


def test_valid_input_starts_ray(config: Config) -> None:
    with pytest.raises(AssertionError, match="Ray was started"):
        preprocess(config)


INVALID: list[tuple[dict[str, str], dict[str, Any], str]] = [
    ({}, {"data.catalog": []}, "set data.catalog"),
    ({}, {"data.catalog": "nowhere.csv"}, "nowhere.csv does not exist"),
    ({}, {"data.interactions": "nowhere.csv"}, "nowhere.csv does not exist"),
    ({}, {"data.columns": {"genre": "stil"}}, "data.columns.genre is 'stil', but no table has"),
    ({}, {"data.text_columns": "titel"}, "did you mean 'title'"),
    ({"songs.csv": ""}, {}, "songs.csv is empty"),
    ({"songs.csv": "song_id,audio_path,title\n"}, {}, "is empty; expected at least one song"),
    ({"songs.csv": CATALOG + "a,c.wav,Three\n"}, {}, "more than once, for instance 'a'"),
    ({"songs.csv": CATALOG.replace("audio_path", "file")}, {}, "no column 'audio_path'"),
    (
        {"songs.csv": CATALOG + "c,c.wav,Three\n"},
        {},
        r"of 3 rows of the catalogue, 1 rejected \(audio_not_found 1\) is a share of 0\.333",
    ),
    ({"songs.csv": CATALOG + "c,c.wav,\nd,,Four\n"}, {}, r"2 rejected \(missing_audio_path 1, missing_text 1\)"),
    (
        {"songs.csv": "song_id,audio_path,title\nc,c.wav,Three\n"},
        {"data.max_rejected_share": 1},
        "no song of .* can be used: 1 rejected",
    ),
    ({"log.csv": ""}, {}, "log.csv is empty"),
    ({"log.csv": LOG.splitlines()[0] + "\n"}, {}, "is empty; expected at least one row"),
    ({"log.csv": "user_id,song_id\nu,a\n"}, {}, "no column 'timestamp'"),
    ({"log.csv": LOG + "u,a,b,liked,1700000002\n"}, {}, "unknown feedback values: 'liked'; expected like, collect"),
    (
        {"log.csv": LOG + "u,a,b,0,1700000001\n" * 9},
        {},
        "ratings of the log .* are from 0 to 0, and no number reaches 4; .*set pairs.min_positive",
    ),
    (
        {"log.csv": "user_id,song_id,rating\nu,a,1\nu,b,0\n"},
        {},
        "ratings of the log .* are from 0 to 1, and no number reaches 4",
    ),
    ({"log.csv": "user_id,song_id,rating\nu,a,80\nu,b,20\n"}, {}, "ratings of the log .* are from 20 to 80; "),
    (
        {"log.csv": LOG.replace("1700000000", "19723")},
        {},
        "no timestamp of the log .* can be read .the first is '19723'.; expected ISO 8601, or",
    ),
    ({"log.csv": LOG.replace("a,b", "y,z")}, {}, "names no song of the catalogue .*song_id 'z', the catalogue 'a'"),
]


@pytest.mark.parametrize(("files", "keys", "message"), INVALID)
def test_invalid_input_is_refused_before_ray_starts(
    config: Config, tmp_path: Path, files: dict[str, str], keys: dict[str, Any], message: str
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        preprocess(config.with_overrides(keys))
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "ws").rglob("manifest.json"))


def test_a_workspace_that_cannot_be_written_is_refused(config: Config, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        preprocess(config.with_overrides({"workspace": str(tmp_path / "file" / "ws")}))


def test_columns_of_both_tables_may_be_renamed(config: Config, tmp_path: Path) -> None:
    (tmp_path / "songs.csv").write_text(CATALOG.replace("song_id", "track"))
    (tmp_path / "log.csv").write_text(LOG.replace("user_id", "listener").replace(",song_id", ",track"))
    with pytest.raises(AssertionError, match="Ray was started"):
        preprocess(config.with_overrides({"data.columns": {"song_id": "track", "user_id": "listener"}}))


def recognised(config: Config, capsys: pytest.CaptureFixture[str]) -> str:
    """Output of the step before it starts Ray."""
    with pytest.raises(AssertionError, match="Ray was started"):
        preprocess(config)
    return capsys.readouterr().out


def test_the_step_prints_the_recognised_shapes(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.csv").write_text("user_id,song_id,weight,timestamp\n" + "u,a,3,1700000000\nu,b,1,1700000060\n" * 2)
    said = recognised(config, capsys)
    assert f"preprocess  log {tmp_path}/log.csv: affinity (user_id, song_id, weight); 4 rows; weight 1 to 3" in said
    assert "not used: timestamp" in said
    (tmp_path / "log").mkdir()
    (tmp_path / "log/1.csv").write_text("user_id,song_id,timestamp\nu,a,20240131\n")
    (tmp_path / "log/2.jsonl").write_text('{"user_id": "u", "song_id": "b", "timestamp": "2024-02-01"}\n')
    (tmp_path / "log/3.csv").write_text("user_id,song_id,stars\nu,a,5\nu,b,1\n")
    keys = {
        "data.interactions": [str(tmp_path / "log"), str(tmp_path / "log.csv")],
        "data.columns": {"rating": "stars"},
    }
    said = recognised(config.with_overrides(keys), capsys)
    assert (
        f"log {tmp_path}/log: plays (user_id, song_id, timestamp); 2 rows; timestamp 2024-01-31 to 2024-02-01 UTC "
        "(ISO 8601 2)"
    ) in said
    assert (
        f"log {tmp_path}/log: ratings (user_id, song_id, rating); 2 rows; ratings 1 to 5 (1 positive, from 4; "
        "0 neutral; 1 neg"
    ) in said
    assert f"log {tmp_path}/log.csv: affinity" in said


@pytest.mark.parametrize("late", ["feedback", "trigger_song_id", "played_ratio"])
def test_keys_that_appear_late_in_a_log_are_read(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: str
) -> None:
    monkeypatch.setattr(tables, "BATCH_ROWS", 7)
    values = {"feedback": "skip", "trigger_song_id": "b", "played_ratio": 0.1}
    rows: list[dict[str, Any]] = [
        {"user_id": f"u{i}", "song_id": "a", "timestamp": 1_700_000_000 + i} for i in range(90)
    ]
    for row in rows[70:]:
        row |= {late: values[late], "feedback": "skip"} if late != "played_ratio" else {late: values[late]}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config.with_overrides({"data.interactions": str(tmp_path / "log.jsonl")})
    (part,) = plan_log(config, "features").parts
    read = [
        normalise(t, part.shape, pa.array(["a", "b"]), config.pairs, "log", row)
        for row, t in read_part(part.part, part.columns)
    ]
    values_read = pa.concat_tables([events for events, _ in read])["value"].to_pylist()
    rejected = pa.concat_tables([bad for _, bad in read])
    if late == "feedback":
        assert (part.shape, values_read) == (LogShape.PLAYS, [1.0] * 70 + [-1.0] * 20)
    elif late == "played_ratio":
        assert (part.shape, values_read) == (LogShape.PLAYS, [1.0] * 70 + [0.0] * 20)
    else:
        assert (part.shape, values_read) == (LogShape.FEEDBACK, [-1.0] * 20)
        assert rejected["reason"].to_pylist() == ["unknown_trigger_song"] * 70
        assert rejected["row"].to_pylist() == list(range(70))


def test_planning_does_not_open_log_files(config: Config, tmp_path: Path) -> None:
    """A step whose events exist does not read a large log again."""
    (tmp_path / "log.jsonl").write_text("this is no table")
    plan = plan_log(config.with_overrides({"data.interactions": str(tmp_path / "log.jsonl")}), "features")
    with pytest.raises(InputError, match=r"no row of .* can be read: line 1 is not a JSON object"):
        assert plan.parts


def test_hidden_and_temporary_folders_of_a_log_are_skipped(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("a.csv", ".ipynb_checkpoints/a-checkpoint.csv", "_temporary/0/a.csv", "_delta_log/0.json")
    for name in names:
        (tmp_path / "log" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "log" / name).write_text(LOG if name.endswith("csv") else '{"commitInfo": {"timestamp": 1}}\n')
    assert "; 1 rows; " in recognised(config.with_overrides({"data.interactions": str(tmp_path / "log")}), capsys)


def test_column_types_of_databases_are_read(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ids = [uuid.UUID(int=0xF0 << 120 | i) for i in range(2)]
    binary = pa.array([value.bytes for value in ids], pa.binary(16))
    songs = {
        "song_id": binary,
        "audio_path": ["a.wav", "b.wav"],
        "title": pa.array([{"name": "One"}, {"name": "Two"}]),
        "genre": ["x", "y"],
    }
    pq.write_table(pa.table(songs), tmp_path / "songs.parquet")
    log = {
        "user_id": binary,
        "song_id": [str(value) for value in ids],
        "timestamp": [1_700_000_000] * 2,
        "feedback": [["like"], ["share"]],
    }
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    keys = {"data.catalog": str(tmp_path / "songs.parquet"), "data.interactions": str(tmp_path / "log.parquet")}
    said = recognised(config.with_overrides(keys), capsys)
    assert "plays (user_id, song_id, timestamp); 2 rows" in said
    assert "feedback like 1, share 1" in said
    assert (
        "catalogue: 2 cells cannot be read and are null (rows count from 0): title 2, e.g. {'name': 'One'} in row 0 of"
        in said
    )
