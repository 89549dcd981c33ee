"""The preprocess step on a real small Ray cluster."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from htcl_ray.audio import decode, log_mel
from htcl_ray.catalog import tables
from htcl_ray.config import Config, resolve
from htcl_ray.errors import InputError
from htcl_ray.interactions.logs import LogShape, complete, normalise
from htcl_ray.interactions.pairs import finish_negatives, finish_pairs, partial_pairs, positives
from htcl_ray.interactions.splits import group_split, period_ends
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines import mine_pairs as pairs_step
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.schemas import EVENTS, PAIRS, features_schema
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.ray

SONGS, USERS = 90, 40
LOG_ROWS = 1800
"""Few enough for periods to be cut exactly."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a catalogue of short clips, two of them broken, and a feedback log, some of whose rows are
    broken."""
    folder = tmp_path_factory.mktemp("world")
    random = np.random.default_rng(0)
    with open(folder / "songs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["song_id", "audio_path", "title", "artist", "genre"])
        for i in random.permutation(SONGS):
            samples = 0.3 * random.standard_normal(round(16000 * random.uniform(0.5, 3)))
            soundfile.write(folder / f"{i}.wav", samples, 16000)
            table.writerow([f"song-{i:03d}", f"{i}.wav", f"Title {i}", f"Artist {i % 30}", "rock; folk"])
    (folder / "7.wav").write_bytes(b"not audio at all")
    soundfile.write(folder / "8.wav", np.zeros(10), 16000)
    with open(folder / "log.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["user_id", "trigger_song_id", "song_id", "feedback", "timestamp"])
        for row in range(LOG_ROWS):
            trigger, song = (f"song-{min(int(random.exponential(25)), SONGS - 1):03d}" for _ in range(2))
            feedback = random.choice(["like", "skip", "play", "share", "4.5"])
            user = "" if row % 100 == 0 else f"user-{random.integers(USERS)}"
            table.writerow([user, trigger, song, feedback, 1_700_000_000 + 60 * row])
    return folder


def config_for(folder: Path, workspace: Path, **keys: Any) -> Config:
    fixed = {
        "workspace": str(workspace),
        "data.catalog": str(folder / "songs.csv"),
        "data.songs_per_shard": 16,
        "data.max_rejected_share": 0.2,
        "audio.clip_seconds": 2.0,
    }
    return resolve("demo").with_overrides({**fixed, **{key.replace("__", "."): value for key, value in keys.items()}})


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read(workspace: Path, kind: str) -> pa.Table:
    (folder,) = (workspace / kind).iterdir()
    return Workspace(str(workspace)).read_tables(f"{kind}/{folder.name}")


@pytest.fixture(scope="module")
def preprocessed(
    world: Path, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> tuple[Path, Config, StepResult]:
    workspace = tmp_path_factory.mktemp("workspace")
    config = config_for(world, workspace, data__interactions=str(world / "log.csv"))
    return workspace, config, preprocess(config)


def test_features_are_those_of_the_audio_layer(preprocessed: tuple[Path, Config, StepResult], world: Path) -> None:
    workspace, config, result = preprocessed
    features = read(workspace, "features")
    recipe = config.audio
    assert features.schema.equals(features_schema(recipe.max_frames, recipe.n_mels))
    assert features["song_id"].to_pylist() == [f"song-{i:03d}" for i in range(SONGS) if i not in (7, 8)]
    assert not result.skipped
    assert "88 songs, 2 rejected (too_short 1, undecodable 1)" in result.summary
    mels = features["features"].combine_chunks().to_numpy_ndarray()
    for row, song in enumerate(features.drop_columns(["features"]).to_pylist()):
        number = int(song["song_id"][5:])
        expected = log_mel(decode(world / f"{number}.wav", recipe), recipe.sample_rate, recipe)
        valid = song["valid_frames"]
        assert valid == len(expected) <= recipe.max_frames
        np.testing.assert_array_equal(mels[row, :valid], expected.astype(np.float16))
        assert np.all(mels[row, valid:] == expected.min().astype(np.float16))
        assert song["text"] == f"Title {number}; Artist {number % 30}; rock, folk"
        assert song["genre"] == ["rock", "folk"]
        assert song["split"] == group_split(f"artist:artist {number % 30}", config.data.split_shares)
        assert song["audio_path"] == str(world / f"{number}.wav")


def test_quarantine_names_every_rejected_row(preprocessed: tuple[Path, Config, StepResult], world: Path) -> None:
    workspace, _, _ = preprocessed
    tables = [
        Workspace(str(workspace)).read_tables(f"quarantine/{folder.name}")
        for folder in (workspace / "quarantine").iterdir()
    ]
    rejected = pa.concat_tables(tables).to_pylist()
    row_of = {row["song_id"]: number for number, row in enumerate(rows_of(world / "songs.csv"))}
    audio = {(r["song_id"], r["row"], r["reason"]) for r in rejected if r["source"] == str(world / "songs.csv")}
    assert audio == {("song-007", row_of["song-007"], "undecodable"), ("song-008", row_of["song-008"], "too_short")}
    log = rows_of(world / "log.csv")
    bad = {"song-007", "song-008"}
    expected = {n for n, row in enumerate(log) if not row["user_id"] or {row["song_id"], row["trigger_song_id"]} & bad}
    of_log = [r for r in rejected if r["source"] == str(world / "log.csv")]
    assert {r["row"] for r in of_log} == expected
    assert len(of_log) == len(expected)
    assert {r["reason"] for r in of_log} == {"missing_user_id", "unknown_song", "unknown_trigger_song"}


def test_events_and_pairs_are_those_of_the_plain_functions(
    preprocessed: tuple[Path, Config, StepResult], world: Path
) -> None:
    workspace, config, _ = preprocessed
    songs = read(workspace, "features").select(["song_id", "split"]).combine_chunks()
    log = pa.Table.from_pylist(rows_of(world / "log.csv"))
    accepted, _ = normalise(log, LogShape.FEEDBACK, songs["song_id"].combine_chunks(), config.pairs, "log", 0)
    ends = period_ends(np.arange(LOG_ROWS) * 60.0 + 1_700_000_000, np.ones(LOG_ROWS), config.data.split_shares)
    events = read(workspace, "events")
    assert events.schema.equals(EVENTS)
    assert events.equals(complete(accepted, ends, config.data.held_out_user_share))

    newest = events["timestamp"].to_numpy()[np.array(events["period"].to_pylist()) == "train"].max()
    partial = partial_pairs(events, songs, newest, config.pairs)
    pairs, _ = finish_pairs(
        partial, songs["song_id"].combine_chunks(), positives(events, songs, config.pairs), config.pairs
    )
    assert pairs.num_rows > 100
    mined = read(workspace, "pairs")
    assert mined.schema.equals(PAIRS)
    assert mined.equals(pairs)
    negatives, dropped = finish_negatives(partial, config.pairs)
    assert negatives.num_rows > 20
    assert read(workspace, "negatives").equals(negatives)
    ((version, manifest),) = Workspace(str(workspace)).finished("negatives")
    assert version == Workspace(str(workspace)).finished("pairs")[0][0]
    assert manifest["quality"]["negatives"] == negatives.num_rows
    assert manifest["quality"]["dropped"] == dict(sorted(dropped.items()))


def test_the_number_of_buckets_and_parts_changes_nothing(
    world: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plays = pa.Table.from_pylist(rows_of(world / "log.csv")).select(["user_id", "song_id", "feedback", "timestamp"])
    pq.write_table(plays, tmp_path / "plays.parquet")
    preprocess(
        config_for(
            world, tmp_path / "one", data__interactions=str(tmp_path / "plays.parquet"), pairs__session_gap_minutes=120
        )
    )

    (tmp_path / "plays").mkdir()
    for part in range(3):
        pq.write_table(plays.slice(part * 600, 600), tmp_path / "plays" / f"{part}.parquet", row_group_size=100)
    monkeypatch.setattr(tables, "PART_ROWS", 300)
    monkeypatch.setattr(pairs_step, "EVENTS_PER_BUCKET", 300)
    preprocess(
        config_for(world, tmp_path / "many", data__interactions=str(tmp_path / "plays"), pairs__session_gap_minutes=120)
    )
    assert len(list((tmp_path / "many" / "events").glob("*/part-*.parquet"))) > 3
    assert len(list((tmp_path / "many" / "pairs").glob("*/part-*.parquet"))) > 1
    order = [("trigger_song_id", "ascending"), ("song_id", "ascending")]
    for kind in ("pairs", "negatives"):
        one, many = (read(tmp_path / name, kind).sort_by(order) for name in ("one", "many"))
        assert one.num_rows > 50
        assert many.equals(one), "to the last bit"


def test_the_second_run_is_skipped_without_ray(
    preprocessed: tuple[Path, Config, StepResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config, first = preprocessed

    def started(config: Config) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.setattr("htcl_ray.cluster.connection.connect", started)
    second = preprocess(config)
    assert second.skipped
    assert (second.location, second.summary) == (first.location, first.summary)


def test_only_pairs_are_made_again_when_only_mining_changes(
    preprocessed: tuple[Path, Config, StepResult], tmp_path: Path
) -> None:
    workspace, config, _ = preprocessed
    stamps = {
        path: path.stat().st_mtime_ns
        for kind in ("features", "events")
        for path in (workspace / kind).rglob("*.parquet")
    }
    result = preprocess(config.with_overrides({"pairs.min_support": 2}))
    assert not result.skipped
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    versions = Workspace(str(workspace)).finished("pairs")
    assert [manifest["config"]["pairs"]["min_support"] for _, manifest in versions] == [1, 2]
    for kind in ("pairs", "negatives"):
        Workspace(str(workspace)).remove(f"{kind}/{versions[1][0]}")


def test_a_workspace_from_before_negatives_gets_them(preprocessed: tuple[Path, Config, StepResult]) -> None:
    folder, config, _ = preprocessed
    workspace = Workspace(str(folder))
    pairs, negatives = read(folder, "pairs"), read(folder, "negatives")
    workspace.remove("negatives")
    assert not preprocess(config).skipped
    assert read(folder, "pairs").equals(pairs)
    assert read(folder, "negatives").equals(negatives)
    assert preprocess(config).skipped


def test_without_a_log_only_features_are_made(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    result = preprocess(config_for(world, tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["features", "quarantine"]
    assert result.summary == "88 songs, 2 rejected (too_short 1, undecodable 1)"


def test_too_many_rejected_rows_leave_nothing_finished(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    config = config_for(world, tmp_path, data__max_rejected_share=0.02)
    with pytest.raises(InputError, match=r"of 90 rows of the catalogue, 2 rejected .*data\.max_rejected_share=0\.02"):
        preprocess(config)
    assert not list(tmp_path.rglob("manifest.json"))
    assert preprocess(config.with_overrides({"data.max_rejected_share": 0.03})).summary.startswith("88 songs")


def test_shards_without_a_song_do_not_stay(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    preprocess(config_for(world, tmp_path, data__songs_per_shard=1))
    shards = list((tmp_path / "features").glob("*/shard-*.parquet"))
    assert len(shards) == 88
    assert {pq.read_metadata(shard).num_rows for shard in shards} == {1}


def test_an_artist_and_a_recording_are_in_one_split(
    tmp_path: Path, ray_cluster: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Half of the songs credit a guest too; two recordings are in the catalogue under another artist's name as well."""
    random = np.random.default_rng(0)
    artists: list[Any] = [
        f"Artist {i}" if i % 2 else [f"ARTIST {i - 1 if i else 0}", f"Guest {i // 4} feat. Extra {i}"]
        for i in range(40)
    ]
    recording = [{30: 1, 35: 2}.get(i, i) for i in range(40)]
    for i in set(recording):
        soundfile.write(tmp_path / f"{i}.wav", 0.3 * random.standard_normal(16000), 16000)
    with open(tmp_path / "songs.jsonl", "w", encoding="utf-8") as file:
        for i in range(40):
            song = {"song_id": f"s{i:02d}", "audio_path": f"{recording[i]}.wav", "title": f"t{i}", "artist": artists[i]}
            file.write(json.dumps(song) + "\n")
    config = config_for(tmp_path, tmp_path / "ws", data__songs_per_shard=7, data__split_shares=[0.4, 0.3, 0.3])
    preprocess(config.with_overrides({"data.catalog": str(tmp_path / "songs.jsonl")}))
    songs = read(tmp_path / "ws", "features").drop_columns(["features"]).to_pylist()
    credited = [set(song["artist"].upper().replace(" FEAT. ", "; ").split("; ")) for song in songs]
    for name in set.union(*credited):
        assert len({song["split"] for song, names in zip(songs, credited, strict=True) if name in names}) == 1
    for group in {song["duplicate_group"] for song in songs}:
        assert len({song["split"] for song in songs if song["duplicate_group"] == group}) == 1
    assert {song["split"] for song in songs} == {"train", "validation", "test"}
    assert "change their split: their recording is under another artist too" in capfd.readouterr().out


