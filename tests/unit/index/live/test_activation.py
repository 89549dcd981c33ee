"""Which index counts: the order of activations, whatever the clocks say and however many activate, and refusals that
pass or stay."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
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
from tests.conftest import REPOSITORY
from tests.worlds.live import VERSIONS, write_index
from tests.worlds.object_store import ObjectStore, running_store

pytestmark = pytest.mark.unit


class Clocks:
    """The wall clock of this process, as one that is wrong by some time, and the steady clock, which stands still
    unless told."""

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


class TestOrder:
    @pytest.mark.parametrize("hours", [-24_000, -1, 1, 240_000])
    def test_the_later_activation_counts_whatever_the_clocks_say(
        self, workspace: Workspace, clocks: Clocks, hours: int
    ):
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
    def test_what_a_command_names_counts_until_a_later_activation(
        self, workspace: Workspace, clocks: Clocks, hours: int
    ):
        other = live(workspace, "v1")
        clocks.wrong_by = timedelta(hours=hours)
        other.activate("v2")
        clocks.wrong_by = timedelta()
        named = live(workspace, "v3")
        named.poll()
        assert named.version == "v3"
        restarted = LiveIndex(workspace, ServeSettings(), VERSIONS, named._started)
        assert restarted.version == "v3"
        clocks.wrong_by = timedelta(hours=hours)
        other.activate("v1")
        for replica in (named, restarted):
            replica.poll()
            assert replica.version == "v1"
        assert LiveIndex(workspace, ServeSettings(), VERSIONS, named._started).version == "v1", (
            "a replica that starts later"
        )

    @pytest.mark.parametrize("hours", [-24_000, 240_000])
    def test_an_index_that_was_built_later_is_followed_whatever_the_clocks_say(
        self, tmp_path: Path, clocks: Clocks, hours: int
    ):
        workspace = Workspace(str(tmp_path / "workspace"))
        write_index(workspace, "v1", {"a": 1})
        clocks.wrong_by = timedelta(hours=-hours)
        write_index(workspace, "earlier", {"a": 1})
        live(workspace, "earlier").activate("v1")
        following, named = live(workspace, activate_newest=True), live(workspace, "v1", activate_newest=True)
        for replica in (following, named):
            replica.poll()
            assert replica.version == "v1", "the other was there when v1 was chosen"
        clocks.wrong_by = timedelta(hours=hours)
        for version in ("v2", "v3"):
            write_index(workspace, version, {"a": 1})
            clocks.wrong_by -= timedelta(hours=1)
            for replica in (following, named):
                replica.poll()
                assert replica.version == version

    def test_the_newest_artifact_is_the_one_that_was_finished_last(self, tmp_path: Path):
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

    def test_the_log_of_activations_stays_short(self, workspace: Workspace):
        activations = Activations(workspace)
        for turn in range(KEPT + 5):
            activations.append(f"v{turn}")
        kept = workspace.children(FOLDER)
        assert len(kept) == KEPT
        assert [name[:20] for name in (kept[0], kept[-1])] == ["0" * 19 + "6", "0" * 18 + str(KEPT + 5)]
        assert [pointer.version for pointer in activations.latest_first()] == [
            f"v{turn}" for turn in range(KEPT + 4, 4, -1)
        ]


APPEND = """
import json, sys
from htcl_ray.index.live.activation import Activations
from htcl_ray.workspace.storage import Workspace
activations = Activations(Workspace(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(5):
    before = max((pointer.order for pointer in activations.latest_first()), default="")
    print(json.dumps([before, activations.append(f"{sys.argv[2]}-{turn}").order]), flush=True)
"""


def check_order(workspace: Workspace, activated: list[list[tuple[str, str]]]) -> None:
    """None is lost, and each comes after all that its writer had seen."""
    orders = [order for steps in activated for _, order in steps]
    assert len(set(orders)) == len(orders) == 20
    assert sorted(orders) == workspace.children(FOLDER)
    for steps in activated:
        assert all(before < order for before, order in steps)
        assert [order for _, order in steps] == sorted(order for _, order in steps)
    found = list(Activations(workspace).latest_first())
    assert [pointer.order for pointer in found] == sorted(orders, reverse=True)


class TestAtTheSameTime:
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

    def test_processes(self, uri: str):
        command = [sys.executable, "-c", APPEND, uri]
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
        running = [subprocess.Popen([*command, str(number)], **options) for number in range(4)]
        for process in running:
            assert process.stdout.readline() == "ready\n"
        for process in running:
            process.stdin.write("go\n")
            process.stdin.flush()
        said = [process.communicate(timeout=120)[0].splitlines() for process in running]
        check_order(Workspace(uri), [[tuple(json.loads(line)) for line in lines] for lines in said])

    def test_two_that_have_seen_the_same(self, store: ObjectStore):
        """Both write the same number; the store has both, and one counts, for everyone."""
        one, other = (Activations(Workspace("s3://bucket/workspace")) for _ in range(2))
        between = []

        def meanwhile(key: str) -> None:
            if key.endswith(".json") and not between:
                between.append(key)
                between.append(other.append("other").order)

        store.before_write = meanwhile
        mine = one.append("one").order
        assert mine[:20] == between[1][:20]
        assert len({mine, between[1]}) == 2
        latest = [next(Activations(Workspace("s3://bucket/workspace")).latest_first()) for _ in range(2)]
        assert latest[0] == latest[1]
        assert latest[0].order == max(mine, between[1])

    def test_replicas_that_activate_different_indexes_come_to_agree(self, workspace: Workspace):
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

    def test_a_replica_that_dies_between_writing_and_switching(
        self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
    ):
        one, other = live(workspace, "v1"), live(workspace, "v1")
        with monkeypatch.context() as killed:
            killed.setattr(LiveIndex, "_switch", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one.activate("v2")
        assert one.version == "v1"
        for replica in (one, other):
            replica.poll()
        assert [replica.version for replica in (one, other, live(workspace))] == ["v2"] * 3

    def test_one_that_dies_before_writing_changed_nothing(self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
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
    """A reason to refuse an index that passes; `mend` ends it."""
    folder = Path(workspace.full(f"index/{version}"))
    if kind == "models not there":
        Path(workspace.full("models")).rename(workspace.full("away"))
    elif kind == "half-copied":
        (folder / "index.faiss").rename(folder / ".index.faiss")
        (folder / "index.faiss").write_bytes(b"half")
    elif kind == "manifest not there":
        (folder / "manifest.json").rename(folder / ".manifest.json")
    elif kind == "half a manifest":
        (folder / "manifest.json").rename(folder / ".manifest.json")
        (folder / "manifest.json").write_text("{")
    else:
        error = {"storage": OSError(5, "the disk is away"), "memory": MemoryError("no memory")}[kind]

        def failing(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(live_index, "load_accepted", failing)


def mend(workspace: Workspace, version: str, monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    folder = Path(workspace.full(f"index/{version}"))
    for hidden in folder.glob(".[im]*"):
        hidden.rename(hidden.with_name(hidden.name[1:]))
    if Path(workspace.full("away")).exists():
        Path(workspace.full("away")).rename(workspace.full("models"))
    monkeypatch.setattr(live_index, "load_accepted", load)


PASSING = ["models not there", "half-copied", "manifest not there", "half a manifest", "storage", "memory"]


class TestRefusals:
    @pytest.mark.parametrize("kind", PASSING)
    def test_one_that_passes(self, kind: str, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch):
        load = live_index.load_accepted
        replica = live(workspace, "v1")
        Activations(workspace).append("v2")
        damage(workspace, "v2", kind, monkeypatch)
        replica.poll()
        assert replica.version == "v1"
        mend(workspace, "v2", monkeypatch, load)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v2"

    def test_one_of_an_index_that_is_half_copied_to_object_storage(self, store: ObjectStore, clocks: Clocks):
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

    def test_one_that_stays_is_tried_less_and_less_often_and_reported_once(
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
        assert len(tries) == 1, "activated again: tried again at once"

    def test_the_activation_before_one_that_is_refused_counts(
        self, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        replica = live(workspace, "v1")
        replica.activate("v3")
        Activations(workspace).append("v2")
        damage(workspace, "v2", "half-copied", monkeypatch)
        replica.poll()
        assert (replica.version, live(workspace).version) == ("v3", "v3")

    def test_an_application_that_starts_while_the_active_index_is_refused_follows_later(
        self, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        Activations(workspace).append("v1")
        damage(workspace, "v1", "half a manifest", monkeypatch)
        replica = LiveIndex(workspace, ServeSettings(), VERSIONS)
        assert replica.version == "v3", "the newest"
        mend(workspace, "v1", monkeypatch, live_index.load_accepted)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v1"

    @pytest.mark.parametrize("kind", ["half a manifest", "half-copied"])
    def test_the_newest_index_that_was_half_copied_is_followed_when_it_is_whole(
        self, kind: str, workspace: Workspace, clocks: Clocks, monkeypatch: pytest.MonkeyPatch
    ):
        replica = live(workspace, "v1", activate_newest=True)
        write_index(workspace, "v4", {"a": 1})
        damage(workspace, "v4", kind, monkeypatch)
        replica.poll()
        assert replica.version == "v1"
        mend(workspace, "v4", monkeypatch, live_index.load_accepted)
        clocks.steady += 2.1
        replica.poll()
        assert replica.version == "v4"

    def test_an_activation_that_cannot_be_read(self, workspace: Workspace, caplog: pytest.LogCaptureFixture):
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

    def test_a_version_that_is_none_is_not_written(self, workspace: Workspace):
        with pytest.raises(IndexRefusedError, match="no index version"):
            Activations(workspace).append("../v1")
        assert workspace.children(FOLDER) == []
