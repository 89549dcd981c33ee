"""Which index is to be served, as the workspace says it, and loading one with every check."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

import pyarrow as pa

from htcl_ray import artifacts
from htcl_ray.errors import IndexNotFoundError, IndexRefusedError, InputError
from htcl_ray.retrieval.index import SongIndex
from htcl_ray.retrieval.vectors import ModelVersions
from htcl_ray.settings import Require
from htcl_ray.storage import Workspace
from htcl_ray.verdicts import check_gates

POINTER = "index/active.json"
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
WARM_UP_SONGS = 8


@dataclass(frozen=True)
class Pointer:
    """An index that was chosen, and when: ISO 8601, UTC, with microseconds, so that the order of the texts is that of the times."""

    version: str
    activated_at: str


def now() -> str:
    """The present time as pointers and manifests say it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def check_name(version: str) -> str:
    """The version, if it can be one: a plain name, never a path. Raises IndexRefusedError."""
    if not NAME.fullmatch(version) or version in (".", ".."):
        raise IndexRefusedError(f"'{version[:100]}' is no index version; expected 1 to 64 letters, digits, '.', '_' and '-'")
    return version


def read_pointer(workspace: Workspace) -> Pointer | None:
    """What was activated last, or None when nothing was. Raises InputError when the file is not a pointer."""
    if not workspace.exists(POINTER):
        return None
    content = workspace.read_json(POINTER)
    values = [content.get(name) for name in ("version", "activated_at")] if isinstance(content, dict) else []
    if len(values) != 2 or not all(isinstance(value, str) for value in values):
        raise IndexRefusedError(f"{workspace.uri_of(POINTER)} has no version and activated_at; activate an index again")
    return Pointer(check_name(str(values[0])), str(values[1]))


def write_pointer(workspace: Workspace, pointer: Pointer) -> None:
    """Tell every replica what to serve."""
    workspace.write_json(POINTER, asdict(pointer))


def starting_pointer(
    workspace: Workspace, version: str | None, *, require: Require = "failed", determined: Callable[[], str | None] = lambda: None
) -> Pointer:
    """What an application that starts now serves.

    That is `version`, else what was activated last if its gate allows it, else the index of the configuration, which `determined` gives if
    there is one, else the newest accepted. Raises InputError when there is none.
    """
    if version is not None:
        return Pointer(check_name(version), now())
    try:
        pointer = read_pointer(workspace)
        if pointer is not None:
            check_accepted(workspace, pointer.version, require)
            return pointer
    except InputError:  # the watcher of each replica reports it
        pass
    newest = artifacts.index(workspace, determined(), require=require)
    return Pointer(newest.version, newest.manifest["created"])


def check_accepted(workspace: Workspace, version: str, require: Require) -> artifacts.Artifact:
    """The index of this version. Raises IndexNotFoundError when there is none, GateError or MismatchError when its gate forbids it."""
    path = f"index/{check_name(version)}"
    manifest = workspace.manifest(path)
    if manifest is None:
        raise IndexNotFoundError(f"there is no finished index '{version}' in {workspace.uri}/index; expected one that 'htcl index' made")
    artifact = artifacts.Artifact(path, version, manifest)
    check_gates(workspace, artifacts.models_of(workspace, artifact), artifact, require)
    return artifact


def load_accepted(workspace: Workspace, version: str, model_versions: ModelVersions, *, require: Require) -> SongIndex:
    """The index of this version, for queries that the models of `model_versions` encode.

    Raises IndexNotFoundError, IndexRefusedError for anything wrong with the index itself, and OSError when the storage fails.
    """
    try:
        artifact = check_accepted(workspace, version, require)
        return SongIndex.load(workspace.local_copy(artifact.path), model_versions=model_versions)
    except IndexRefusedError:
        raise
    except InputError as error:
        raise IndexRefusedError(str(error)) from error
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError, pa.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise IndexRefusedError(f"index {version} cannot be loaded ({reason}); run 'htcl index' again") from error


def warm_up(index: SongIndex) -> None:
    """Search for a few of its own songs at every blend's end, so that the first answers find pages and threads in place."""
    songs = [song for song in index.songs["song_id"].slice(0, WARM_UP_SONGS).to_pylist() if song in index]
    if songs:
        vectors = index.vectors_of(songs)
        for blend in (0.0, 1.0) if index.has_preference else (0.0,):
            index.search(vectors, 10, blend=blend)
