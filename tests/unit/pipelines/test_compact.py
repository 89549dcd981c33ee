"""Compaction: an index and its update log become a new index version."""

from __future__ import annotations

from pathlib import Path

import pytest

from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.activation import starting_pointer
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.live.update_log import FOLDER
from htcl_ray.pipelines import compact as compacting
from htcl_ray.pipelines.compact import compact
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, content_of, contents, unit_vectors, write_index
from tests.worlds.small_workspace import small_config

pytestmark = pytest.mark.unit


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "workspace"))
    write_index(made, "v1", {"a": 1, "b": 2, "c": 3})
    return made


def live(workspace: Workspace, version: str | None = None) -> LiveIndex:
    return LiveIndex(workspace, ServeSettings(), VERSIONS, starting_pointer(workspace, version) if version else None)


def test_a_compacted_index_equals_the_served_one_and_the_log_is_one_file(workspace: Workspace):
    one = live(workspace)
    for seed in range(10, 15):
        one.upsert(f"new-{seed}", unit_vectors(seed), {"title": str(seed)})
    one.upsert("a", unit_vectors(20), {})
    one.remove("b")
    one.remove("new-12")
    served = contents(one.service.index)
    result = compact(small_config(workspace.root))
    version = result.location.rpartition("/")[2]
    assert len(workspace.children(FOLDER)) == 1
    manifest = workspace.manifest(f"index/{version}")
    assert manifest["inputs"] == {
        "semantic": "model-semantic",
        "preference": "model-preference",
        "compacted_from": "v1",
        "updates_through": one.active.replay.last,
    }
    assert manifest["songs"] == len(served)
    assert 0 < manifest["quality"]["recall_at_10"] <= 1
    for start in (live(workspace, version), live(workspace, "v1")):
        assert contents(start.service.index) == served
    one.activate(version)
    assert contents(one.service.index) == served
    assert set(one.service.index.song_map["song_id"].to_pylist()) == set(served), "the map is computed again"
    assert not one.active.replay.changed, "a compacted index needs nothing of the log"


def test_a_removed_song_stays_out_of_an_index_built_later(workspace: Workspace):
    one = live(workspace)
    one.remove("a")
    compact(small_config(workspace.root))
    write_index(workspace, "rebuilt", {"a": 1, "b": 2, "c": 3})
    one.activate("rebuilt")
    assert set(contents(one.service.index)) == {"b", "c"}


def test_compacting_again_changes_nothing(workspace: Workspace):
    live(workspace).upsert("new", unit_vectors(9), {})
    first = compact(small_config(workspace.root))
    log, indexes = workspace.children(FOLDER), workspace.children("index")
    again = compact(small_config(workspace.root), "v1")
    assert (first.skipped, again.skipped, again.location) == (False, True, first.location)
    assert (workspace.children(FOLDER), workspace.children("index")) == (log, indexes)


def test_a_compaction_that_is_killed_loses_no_update(workspace: Workspace, monkeypatch: pytest.MonkeyPatch):
    one = live(workspace)
    for seed in range(10, 14):
        one.upsert(f"new-{seed}", unit_vectors(seed), {})
    one.remove("new-11")
    served = contents(one.service.index)
    deletions = 0

    class Killed(BaseException):
        pass

    def killed_at_second(path: str) -> None:
        nonlocal deletions
        deletions += 1
        if deletions == 2:
            raise Killed
        Path(path).unlink()

    class Storage:
        """The file system, until the second deletion."""

        def __init__(self, inner: object) -> None:
            self._inner = inner
            self.delete_file = killed_at_second

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    log = compacting.UpdateLog(Workspace(workspace.uri))
    log.workspace.fs = Storage(log.workspace.fs)
    log.workspace.__class__ = type("Local", (Workspace,), {"is_local": True})
    with pytest.raises(Killed):
        log.merge()
    assert len(workspace.children(FOLDER)) == 5
    one.poll()
    for replica in (one, live(workspace)):
        assert contents(replica.service.index) == served
    compact(small_config(workspace.root))
    assert len(workspace.children(FOLDER)) == 1
    assert contents(live(workspace, "v1").service.index) == served
    assert contents(live(workspace).service.index)["new-10"] == content_of(10, None)
