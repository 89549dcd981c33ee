"""Files of an index folder, and checks of its manifest that do not load vectors."""

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
"""Exact vectors of kinds that store codes; a flat structure contains the vectors itself."""
SONGS_FILE = "songs.parquet"
MAP_FILE = "map.parquet"
"""Coordinates of songs on the map (song_id, x, y), if a map was drawn."""


def read_manifest(
    folder: str | Path, *, dim: int | None = None, model_versions: ModelVersions | None = None
) -> dict[str, Any]:
    """Read the manifest of an index folder, with every check of `SongIndex.load` that does not load vectors."""
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
        actual = file_sha256(source.full(name))
        if actual != recorded:
            raise MismatchError(
                f"{source.uri_of(name)} has SHA-256 {actual}, but its manifest says {recorded}; run 'htcl index' again"
            )
    check_fits(manifest, source.uri, dim=dim, model_versions=model_versions)
    return manifest


def check_fits(
    manifest: Mapping[str, Any], where: str, *, dim: int | None = None, model_versions: ModelVersions | None = None
) -> None:
    """Raise MismatchError unless the manifest has this dimension and these models."""
    if dim is not None and dim != manifest["dim"]:
        raise MismatchError(
            f"the index {where} has dimension {manifest['dim']}, but the models have {dim}; run 'htcl index' again"
        )
    for stage, version in (model_versions or {}).items():
        built_with = manifest["model_versions"].get(stage)
        if built_with != version:
            raise MismatchError(
                f"the index {where} was built with {stage} model {built_with}, but the one loaded is {version}; "
                "run 'htcl embed' and 'htcl index' again"
            )