def test_no_song_at_all(tmp_path: Path, ray_cluster: None) -> None:
    (tmp_path / "songs.csv").write_text("song_id,audio_path,title\na,songs.csv,This is no audio\n")
    with pytest.raises(
        InputError, match=r"no song of .* can be used: 1 rejected \(undecodable 1\), for instance row 0 of"
    ):
        preprocess(config_for(tmp_path, tmp_path / "ws", data__max_rejected_share=1))
    assert not list((tmp_path / "ws").rglob("manifest.json"))


def test_too_many_rejected_log_rows_leave_no_events(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    config = config_for(world, tmp_path, data__interactions=str(world / "log.csv"), data__max_rejected_share=0.03)
    with pytest.raises(InputError, match=r"of 1,800 rows of the log, .*unknown_song"):
        preprocess(config)
    assert sorted(path.parts[-3] for path in tmp_path.rglob("manifest.json")) == ["features", "quarantine"]


def test_plays_and_affinity_logs(world: Path, tmp_path: Path, ray_cluster: None) -> None:
    plays = "user_id,song_id,timestamp,played_ratio\n" + "".join(
        f"u{user},song-{song:03d},2024-01-01T0{user}:{10 + n}:00,0.9\n"
        for user in range(3)
        for n, song in enumerate((10, 11, 12))
    )
    (tmp_path / "plays.csv").write_text(plays)
    (tmp_path / "affinity.jsonl").write_text(
        "".join(f'{{"user_id": {u}, "song_id": "song-0{s}", "weight": {s}}}\n' for u in range(9) for s in (20, 21))
    )
    (tmp_path / "ratings.csv").write_text(
        "user_id,song_id,rating\n"
        + "".join(
            f"r{user},song-0{song},{rating}\n"
            for user in range(4)
            for song, rating in ((30, 5), (31, 4), (32, 1), (33, 3))
        )
    )
    days = [
        {"user_id": f"d{user}", "song_id": f"song-0{song}", "timestamp": "20240101"}
        for user in range(4)
        for song in (40, 41)
    ]
    days += [
        {**day, "timestamp": "20240102", "feedback": "skip"} for day in days
    ]  # the log begins to write feedback late
    (tmp_path / "days.jsonl").write_text("".join(json.dumps(day) + "\n" for day in days))
    logs = [str(tmp_path / name) for name in ("plays.csv", "affinity.jsonl", "ratings.csv", "days.jsonl")]
    one_split = {"data__split_shares": [1, 0, 0], "data__held_out_user_share": 0}
    preprocess(config_for(world, tmp_path / "ws", data__interactions=logs, **one_split))
    pairs = [
        (row["trigger_song_id"], row["song_id"], row["support"]) for row in read(tmp_path / "ws", "pairs").to_pylist()
    ]
    assert pairs == [
        ("song-010", "song-011", 3),
        ("song-011", "song-012", 3),
        ("song-020", "song-021", 9),
        ("song-021", "song-020", 9),
        ("song-030", "song-031", 4),
        ("song-031", "song-030", 4),
    ]
    events = read(tmp_path / "ws", "events").to_pylist()
    assert [event["value"] for event in events if event["user_id"].startswith("d")] == [1.0] * 8 + [-1.0] * 8
    assert {event["value"] for event in events if event["song_id"] == "song-032"} == {-1.0}
    assert read(tmp_path / "ws", "negatives").num_rows == 0


def test_every_odd_file_ends_as_features_or_with_a_reason(shared_data: Path, tmp_path: Path, ray_cluster: None) -> None:
    rows = rows_of(shared_data / "oddaudio.csv")
    keys = {
        "data__catalog": str(shared_data / "oddaudio.csv"),
        "data__columns": {"song_id": "file", "audio_path": "file"},
        "data__text_columns": "what",
        "data__max_rejected_share": 0.5,
        "audio__clip_seconds": 8.0,
    }
    preprocess(config_for(shared_data, tmp_path, **keys))
    features, rejected = read(tmp_path, "features"), read(tmp_path, "quarantine")
    kept = set(features["song_id"].to_pylist())
    reasons = dict(zip(rejected["song_id"].to_pylist(), rejected["reason"].to_pylist(), strict=True))
    assert len(rows) == 78
    assert kept | set(reasons) == {row["file"] for row in rows}
    assert not kept & set(reasons)
    # What libsndfile reads in blocks and has 0.1 s of audio is kept, except files of that collection that hold silence.
    silent = {
        "tinytag__adpcm.wav",
        "tinytag__gsm_6_10.wav",
        "tinytag__vbr48stereo.mp3",
        "tinytag__vbr8.mp3",
        "tinytag__riff_extra_zero.wav",
        "tinytag__test.spx",
        "tinytag__test_flac.oga",
    }
    assert {name for name, reason in reasons.items() if reason == "silent"} - {
        "oddaudio/flac-test-files__01 - wrong max blocksize.flac"
    } == {f"oddaudio/{name}" for name in silent}
    decodable = {
        row["file"]
        for row in rows
        if row["soundfile_decodable"] == "yes" and float(row["frames"]) >= 0.1 * float(row["sample_rate"])
    }
    assert decodable - kept - {f"oddaudio/{name}" for name in silent} <= {
        "oddaudio/flac-test-files__01 - wrong max blocksize.flac"
    }
    assert set(reasons.values()) <= {"undecodable", "too_short", "decoder_missing", "silent"}
    assert all(rejected["detail"].to_pylist())


def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, ray_cluster: None) -> None:
    songs = 240
    random = np.random.default_rng(1)
    rows = ["song_id,audio_path,title\n"]
    for i in range(songs):
        soundfile.write(tmp_path / f"{i}.wav", 0.1 * random.standard_normal(8000), 16000)
        rows.append(f"{i:04d},{i}.wav,Song {i}\n")
    (tmp_path / "3.wav").write_bytes(b"broken")
    (tmp_path / "songs.csv").write_text("".join(rows))
    config = config_for(tmp_path, tmp_path / "ws", data__songs_per_shard=2, ray__num_cpus=1)
    (tmp_path / "config.yaml").write_text(config.as_yaml())
    command = [sys.executable, "-m", "htcl_ray.cli", "preprocess", "--config", str(tmp_path / "config.yaml")]
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards: list[Path] = []
    deadline = time.monotonic() + 120
    while len(shards) < 10 and run.poll() is None and time.monotonic() < deadline:
        shards = list((tmp_path / "ws").glob("features/*/shard-*.parquet"))
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(2)  # what Ray's orphaned workers still finish is finished
    shards = list((tmp_path / "ws").glob("features/*/shard-*.parquet"))
    assert 10 <= len(shards) < songs // 2
    assert not list((tmp_path / "ws").rglob("manifest.json"))

    (shards[0].parent / ".shard-0000099.parquet-half").write_bytes(b"what a killed writer leaves")
    stamps = {path: path.stat().st_mtime_ns for path in shards}
    preprocess(config)
    assert {path: path.stat().st_mtime_ns for path in shards} == stamps
    preprocess(config.with_overrides({"workspace": str(tmp_path / "undisturbed")}))
    for kind in ("features", "quarantine"):
        assert read(tmp_path / "ws", kind).equals(read(tmp_path / "undisturbed", kind))
    assert read(tmp_path / "ws", "features").num_rows == songs - 1
    assert not [path for path in (tmp_path / "ws" / "features").rglob(".*")]


def test_one_configuration_then_another_then_the_first_again(
    world: Path, tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
):
    """Shared case 07. Training reads what its configuration describes, and another spelling of the tables makes nothing
    again."""
    titles, genres = (
        config_for(world, tmp_path / "workspace", data__text_columns=[column]) for column in ("title", "genre")
    )
    assert [preprocess(config).skipped for config in (titles, genres, titles)] == [False, False, True]
    workspace = Workspace(titles.workspace)
    for config, text in ((titles, "Title 0"), (genres, "rock, folk")):
        features = inputs.features(workspace, config)
        assert workspace.read_tables(features.path, ["song_id", "text"]).sort_by("song_id")["text"][0].as_py() == text
    monkeypatch.chdir(world)
    for spelled in ("songs.csv", "./songs.csv", f"file://{world}/songs.csv"):
        assert preprocess(titles.with_overrides({"data.catalog": spelled})).skipped
