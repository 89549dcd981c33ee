"""Precedence of activations, with wrong clocks and concurrent writers, and transient and permanent rejections."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import IndexRefusedError
from htcl_ray.index.live import live_index
from htcl_ray.index.live.activation import FOLDER, KEPT, Activations, starting_pointer
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, write_index
from tests.worlds.object_store import ObjectStore, running_store

pytestmark = pytest.mark.unit


class Clocks:
    """Wall clock of this process with a settable error, and a monotonic clock that only the test advances."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wrong_by = timedelta()
        self.steady = 1000.0
        clocks = self

        class Wrong(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
                return datetime.now(UTC) + clocks.wrong_by

        monkeypatch.setattr("htcl_ray.workspace.manifest.datetime", Wrong)
        monkeypatch.setattr("htcl_ray.index.live.activation.datetime", Wrong)
        monkeypatch.setattr(time, "monotonic", lambda: clocks.steady)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> Clocks:
    return Clocks(monkeypatch)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ObjectStore]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with running_store(monkeypatch) as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "workspace")
    request.getfixturevalue("store")
    return "s3://bucket/workspace"


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "workspace"))
    for version in ("v1", "v2", "v3"):
        write_index(made, version, {"a": 1, "b": 2})
    return made


def live(workspace: Workspace, version: str | None = None, **settings: object) -> LiveIndex:
    return LiveIndex(workspace, ServeSettings(**settings), VERSIONS, starting_pointer(workspace, version))


class TestPrecedence:
    @pytest.mark.parametrize("hours", [-24_000, -1, 1, 240_000])
    def test_later_activation_wins_despite_wrong_clocks(self, workspace: Workspace, clocks: Clocks, hours: int):
        one, other = live(workspace, "v1"), live(workspace, "v1")
        one.activate("v2")
        clocks.wrong_by = timedelta(hours=hours)
        other.activate("v3")
        for replica in (one, other):
            replica.poll()
        assert [replica.version for replica in (one, other, live(workspace))] == ["v3"] * 3
        clocks.wrong_by = timedelta()
        one.activate("v2")
        for replica in (one, other):
            replica.poll()
        assert [replica.version for replica in (one, other, live(workspace))] == ["v2"] * 3

    @pytest.mark.parametrize("hours", [-24_000, 240_000])
    def test_started_index_is_served_until_a_later_activation(self, workspace: Workspace, clocks: Clocks, hours: int):
        other = live(workspace, "v1")
        clocks.wrong_by = timedelta(hours=hours)
        other.activate("v2")
        clocks.wrong_by = timedelta()
        started = starting_pointer(workspace, "v3")
        named = LiveIndex(workspace, ServeSettings(), VERSIONS, started)
        named.poll()
        assert named.version == "v3"
        restarted = LiveIndex(workspace, ServeSettings(), VERSIONS, started)
        assert restarted.version == "v3"
        clocks.wrong_by = timedelta(hours=hours)
        other.activate("v1")
        for replica in (named, restarted):
            replica.poll()
            assert replica.version == "v1"
        assert LiveIndex(workspace, ServeSettings(), VERSIONS, started).version == "v1", "a replica that starts later"

    @pytest.mark.parametrize("hours", [-24_000, 240_000])
    def test_newer_index_is_followed_despite_wrong_clocks(self, tmp_path: Path, clocks: Clocks, hours: int):
        workspace = Workspace(str(tmp_path / "workspace"))
        write_index(workspace, "v1", {"a": 1})
        clocks.wrong_by = timedelta(hours=-hours)
        write_index(workspace, "earlier", {"a": 1})
        live(workspace, "earlier").activate("v1")
        following, named = live(workspace, activate_newest=True), live(workspace, "v1", activate_newest=True)
        for replica in (following, named):
            replica.poll()
            assert replica.version == "v1", "the other index existed when v1 was activated"
        clocks.wrong_by = timedelta(hours=hours)
        for version in ("v2", "v3"):
            write_index(workspace, version, {"a": 1})
            clocks.wrong_by -= timedelta(hours=1)
            for replica in (following, named):
                replica.poll()
                assert replica.version == version

    def test_newest_artifact_is_the_last_finished(self, tmp_path: Path):
        workspace = Workspace(str(tmp_path))
        made = build_manifest("thing", config={}, inputs={})
        workspace.write_json("things/odd/manifest.json", [1])
        for name, created in (
            ("c", "2100-01-01T00:00:00.000000+00:00"),
            ("a", made["created"]),
            ("b", made["created"]),
        ):
            workspace.finish(f"things/{name}", {**made, "created": created})
        workspace.fs.delete_dir(workspace.full("things/odd"))
        assert [name for name, _ in workspace.finished("things")] == ["c", "a", "b"]
        judged = {**(workspace.manifest("things/c") or {}), "gate": {"passed": True}}
        workspace.finish("things/c", judged)
        assert workspace.manifest("things/c") == judged, "a manifest that is written again keeps its time"

    def test_old_activations_are_deleted(self, workspace: Workspace):
        activations = Activations(workspace)
        for turn in range(KEPT + 5):
            activations.append(f"v{turn}")
        kept = workspace.children(FOLDER)
        assert len(kept) == KEPT
        assert [name[:20] for name in (kept[0], kept[-1])] == ["0" * 19 + "6", "0" * 18 + str(KEPT + 5)]
        assert [pointer.version for pointer in activations.latest_first()] == [
            f"v{turn}" for turn in range(KEPT + 4, 4, -1)
        ]


