"""Private folders and verified copies: nothing that another user planted or that was damaged on the way is used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from htcl_ray.errors import MismatchError, StorageError
from htcl_ray.workspace import local_copies
from htcl_ray.workspace.local_copies import private_folder
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.worlds.object_store import ObjectStore, running_store

pytestmark = pytest.mark.processes

FILES = {"weights.bin": b"w" * 1000, "tokenizer/vocabulary.txt": b"calm\npiano\n", "README.md": b"# Card\n"}
PATH = "models/semantic/m1"
URI = "s3://bucket/workspace"


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "tmp"
    folder.mkdir(mode=0o1777)
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[ObjectStore]:
    with running_store(monkeypatch) as running:
        write_model(Workspace(URI))
        running.requests.clear()
        yield running


def write_model(workspace: Workspace) -> None:
    for name, content in FILES.items():
        workspace.write_bytes(f"{PATH}/{name}", content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    workspace.finish(PATH, build_manifest("model", config={}, inputs={}, files=hashes))


def downloads(store: ObjectStore) -> int:
    return sum(request == f"GET /bucket/workspace/{PATH}/weights.bin" for request in store.requests)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }


class TestPrivateFolder:
    def test_it_is_closed_to_others_and_the_same_for_everyone_of_this_user(self, temporary: Path):
        folder = private_folder()
        assert folder == temporary / f"htcl-{os.geteuid()}"
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert private_folder() == folder
        assert private_folder(temporary) == folder

    def test_one_that_others_may_read_is_closed(self, temporary: Path):
        """Nothing in it can be planted, but models are not for everyone."""
        (temporary / f"htcl-{os.geteuid()}").mkdir(mode=0o755)
        assert stat.S_IMODE(private_folder().stat().st_mode) == 0o700

    @pytest.mark.parametrize(
        "taken", ["another user's", "for all to write", "for a group to write", "a link", "a link to nothing", "a file"]
    )
    def test_a_name_that_is_taken_is_not_used(self, temporary: Path, monkeypatch: pytest.MonkeyPatch, taken: str):
        if taken == "another user's":
            monkeypatch.setattr(os, "geteuid", lambda: 12345)
        name = temporary / f"htcl-{os.geteuid()}"
        if taken == "a file":
            name.touch()
        elif taken.startswith("a link"):
            if taken == "a link":
                (temporary / "planted").mkdir(mode=0o700)
            name.symlink_to(temporary / "planted")
        else:
            name.mkdir()
            name.chmod({"another user's": 0o700, "for all to write": 0o777, "for a group to write": 0o770}[taken])
        if taken == "another user's":
            assert private_folder() != name
            return
        folder = private_folder()
        assert folder.resolve() not in (name.resolve(), temporary / "planted")
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert private_folder() == folder, "processes that come later share it"
        (temporary / f"{name.name}-aaaa").mkdir()
        (temporary / f"{name.name}-aaaa").chmod(0o777)
        assert private_folder() == folder

    def test_frames_copies_and_ray_s_sessions_lie_in_it(
        self, temporary: Path, monkeypatch: pytest.MonkeyPatch, store: ObjectStore
    ):
        from htcl_ray.cluster.connection import ray_folder

        (temporary / f"htcl-{os.geteuid()}").symlink_to(temporary)
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setattr("htcl_ray.cluster.connection.socket_folder", lambda name, folder: folder)
        assert Path(ray_folder()).parent == Workspace(URI).local_copy(PATH).parent == private_folder() != temporary


def flip(folder: Path) -> None:
    """One bit, with the file's times put back."""
    file = folder / "weights.bin"
    before = file.stat()
    file.write_bytes(b"v" + file.read_bytes()[1:])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def link(folder: Path) -> None:
    (folder / "weights.bin").rename(folder.parent / "elsewhere.bin")
    (folder / "weights.bin").symlink_to(folder.parent / "elsewhere.bin")


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit": flip,
    "cut": lambda folder: os.truncate(folder / "weights.bin", 10),
    "removed": lambda folder: (folder / "tokenizer/vocabulary.txt").unlink(),
    "everything removed": shutil.rmtree,
    "added": lambda folder: (folder / "tokenizer/added.txt").write_text("x"),
    "a link": link,
    "the manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "the record cut": lambda folder: os.truncate(folder.with_suffix(".json"), 20),
    "another record": lambda folder: folder.with_suffix(".json").write_text("[1]"),
    "no record": lambda folder: folder.with_suffix(".json").unlink(),
}


