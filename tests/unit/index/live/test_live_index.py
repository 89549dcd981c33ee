"""The served index of a replica: the update log, switches, and agreement with other replicas."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import IndexNotFoundError, IndexRefusedError, SongNotFoundError
from htcl_ray.index.live import live_index
from htcl_ray.index.live.activation import FOLDER as ACTIVATIONS
from htcl_ray.index.live.activation import Activations, starting_pointer
from htcl_ray.index.live.live_index import LiveIndex, SwitchInProgress
from htcl_ray.index.live.update_log import FOLDER, Update, UpdateLog
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, content_of, contents, unit_vectors, write_index

pytestmark = pytest.mark.unit


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "workspace"))
    write_index(made, "v1", {"a": 1, "b": 2, "c": 3}, titles={"a": "Aria"})
    return made


def activate(workspace: Workspace, version: str) -> None:
    """Activate an index as a replica of another machine."""
    Activations(workspace).append(version)


def live(workspace: Workspace, version: str | None = None, **settings: object) -> LiveIndex:
    started = None if version is None else starting_pointer(workspace, version)
    return LiveIndex(workspace, ServeSettings(**settings), VERSIONS, started)


def test_replica_sees_an_update_after_its_poll(workspace: Workspace):
    one, other = live(workspace), live(workspace)
    one.upsert("new", unit_vectors(9), {"title": "New"})
    one.remove("b")
    assert contents(one.service.index) == contents_of({"a": (1, "Aria"), "c": (3, None), "new": (9, "New")})
    assert "b" in other.service.index
    other.poll()
    assert contents(other.service.index) == contents(one.service.index)
    assert contents(live(workspace).service.index) == contents(one.service.index)


def test_upsert_replaces_vectors_and_keeps_absent_metadata(workspace: Workspace):
    one = live(workspace)
    one.upsert("a", unit_vectors(10), {"album": "Debut"})
    assert contents(one.service.index)["a"] == content_of(10, "Aria")
    one.describe("a", {"title": "Ballad"})
    assert contents(one.service.index)["a"] == content_of(10, "Ballad")
    assert one.service.index.metadata_of("a")["album"] == "Debut"


def test_estimates_end_where_metadata_is_stated_or_the_audio_replaced(workspace: Workspace):
    one = live(workspace)
    columns = ("genre", "mood", "tags", "estimated")

    def stored() -> tuple:
        about = one.service.index.metadata_of("a")
        return tuple(about[name] for name in columns)

    one.describe("a", {"genre": ["jazz"], "mood": ["sad"], "tags": ["live"], "estimated": ["genre", "mood"]})
    assert stored() == (["jazz"], ["sad"], ["live"], ["genre", "mood"])
    one.describe("a", {"title": "A", "genre": ["blues"]})
    assert stored() == (["blues"], ["sad"], ["live"], ["mood"])
    one.upsert("a", unit_vectors(7), {"duplicate_group": None})
    assert stored() == (["blues"], None, ["live"], None)


def test_unknown_songs_are_rejected_after_catching_up(workspace: Workspace):
    one, other = live(workspace), live(workspace)
    with pytest.raises(SongNotFoundError):
        one.remove("missing")
    with pytest.raises(SongNotFoundError):
        one.describe("missing", {"title": "x"})
    other.upsert("late", unit_vectors(4), {})
    one.remove("late")
    assert "late" not in one.service.index


def test_sequential_writes_keep_their_order_despite_a_slow_clock(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    fast, slow = live(workspace), live(workspace)
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000_000_000_000_000)
    fast.upsert("x", unit_vectors(5), {})
    monkeypatch.setattr(time, "time_ns", lambda: 1_000_000_000_000_000_000)
    slow.upsert("x", unit_vectors(6), {})
    fast.poll()
    for replica in (fast, slow, live(workspace)):
        assert contents(replica.service.index)["x"] == content_of(6, None)
    slow.remove("x")
    fast.poll()
    assert "x" not in fast.service.index


def test_upserts_of_other_models_are_skipped_and_removals_apply(workspace: Workspace):
    log = UpdateLog(workspace)
    log.append(Update("foreign", unit_vectors(1), {"semantic": "others", "preference": "weights-p"}, {}))
    log.append(Update("half", unit_vectors(1), {"semantic": "weights-s", "preference": None}, {}))
    log.append(Update("a", None, {}, {}))
    one = live(workspace)
    assert set(contents(one.service.index)) == {"b", "c"}
    assert (one.active.replay.skipped, one.active.replay.applied) == (2, 1)


def test_damaged_and_foreign_files_are_logged_once_and_the_rest_is_applied(
    workspace: Workspace, caplog: pytest.LogCaptureFixture
):
    one = live(workspace)
    name, _ = UpdateLog(workspace).append(Update("cut", unit_vectors(7), VERSIONS, {}))
    path = Path(workspace.full(f"{FOLDER}/{name}"))
    path.write_bytes(path.read_bytes()[:-100])
    Path(workspace.full(f"{FOLDER}/notes.txt")).write_text("hello")
    UpdateLog(workspace).append(Update("whole", unit_vectors(8), VERSIONS, {}))
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            one.poll()
    assert "whole" in one.service.index
    assert "cut" not in one.service.index
    assert set(one.broken) == {name, "notes.txt"}
    assert len(caplog.records) == 2


def test_half_copied_log_file_is_applied_when_complete(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    """It is read with exponential backoff meanwhile."""
    clock, reads = [1000.0], []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    one, read = live(workspace), Workspace.read_bytes
    name, _ = UpdateLog(workspace).append(Update("late", unit_vectors(7), VERSIONS, {}))
    path = Path(workspace.full(f"{FOLDER}/{name}"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])

    def counted(self: Workspace, path: str) -> bytes:
        reads.extend([clock[0] - 1000] if name in path else [])
        return read(self, path)

    monkeypatch.setattr(Workspace, "read_bytes", counted)
    for _ in range(100):
        one.poll()
        clock[0] += 1
    assert reads == [0, 2, 6, 14, 30, 62]
    assert set(one.broken) == {name}
    path.write_bytes(whole)
    clock[0] += 30
    for _ in range(3):
        one.poll()
    assert contents(one.service.index)["late"] == content_of(7, None)
    assert (one.broken, len(reads), one.active.replay.applied) == ({}, 7, 1)


def test_activation_applies_the_log_and_reaches_other_replicas(workspace: Workspace):
    one, other = live(workspace), live(workspace)
    one.upsert("new", unit_vectors(9), {})
    one.remove("c")
    write_index(workspace, "v2", {"b": 20, "c": 30, "d": 40})
    one.activate("v2")
    expected = contents_of({"b": (20, None), "d": (40, None), "new": (9, None)})
    assert one.version == "v2"
    assert contents(one.service.index) == expected
    other.poll()
    assert other.version == "v2"
    assert contents(other.service.index) == expected
    restarted = live(workspace)
    assert restarted.version == "v2"


@pytest.mark.parametrize("version", ["..", ".", "a/b", "../v1", "", "x" * 65, "v1\n", "ü"])
def test_version_is_never_a_path(workspace: Workspace, version: str):
    one = live(workspace)
    with pytest.raises(IndexRefusedError, match="no index version"):
        one.activate(version)
    assert one.version == "v1"


def refused_indexes(workspace: Workspace) -> dict[str, str]:
    """Versions of indexes that must not be served, each with a part of the error message."""
    write_index(workspace, "others", {"a": 1}, model_versions={"semantic": "others", "preference": "weights-p"})
    for version in ("cut", "unfinished", "failed", "damaged", "odd"):
        write_index(workspace, version, {"a": 1, "b": 2})
    folder = Path(workspace.full("index"))
    vectors = max((folder / "cut").iterdir(), key=lambda file: (file.suffix != ".json", file.stat().st_size))
    vectors.write_bytes(vectors.read_bytes()[:-3])
    (folder / "unfinished" / "manifest.json").unlink()
    (folder / "damaged" / "manifest.json").write_text("{")
    manifest = json.loads((folder / "odd" / "manifest.json").read_text())
    (folder / "odd" / "manifest.json").write_text(
        json.dumps({key: manifest[key] for key in ("format_version", "kind", "created")})
    )
    gate = {"passed": False, "report": "r"}
    evidence = {
        "bounds": [{"measure": "recall", "value": 0.1}],
        "files": {},
    }
    (folder / "failed" / "gate.json").write_text(json.dumps(evidence))
    manifest = json.loads((folder / "failed" / "manifest.json").read_text())
    (folder / "failed" / "manifest.json").write_text(json.dumps({**manifest, "gate": gate}))
    return {
        "others": "others",
        "cut": "SHA-256",
        "failed": "gate",
        "damaged": "not JSON",
        "odd": "odd",
        "unfinished": "no finished index",
        "missing": "no finished index",
    }


def test_invalid_index_is_rejected_and_the_old_one_stays(workspace: Workspace, caplog: pytest.LogCaptureFixture):
    one, other = live(workspace), live(workspace)
    before = contents(one.service.index)
    for version, message in refused_indexes(workspace).items():
        expected = IndexNotFoundError if "no finished" in message else IndexRefusedError
        with pytest.raises(expected, match=message):
            one.activate(version)
        assert (one.version, contents(one.service.index)) == ("v1", before)
        assert workspace.children(ACTIVATIONS) == []
        caplog.clear()
        activate(workspace, version)
        for _ in range(3):
            other.poll()
        assert len(caplog.records) == 1, version
        assert other.version == "v1"
        assert live(workspace).version == "v1"
        workspace.remove(ACTIVATIONS)


def test_starting_pointer_precedence(workspace: Workspace):
    write_index(workspace, "v2", {"a": 1})
    assert starting_pointer(workspace, None).version == "v2", "the newest"
    activate(workspace, "v1")
    assert starting_pointer(workspace, None).version == "v1", "the last activation"
    assert starting_pointer(workspace, "v2").version == "v2", "the version of the command"
    activate(workspace, "gone")
    assert starting_pointer(workspace, None).version == "v1", "an activation of a missing index is skipped"
    newest = workspace.children(ACTIVATIONS)[-1]
    Path(workspace.full(f"{ACTIVATIONS}/{newest}")).write_text("{")
    assert starting_pointer(workspace, None).version == "v1"


def test_named_index_is_served_until_a_later_activation(workspace: Workspace):
    write_index(workspace, "v2", {"a": 1})
    activate(workspace, "v1")
    named = live(workspace, "v2")
    named.poll()
    assert named.version == "v2"
    live(workspace).activate("v1")
    named.poll()
    assert named.version == "v1"


def test_newer_index_is_followed_only_with_activate_newest(workspace: Workspace):
    still, following = live(workspace, "v1"), live(workspace, "v1", activate_newest=True)
    write_index(workspace, "others", {"a": 1}, model_versions={"semantic": "others", "preference": "weights-p"})
    write_index(workspace, "v2", {"a": 1, "z": 2})
    for replica in (still, following):
        replica.poll()
    assert (still.version, following.version) == ("v1", "v2")


def test_only_one_switch_at_a_time(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    write_index(workspace, "v2", {"a": 1})
    one = live(workspace)
    load, second = live_index.load_accepted, []

    def while_loading(workspace: Workspace, version: str, *args: object, **options: object) -> object:
        with pytest.raises(SwitchInProgress):
            one.activate("v2")
        second.append(version)
        return load(workspace, version, *args, **options)

    monkeypatch.setattr(live_index, "load_accepted", while_loading)
    one.activate("v2")
    assert (one.version, len(second)) == ("v2", 1)


def test_searches_during_updates_and_switches_read_one_state(workspace: Workspace):
    """Each result is of one state, while a song is upserted and removed and the index is switched."""
    write_index(workspace, "v2", {"a": 1, "b": 2, "c": 3})
    one = live(workspace)
    stop, problems = threading.Event(), []

    def search() -> None:
        while not stop.is_set():
            active = one.active
            results = active.service.search_songs(["a"], k=10)
            ids = [hit.song_id for hit in results.hits]
            if (
                len(ids) != len(set(ids))
                or not {"b", "c"} <= set(ids)
                or [song["song_id"] for song in results.metadata] != ids
            ):
                problems.append(ids)

    threads = [threading.Thread(target=search) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for turn in range(12):
            one.upsert("x", unit_vectors(turn), {"title": str(turn)})
            one.activate("v1" if turn % 2 else "v2")
            one.remove("x")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not problems
    assert set(contents(one.service.index)) == {"a", "b", "c"}


def test_polling_survives_failing_storage(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    one, other = live(workspace), live(workspace, poll_seconds=0.01)
    polls, files, callbacks = [], UpdateLog.files, []

    def failing(log: UpdateLog) -> list[str]:
        polls.append(1)
        if len(polls) < 3:
            raise OSError("the disk is gone")
        return files(log)

    one.upsert("x", unit_vectors(5), {})
    monkeypatch.setattr(UpdateLog, "files", failing)
    other.start(lambda: callbacks.append(1))
    try:
        deadline = time.monotonic() + 20
        while "x" not in other.service.index:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        other.stop()
    assert other.failed_polls == 2
    assert len(callbacks) >= 2


def contents_of(songs: dict[str, tuple[int, str | None]]) -> dict[str, tuple[bytes, str | None]]:
    return {song: content_of(seed, title) for song, (seed, title) in songs.items()}
