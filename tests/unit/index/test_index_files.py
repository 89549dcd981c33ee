"""Files of every kind: memory-mapped and shared by readers, rejected when damaged."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pytest

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import MismatchError
from htcl_ray.index.folder import EXACT_FILE, SONGS_FILE, VECTORS_FILE
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.workspace.manifest import file_sha256

pytestmark = pytest.mark.unit

KINDS = ("flat", "hnsw", "ivf", "ivf_pq")
SONGS, DIM = 4000, 64


def random_vectors(rows: int, dim: int = DIM) -> Vectors:
    values = np.random.default_rng(0).normal(size=(2, rows, dim))
    return Vectors(*(values / np.linalg.norm(values, axis=2, keepdims=True)).astype(np.float32))


def saved(folder: Path, kind: str, rows: int = 300, dim: int = 8) -> Path:
    settings = IndexSettings(kind=kind, ef_construction=20, hnsw_neighbors=8)
    SongIndex.build([f"song-{i}" for i in range(rows)], random_vectors(rows, dim), settings=settings).save(folder)
    return folder


def trust(folder: Path) -> None:
    """Write the hashes of changed files into the manifest, so that only their content can be rejected."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


FILES = {
    kind: (VECTORS_FILE, SONGS_FILE) if kind == "flat" else (VECTORS_FILE, EXACT_FILE, SONGS_FILE) for kind in KINDS
}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in KINDS for name in FILES[kind]])
def test_changed_file_is_rejected(tmp_path: Path, kind: str, name: str):
    folder = saved(tmp_path, kind)
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(MismatchError, match=rf"{name} has SHA-256"):
        SongIndex.load(folder)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("damage", ["empty", "cut", "rows", "double", "objects"])
def test_mismatched_exact_vectors_are_rejected(tmp_path: Path, kind: str, damage: str):
    path = saved(tmp_path, kind) / EXACT_FILE
    data, rows = path.read_bytes(), np.load(path)
    if damage in ("empty", "cut"):
        path.write_bytes(b"" if damage == "empty" else data[:-7])
    else:
        other = {"rows": rows[:-1], "double": rows.astype(np.float64), "objects": np.array([{}] * 4, dtype=object)}
        np.save(path, other[damage], allow_pickle=damage == "objects")
    trust(tmp_path)
    with pytest.raises(MismatchError, match="run 'htcl index' again"):
        SongIndex.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
class TestRejects:
    @pytest.mark.parametrize("damage", ["empty", "cut", "noise", "half", "songs"])
    def test_unreadable_structure(self, tmp_path: Path, kind: str, damage: str):
        folder = saved(tmp_path, kind)
        data = (folder / VECTORS_FILE).read_bytes()
        changed = {
            "empty": b"",
            "cut": data[:-16],
            "half": data[: len(data) // 2],
            "noise": np.random.default_rng(0).bytes(len(data)),
            "songs": (folder / SONGS_FILE).read_bytes(),
        }
        (folder / VECTORS_FILE).write_bytes(changed[damage])
        trust(folder)
        with pytest.raises(MismatchError, match="run 'htcl index' again"):
            SongIndex.load(folder)

    def test_another_kind(self, tmp_path: Path, kind: str):
        folder = saved(tmp_path / kind, kind)
        other = saved(tmp_path / "other", "hnsw" if kind == "ivf" else "ivf")
        (folder / VECTORS_FILE).write_bytes((other / VECTORS_FILE).read_bytes())
        trust(folder)
        with pytest.raises(MismatchError, match=f"manifest says {kind}"):
            SongIndex.load(folder)

    def test_another_number_of_songs(self, tmp_path: Path, kind: str):
        folder, other = saved(tmp_path / kind, kind), saved(tmp_path / "other", kind, 299)
        (folder / SONGS_FILE).write_bytes((other / SONGS_FILE).read_bytes())
        trust(folder)
        with pytest.raises(MismatchError, match=r"300 vectors of 16.*299 of 16"):
            SongIndex.load(folder)


def test_manifest_without_structure_is_rejected(tmp_path: Path):
    folder = saved(tmp_path, "flat")
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["structure"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(MismatchError, match="run 'htcl index' again"):
        SongIndex.load(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_writes_are_atomic(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch):
    index = SongIndex.load(saved(tmp_path, kind))
    before = (tmp_path / VECTORS_FILE).read_bytes()

    def cut(_: object, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(faiss, "write_index", cut)
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path)
    assert (tmp_path / VECTORS_FILE).read_bytes() == before
    assert not list(tmp_path.glob(".*"))
