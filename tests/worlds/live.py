"""A workspace with indexes of random vectors, whose models are manifests only: all that a LiveIndex needs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

DIM = 4
VERSIONS = {"semantic": "weights-s", "preference": "weights-p"}


def unit_vectors(seed: int, rows: int = 1) -> Vectors:
    halves = np.random.default_rng(seed).normal(size=(2, rows, DIM))
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    return Vectors(*halves.astype(np.float32))


def write_models(workspace: Workspace) -> None:
    for stage in ("semantic", "preference"):
        workspace.finish(f"models/{stage}/model-{stage}", build_manifest("model", config={}, inputs={}))


def write_index(
    workspace: Workspace,
    version: str,
    songs: dict[str, int],
    *,
    model_versions: dict[str, str | None] | None = None,
    titles: dict[str, str] | None = None,
) -> None:
    """An index whose songs have the vectors of their seeds."""
    if not workspace.exists("models"):
        write_models(workspace)
    parts = [unit_vectors(seed) for seed in songs.values()]
    vectors = Vectors(
        np.concatenate([part.semantic for part in parts]), np.concatenate([part.preference for part in parts])
    )
    metadata = pa.table({"title": pa.array([(titles or {}).get(song) for song in songs], pa.string())})
    index = SongIndex.build(list(songs), vectors, metadata=metadata, model_versions=model_versions or dict(VERSIONS))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        index.save(
            folder,
            inputs={"semantic": "model-semantic", "preference": "model-preference"},
            quality={"recall_at_10": 1.0},
        )
        workspace.publish(folder, f"index/{version}", index.manifest)


def contents(index: SongIndex) -> dict[str, tuple[bytes, str | None]]:
    """Every song that a search finds, with its vectors and title."""
    query = unit_vectors(0)
    hits = index.search(query, max(len(index), 1) + 5)[0]
    ids = [hit.song_id for hit in hits]
    if not ids:
        return {}
    vectors = index.vectors_of(ids)
    return {
        song: (vectors.semantic[row].tobytes() + vectors.preference[row].tobytes(), index.metadata_of(song)["title"])
        for row, song in enumerate(ids)
    }


def content_of(seed: int, title: str | None) -> tuple[bytes, str | None]:
    vectors = unit_vectors(seed)
    return vectors.semantic.tobytes() + vectors.preference.tobytes(), title
