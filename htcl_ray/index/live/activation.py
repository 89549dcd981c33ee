"""Activations, which select the index to serve, and loading an index with every check.

`activations/` holds one immutable file per activation: `<20 digits: number>-<8 hex digits: writer>.json`. The greatest
name wins. A writer uses a number greater than all numbers that it has listed, so an activation that starts after the
response to another one wins whatever the clocks say. Concurrent activations have different names: neither overwrites
the other, and all replicas select the same one.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa

from htcl_ray.config.sections import Require
from htcl_ray.errors import AccessDeniedError, IndexNotFoundError, IndexRefusedError, InputError, WorkspaceError
from htcl_ray.evaluation.release_gate import check_gates
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import ModelVersions
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.storage import Workspace

FOLDER = "activations"
KEPT = 20
"""Activations that are kept; the newest is served, and the ones before it are fallbacks while it is rejected."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
WARM_UP_SONGS = 8
_FILE = re.compile(r"\d{20}-[0-9a-f]{8}\.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pointer:
    """A selected index version, and the order of the selection among all selections of the workspace."""

    version: str
    activated_at: str
    """Time of the selection, ISO 8601, for display only."""
    order: str = ""
    """Sort key: the greater one of two selections wins. "" is less than the key of every activation."""
    built_through: str = ""
    """`created` of the newest index finished at that time; an index finished later has a greater one."""


def now() -> str:
    """The current time in the format of pointers and manifests."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def check_name(version: str) -> str:
    """Return the version if it is a plain name, never a path. Raises IndexRefusedError."""
    if not NAME.fullmatch(version) or version in (".", ".."):
        raise IndexRefusedError(
            f"'{version[:100]}' is no index version; expected 1 to 64 letters, digits, '.', '_' and '-'"
        )
    return version


class Activations:
    """Reader and writer of the activations of a workspace, safe to use from many threads, processes and machines."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._read: dict[str, Pointer] = {}
        self._reported: dict[str, str] = {}

    def latest_first(self) -> Iterator[Pointer]:
        """All readable activations, the newest first; unreadable ones are logged once and skipped.

        Raises OSError when the storage fails.
        """
        for name in reversed(self._names()):
            if name not in self._read:
                try:
                    self._read[name] = _parse(name, self.workspace.read_json(f"{FOLDER}/{name}"))
                except AccessDeniedError:
                    raise
                except InputError as error:
                    self._report(name, str(error))
                    continue
            yield self._read[name]

    def append(self, version: str) -> Pointer:
        """Activate an index durably. Every replica serves it from its next poll on."""
        names = self._names()
        name = f"{_number(names) + 1:020d}-{uuid.uuid4().hex[:8]}.json"
        content = {
            "version": check_name(version),
            "activated_at": now(),
            "built_through": _newest_built(self.workspace),
        }
        self.workspace.write_bytes(f"{FOLDER}/{name}", (json.dumps(content) + "\n").encode(), durable=True)
        with contextlib.suppress(OSError):  # another writer may have deleted one; the next activation tries again
            for old in names[: 1 - KEPT]:
                self.workspace.fs.delete_file(self.workspace.full(f"{FOLDER}/{old}"))
        return _parse(name, content)

    def started_with(self, version: str) -> Pointer:
        """The selection of an application that starts with this index now; it holds until a later activation."""
        return Pointer(check_name(version), now(), f"{_number(self._names()):020d}~", _newest_built(self.workspace))

    def _names(self) -> list[str]:
        """Names of the activation files in ascending order."""
        names = self.workspace.children(FOLDER)
        for name in names:
            if not _FILE.fullmatch(name):
                self._report(name, "its name is not that of an activation")
        return [name for name in names if _FILE.fullmatch(name)]

    def _report(self, name: str, reason: str) -> None:
        if self._reported.get(name) != reason:
            self._reported[name] = reason
            log.warning("%s is ignored: %s; activate an index again", self.workspace.uri_of(f"{FOLDER}/{name}"), reason)


def _number(names: list[str]) -> int:
    return int(names[-1][:20]) if names else 0


def _parse(name: str, content: object) -> Pointer:
    values = (
        [content.get(key) for key in ("version", "activated_at", "built_through")] if isinstance(content, dict) else []
    )
    if not values or not all(isinstance(value, str) for value in values):
        raise WorkspaceError("it has no version, activated_at and built_through")
    version, activated_at, built_through = map(str, values)
    return Pointer(check_name(version), activated_at, name, built_through)


def _newest_built(workspace: Workspace) -> str:
    """`created` of the newest finished index; "" without one."""
    return max((manifest["created"] for _, manifest in workspace.dated("index")), default="")


def starting_pointer(
    workspace: Workspace,
    version: str | None,
    *,
    require: Require = "failed",
    determined: Callable[[], str | None] = lambda: None,
) -> Pointer:
    """The index that an application serves when it starts now.

    In order of precedence: `version`; the newest activation whose index passes its gate; the index of the
    configuration, returned by `determined`; the newest accepted index. Raises InputError when none exists.
    """
    activations = Activations(workspace)
    if version is not None:
        return activations.started_with(version)
    for pointer in activations.latest_first():
        try:
            check_accepted(workspace, pointer.version, require)
        except AccessDeniedError:
            raise
        except InputError:  # each replica logs it, and serves the index once it passes
            continue
        return pointer
    newest = artifacts.index(workspace, determined(), require=require)
    return Pointer(newest.version, newest.manifest["created"], built_through=newest.manifest["created"])


def check_accepted(workspace: Workspace, version: str, require: Require) -> artifacts.Artifact:
    """The index artifact of this version.

    Raises IndexNotFoundError for a missing index, and GateError or MismatchError when its gate rejects it.
    """
    path = f"index/{check_name(version)}"
    manifest = workspace.manifest(path)
    if manifest is None:
        raise IndexNotFoundError(
            f"{workspace.uri}/index holds no finished index '{version}'; expected one that 'htcl index' made"
        )
    artifact = artifacts.Artifact(path, version, manifest)
    check_gates(workspace, artifacts.models_of(workspace, artifact), artifact, require)
    return artifact


def load_accepted(workspace: Workspace, version: str, model_versions: ModelVersions, *, require: Require) -> SongIndex:
    """Load the index of this version for queries encoded by the models `model_versions`.

    Raises IndexNotFoundError for a missing index, IndexRefusedError for an invalid one, and OSError when the storage
    fails.
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
    """Search for a few indexed songs, so that the first requests do not wait for page faults and thread starts."""
    songs = [song for song in index.songs["song_id"].slice(0, WARM_UP_SONGS).to_pylist() if song in index]
    if songs:
        vectors = index.vectors_of(songs)
        for blend in (0.0, 1.0) if index.has_preference else (0.0,):
            index.search(vectors, 10, blend=blend)
