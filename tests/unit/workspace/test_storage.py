"""Workspace: atomic writes, finished and unfinished artifacts, object-storage rules."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pytest

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.filesystem import list_folder
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit


def manifest(**inputs: str) -> dict:
    return build_manifest("thing", config={}, inputs=inputs)


def test_fingerprint_depends_on_content_not_on_key_order():
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
    assert fingerprint("a", "b") != fingerprint("ab")


def test_unfinished_folders_are_invisible(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    workspace.write_table("things/one/part.parquet", pa.table({"x": [1]}))
    assert workspace.manifest("things/one") is None
    assert workspace.finished("things") == []
    workspace.finish("things/one", manifest())
    assert [name for name, _ in workspace.finished("things")] == ["one"]


def test_finished_is_ordered_by_creation(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    for name in ("b", "c", "a"):
        workspace.finish(f"things/{name}", manifest())
    assert [name for name, _ in workspace.finished("things")] == ["b", "c", "a"]


def test_tables_round_trip_in_name_order(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    for number in (1, 0, 2):
        workspace.write_table(f"t/part-{number}.parquet", pa.table({"x": [number]}))
    assert workspace.read_tables("t")["x"].to_pylist() == [0, 1, 2]
    with pytest.raises(WorkspaceError, match="holds no Parquet file"):
        workspace.read_tables("absent")


def test_publish_replaces_and_marks_last(tmp_path: Path):
    workspace = Workspace(str(tmp_path / "w"))
    folder = tmp_path / "made"
    (folder / "sub").mkdir(parents=True)
    (folder / "sub" / "a.txt").write_text("a")
    workspace.publish(folder, "models/m/1", manifest())
    (folder / "sub" / "a.txt").unlink()
    (folder / "b.txt").write_text("b")
    workspace.publish(folder, "models/m/1", manifest())
    assert workspace.children("models/m/1") == ["b.txt", "manifest.json"]


def test_newer_formats_are_refused(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    workspace.write_json("t/manifest.json", {"format_version": 99})
    with pytest.raises(MismatchError, match="format version 99"):
        workspace.manifest("t")


def test_unwritable_workspace_is_one_sentence(tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WorkspaceError, match="cannot be written") as caught:
        Workspace(str(tmp_path / "file")).check_writable()
    assert "\n" not in str(caught.value)
    with pytest.raises(WorkspaceError, match="cannot be opened"):
        Workspace("ftp://host/path")


def test_pickles_by_location(tmp_path: Path):
    copy = pickle.loads(pickle.dumps(Workspace(str(tmp_path))))
    copy.write_json("a.json", {"x": 1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}


def test_models_follow_their_parents(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    with pytest.raises(WorkspaceError, match="htcl pretrain"):
        artifacts.newest_semantic(workspace, "failed")
    workspace.finish("models/semantic/s1", manifest())
    workspace.finish("models/preference/p1", manifest(model="s1"))
    semantic = artifacts.newest_semantic(workspace, "failed")
    preference = artifacts.newest_preference(workspace, semantic, "failed")
    assert preference is not None
    assert (semantic.version, preference.version) == ("s1", "p1")
    workspace.finish("models/semantic/s2", manifest())
    newest = artifacts.newest_semantic(workspace, "failed")
    assert artifacts.newest_preference(workspace, newest, "failed") is None, (
        "a preference model of an older parent must not be mixed in"
    )
    older = artifacts.named_models(workspace, "p1")
    assert older.semantic.version == "s1"
    assert artifacts.named_models(workspace, "s1").preference is None
    with pytest.raises(WorkspaceError, match="expected one of s1, s2, p1"):
        artifacts.named_models(workspace, "p9")


def test_a_folder_that_appears_while_it_is_listed_is_listed(tmp_path: Path):
    """pyarrow raises FileNotFoundError when a folder is made between its attempt to open it and its check that it is
    missing."""
    folder = tmp_path / "new"

    class Appearing:
        """A local file system in which another process makes the folder during the first listing."""

        def get_file_info(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
            if not folder.exists():
                folder.mkdir()
                (folder / "file").touch()
                raise FileNotFoundError(selector.base_dir)
            return pafs.LocalFileSystem().get_file_info(selector)

    assert list_folder(pafs.LocalFileSystem(), str(folder)) == []
    assert [info.base_name for info in list_folder(Appearing(), str(folder))] == ["file"]
