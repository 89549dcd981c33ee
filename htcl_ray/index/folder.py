"""What an index folder says of itself, checked without loading its vectors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.index.vectors import ModelVersions
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace

VECTORS_FILE = "index.faiss"
EXACT_FILE = "vectors.npy"
"""Beside a structure that holds codes; a flat one holds the vectors themselves."""
SONGS_FILE = "songs.parquet"
MAP_FILE = "map.parquet"
"""Places of songs on a plane, where they were drawn: song_id, x, y."""


def read_manifest(
    folder: str | Path, *, dim: int | None = None, model_versions: ModelVersions | None = None
) -> dict[str, Any]:
    """The manifest of an index folder, after every check of `SongIndex.load` that needs no vectors in memory."""
    source = Workspace(str(folder))
    manifest = source.manifest("")
    if manifest is None:
        raise WorkspaceError(f"{source.uri} holds no finished index; run 'htcl index' first")
    if manifest.get("kind") != "index":
        raise MismatchError(f"{source.uri} holds '{manifest.get('kind')}'; expected 'index'")
    if "structure" not in manifest:
        raise MismatchError(f"{source.uri} was written before indexes named their structure; run 'htcl index' again")
    for name in dict.fromkeys((VECTORS_FILE, SONGS_FILE, *manifest["files"])):
        recorded = manifest["files"].get(name)
        if not source.exists(name):
            raise WorkspaceError(f"{source.uri_of(name)} is missing; run 'htcl index' again")
        found = file_sha256(source.full(name))
        if found != recorded:
            raise MismatchError(
                f"{source.uri_of(name)} has SHA-256 {found}, but its manifest says {recorded}; run 'htcl index' again"
            )
    check_fits(manifest, source.uri, dim=dim, model_versions=model_versions)
    return manifest


def check_fits(
    manifest: Mapping[str, Any], where: str, *, dim: int | None = None, model_versions: ModelVersions | None = None
) -> None:
    """Raise MismatchError unless an index's manifest names this dimension and these models."""
    if dim is not None and dim != manifest["dim"]:
        raise MismatchError(
            f"the index {where} has dimension {manifest['dim']}, but the models have {dim}; run 'htcl index' again"
        )
    for stage, version in (model_versions or {}).items():
        theirs = manifest["model_versions"].get(stage)
        if theirs != version:
            raise MismatchError(
                f"the index {where} was built with {stage} model {theirs}, but the one loaded is {version}; "
                "run 'htcl embed' and 'htcl index' again"
            )