class TestCopies:
    def test_a_copy_is_made_once_and_hashed_once(
        self, temporary: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ):
        hashed: list[Path] = []
        sha256 = local_copies.file_sha256
        monkeypatch.setattr(local_copies, "file_sha256", lambda path: hashed.append(path) or sha256(path))
        folder = Workspace(URI).local_copy(PATH)
        assert contents(folder) == FILES
        assert len(hashed) == len(FILES) + 1
        for _ in range(3):
            assert Workspace(URI).local_copy(PATH) == folder
        assert (downloads(store), len(hashed)) == (1, len(FILES) + 1)
        os.utime(folder / "weights.bin")
        for _ in range(2):
            Workspace(URI).local_copy(PATH)
        assert (downloads(store), len(hashed)) == (1, len(FILES) + 2), "touched: hashed again, once, and not copied"

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_a_copy_that_was_changed_is_made_again(self, damage: str, temporary: Path, store: ObjectStore):
        folder = Workspace(URI).local_copy(PATH)
        DAMAGES[damage](folder)
        again = Workspace(URI).local_copy(PATH)
        assert contents(again) == FILES
        assert not (again / "weights.bin").is_symlink()
        assert downloads(store) == 2
        assert Workspace(URI).local_copy(PATH) == again
        assert downloads(store) == 2
        assert not list(again.parent.glob(".*"))

    def test_what_another_user_planted_is_not_used(self, temporary: Path, store: ObjectStore):
        """A whole copy with a record that fits it, where the copy of this user would lie."""
        folder = Workspace(URI).local_copy(PATH)
        (folder / "weights.bin").write_bytes(b"planted")
        record = folder.with_suffix(".json")
        made = {
            name: [local_copies.file_sha256(folder / name), local_copies.identity(folder / name)]
            for name in (*FILES, "manifest.json")
        }
        record.write_text(json.dumps(made))
        assert contents(Workspace(URI).local_copy(PATH))["weights.bin"] == b"planted", (
            "as far as the record goes, it is right"
        )
        planted = folder.parent.rename(temporary / "planted")
        folder.parent.symlink_to(planted)
        assert contents(Workspace(URI).local_copy(PATH)) == FILES
        folder.parent.unlink()
        planted.rename(folder.parent).chmod(0o777)
        assert contents(Workspace(URI).local_copy(PATH)) == FILES

    def test_incomplete_artifact_raises_and_is_copied_once_complete(self, temporary: Path, store: ObjectStore):
        key = f"workspace/{PATH}/weights.bin"
        for wrong in (b"w" * 999, None):
            if wrong is None:
                del store.objects[key]
            else:
                store.objects[key] = wrong
            with pytest.raises(
                MismatchError, match=r"^s3://bucket/workspace/models/semantic/m1/weights\.bin .*manifest says .* again$"
            ):
                Workspace(URI).local_copy(PATH)
        assert not [path for path in private_folder().iterdir() if path.is_dir()]
        store.objects[key] = FILES["weights.bin"]
        assert contents(Workspace(URI).local_copy(PATH)) == FILES

    def test_a_card_may_be_newer_than_the_manifest(self, temporary: Path, store: ObjectStore):
        store.objects[f"workspace/{PATH}/README.md"] = b"# Written by an evaluation that was killed\n"
        assert contents(Workspace(URI).local_copy(PATH))["weights.bin"] == FILES["weights.bin"]

    def test_a_download_that_fails_leaves_nothing(
        self, temporary: Path, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr("htcl_ray.workspace.filesystem.S3_ATTEMPTS", 1)
        workspace = Workspace(URI)
        manifest = workspace.manifest(PATH)
        monkeypatch.setattr(workspace, "manifest", lambda path: manifest)
        store.fail_after_bytes = 0
        with pytest.raises(StorageError, match=r"^s3://bucket/workspace/models/semantic/m1 or its copy in "):
            workspace.local_copy(PATH)
        assert [path.suffix for path in private_folder().iterdir()] == [".lock"]

    def test_what_a_killed_process_left_is_removed(self, temporary: Path, store: ObjectStore):
        folder = Workspace(URI).local_copy(PATH)
        shutil.rmtree(folder)
        left = folder.with_name(f".{folder.name}-0123abcd")
        left.mkdir()
        (left / "weights.bin").write_bytes(b"half")
        assert contents(Workspace(URI).local_copy(PATH)) == FILES
        assert not left.exists()

    def test_processes_of_a_machine_share_one_download(self, temporary: Path, store: ObjectStore):
        script = "import sys; from htcl_ray.workspace.storage import Workspace; print(Workspace(sys.argv[1]).local_copy(sys.argv[2]))"
        command = [sys.executable, "-c", script, URI, PATH]
        environment = {**os.environ, "TMPDIR": str(temporary)}
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=environment)
            for _ in range(4)
        ]
        copies = {process.communicate(timeout=120)[0] for process in running}
        assert len(copies) == 1
        assert contents(Path(copies.pop().strip())) == FILES
        assert downloads(store) == 1