def check_order(workspace: Workspace, activated: list[list[tuple[str, str]]]) -> None:
    """No activation is lost, and each sorts after all that its writer had read."""
    orders = [order for steps in activated for _, order in steps]
    assert len(set(orders)) == len(orders) == 5 * len(activated)
    assert sorted(orders) == workspace.children(FOLDER)
    for steps in activated:
        assert all(before < order for before, order in steps)
        assert [order for _, order in steps] == sorted(order for _, order in steps)
    pointers = list(Activations(workspace).latest_first())
    assert [pointer.order for pointer in pointers] == sorted(orders, reverse=True)


class TestConcurrency:
    def test_threads(self, uri: str):
        start = threading.Barrier(4)
        activated: list[list[tuple[str, str]]] = [[] for _ in range(4)]

        def work(number: int) -> None:
            activations = Activations(Workspace(uri))
            start.wait()
            for turn in range(5):
                before = max((pointer.order for pointer in activations.latest_first()), default="")
                activated[number].append((before, activations.append(f"{number}-{turn}").order))

        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        check_order(Workspace(uri), activated)

    def test_concurrent_activations_with_the_same_number_are_both_kept(self, store: ObjectStore):
        """Both writers use the same number; the store keeps both, and all readers select the same one."""
        one, other = (Activations(Workspace("s3://bucket/workspace")) for _ in range(2))
        between = []

        def meanwhile(key: str) -> None:
            if key.endswith(".json") and not between:
                between.append(key)
                between.append(other.append("other").order)

        store.before_write = meanwhile
        own = one.append("one").order
        assert own[:20] == between[1][:20]
        assert len({own, between[1]}) == 2
        latest = [next(Activations(Workspace("s3://bucket/workspace")).latest_first()) for _ in range(2)]
        assert latest[0] == latest[1]
        assert latest[0].order == max(own, between[1])

    def test_replicas_agree_after_concurrent_activations(self, workspace: Workspace):
        replicas = [live(workspace, "v1") for _ in range(3)]
        threads = [
            threading.Thread(target=replica.activate, args=(version,))
            for replica, version in zip(replicas, ("v1", "v2", "v3"), strict=True)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(workspace.children(FOLDER)) == 3
        for replica in replicas:
            replica.poll()
        expected = next(Activations(workspace).latest_first()).version
        assert {replica.version for replica in (*replicas, live(workspace))} == {expected}

    def test_crash_between_activation_and_switch(self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
        one, other = live(workspace, "v1"), live(workspace, "v1")
        with monkeypatch.context() as killed:
            killed.setattr(LiveIndex, "_switch", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one.activate("v2")
        assert one.version == "v1"
        for replica in (one, other):
            replica.poll()
        assert [replica.version for replica in (one, other, live(workspace))] == ["v2"] * 3

    def test_crash_before_the_activation_changes_nothing(self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
        one, other = live(workspace, "v1"), live(workspace, "v1")
        with monkeypatch.context() as killed:
            killed.setattr("htcl_ray.workspace.local_copies.os.replace", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one.activate("v2")
        for replica in (one, other):
            replica.poll()
        assert [replica.version for replica in (one, other)] == ["v1"] * 2
        assert workspace.children(FOLDER) == []


def damage(workspace: Workspace, version: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damage an index in a way that `repair` reverts."""
    folder = Path(workspace.full(f"index/{version}"))
    if kind == "missing models":
        Path(workspace.full("models")).rename(workspace.full("away"))
    elif kind == "half-copied":
        (folder / "index.faiss").rename(folder / ".index.faiss")
        (folder / "index.faiss").write_bytes(b"half")
    elif kind == "missing manifest":
        (folder / "manifest.json").rename(folder / ".manifest.json")
    elif kind == "half a manifest":
        (folder / "manifest.json").rename(folder / ".manifest.json")
        (folder / "manifest.json").write_text("{")
    else:
        error = {"storage": OSError(5, "the disk is gone"), "memory": MemoryError("no memory")}[kind]

        def failing(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(live_index, "load_accepted", failing)


def repair(workspace: Workspace, version: str, monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    folder = Path(workspace.full(f"index/{version}"))
    for hidden in folder.glob(".[im]*"):
        hidden.rename(hidden.with_name(hidden.name[1:]))
    if Path(workspace.full("away")).exists():
        Path(workspace.full("away")).rename(workspace.full("models"))
    monkeypatch.setattr(live_index, "load_accepted", load)


TRANSIENT = ["missing models", "half-copied", "missing manifest", "half a manifest", "storage", "memory"]


class TestRejections:
    @pytest.mark.parametrize("kind", TRANSIENT)
    def test_transient_rejection_is_retried(
        self, kind: str, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        load = live_index.load_accepted
        replica = live(workspace, "v1")
        Activations(workspace).append("v2")
        damage(workspace, "v2", kind, monkeypatch)
        replica.poll()
        assert replica.version == "v1"
        repair(workspace, "v2", monkeypatch, load)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v2"

    def test_half_copied_index_on_object_storage_is_retried(self, store: ObjectStore, clocks: Clocks):
        workspace = Workspace("s3://bucket/workspace")
        for version in ("v1", "v2"):
            write_index(workspace, version, {"a": 1, "b": 2})
        replica = live(workspace, "v1")
        Activations(workspace).append("v2")
        whole = store.objects["workspace/index/v2/index.faiss"]
        store.objects["workspace/index/v2/index.faiss"] = whole[:-3]
        replica.poll()
        assert replica.version == "v1"
        store.objects["workspace/index/v2/index.faiss"] = whole
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v2"

    def test_permanent_rejection_backs_off_and_is_logged_once(
        self, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ):
        replica = live(workspace, "v1")
        Activations(workspace).append("v2")
        damage(workspace, "v2", "half-copied", monkeypatch)
        load, tries = live_index.load_accepted, []

        def counted(workspace: Workspace, version: str, *given: object, **options: object) -> object:
            tries.append(clocks.steady - 1000)
            return load(workspace, version, *given, **options)

        monkeypatch.setattr(live_index, "load_accepted", counted)
        with caplog.at_level(logging.WARNING):
            for _ in range(1500):
                replica.poll()
                clocks.steady += 1
        assert tries == [0, 2, 6, 14, 30, 62, 126, 254, 510, 810, 1110, 1410]
        assert len([record for record in caplog.records if "v2" in record.message]) == 1
        tries.clear()
        Activations(workspace).append("v2")
        replica.poll()
        assert len(tries) == 1, "activated again: retried immediately"

    def test_previous_activation_is_served_while_one_is_rejected(
        self, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        replica = live(workspace, "v1")
        replica.activate("v3")
        Activations(workspace).append("v2")
        damage(workspace, "v2", "half-copied", monkeypatch)
        replica.poll()
        assert (replica.version, live(workspace).version) == ("v3", "v3")

    def test_restart_during_a_rejection_switches_later(
        self, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        Activations(workspace).append("v1")
        damage(workspace, "v1", "half a manifest", monkeypatch)
        replica = LiveIndex(workspace, ServeSettings(), VERSIONS)
        assert replica.version == "v3", "the newest"
        repair(workspace, "v1", monkeypatch, live_index.load_accepted)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v1"

    @pytest.mark.parametrize("kind", ["half a manifest", "half-copied"])
    def test_half_copied_newest_index_is_followed_when_complete(
        self, kind: str, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        replica = live(workspace, "v1", activate_newest=True)
        write_index(workspace, "v4", {"a": 1})
        damage(workspace, "v4", kind, monkeypatch)
        replica.poll()
        assert replica.version == "v1"
        repair(workspace, "v4", monkeypatch, live_index.load_accepted)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v4"

    def test_unreadable_activations_are_skipped(self, workspace: Workspace, caplog: pytest.LogCaptureFixture):
        replica = live(workspace, "v1")
        replica.activate("v2")
        files = {
            "00000000000000000009-0123abcd.json": "{",
            "00000000000000000008-0123abcd.json": '{"version": "v3"}',
            "notes.txt": "hello",
        }
        for name, content in files.items():
            Path(workspace.full(f"{FOLDER}/{name}")).write_text(content)
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                replica.poll()
        assert replica.version == "v2"
        assert len(caplog.records) == 3
        assert live(workspace).version == "v2"
        replica.activate("v3")
        assert live(workspace).version == "v3"

    def test_invalid_version_is_not_written(self, workspace: Workspace):
        with pytest.raises(IndexRefusedError, match="no index version"):
            Activations(workspace).append("../v1")
        assert workspace.children(FOLDER) == []
