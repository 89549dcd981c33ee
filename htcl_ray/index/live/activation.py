"""Which index is to be served, as the workspace says it, and loading one with every check.

`activations/` holds one small file for each activation, which is never changed: `<20 digits: number>-<8 hex digits:
writer>.json`. The greatest name counts. A writer gives a number greater than all that it has listed, so that of two
activations of which one began after the other had been answered, the later counts whatever their clocks say. Two at the
same time have different names, so that none overwrites the other, and the same one counts everywhere.
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
"""Activations that stay in the log; the newest is served, and those before it are what is served while it is
refused."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
WARM_UP_SONGS = 8
_FILE = re.compile(r"\d{20}-[0-9a-f]{8}\.json")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pointer:
    """An index that was chosen, and the place of the choice among all choices of the workspace."""

    version: str
    activated_at: str
    """ISO 8601, for people: no two choices are ordered by it."""
    order: str = ""
    """Of two choices, the one with the greater text counts; "" is less than every choice that a person made."""
    built_through: str = ""
    """`created` of the newest index that was finished then; an index that was finished later has a greater one."""


def now() -> str:
    """The present time as pointers and manifests say it."""
    return datetime.now(UTC).isoformat(timespec="microseconds")


def check_name(version: str) -> str:
    """The version, if it can be one: a plain name, never a path. Raises IndexRefusedError."""
    if not NAME.fullmatch(version) or version in (".", ".."):
        raise IndexRefusedError(
            f"'{version[:100]}' is no index version; expected 1 to 64 letters, digits, '.', '_' and '-'"
        )
    return version


class Activations:
    """Reads and writes the activations of one workspace, from any number of threads, processes and machines at a
    time.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._read: dict[str, Pointer] = {}
        self._reported: dict[str, str] = {}

    def latest_first(self) -> Iterator[Pointer]:
        """All that can be read; one that cannot is reported once and passed over. Raises OSError when the storage
        fails.
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
        """Activate an index; every replica serves it from its next poll on. It is durable when this returns."""
        names = self._names()
        name = f"{_number(names) + 1:020d}-{uuid.uuid4().hex[:8]}.json"
        content = {
            "version": check_name(version),
            "activated_at": now(),
            "built_through": _newest_built(self.workspace),
        }
        self.workspace.write_bytes(f"{FOLDER}/{name}", (json.dumps(content) + "\n").encode(), durable=True)
        with contextlib.suppress(
            OSError
        ):  # also of one that another writer has removed; the next activation tries again
            for old in names[: 1 - KEPT]:
                self.workspace.fs.delete_file(self.workspace.full(f"{FOLDER}/{old}"))
        return _parse(name, content)

    def started_with(self, version: str) -> Pointer:
        """The choice of an application that is started with this index now: it counts until a later activation."""
        return Pointer(check_name(version), now(), f"{_number(self._names()):020d}~", _newest_built(self.workspace))

    def _names(self) -> list[str]:
        """Names of activations, the greatest last."""
        names = self.workspace.children(FOLDER)
        for name in names:
            if not _FILE.fullmatch(name):
                self._report(name, "its name is not that of an activation")
        return [name for name in names if _FILE.fullmatch(name)]

    def _report(self, name: str, reason: str) -> None:
        if self._reported.get(name) != reason:
            self._reported[name] = reason
            log.warning(
                "%s does not count: %s; activate an index again", self.workspace.uri_of(f"{FOLDER}/{name}"), reason
            )


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
    """`created` of the newest finished index; "" when there is none."""
    return max((manifest["created"] for _, manifest in workspace.dated("index")), default="")


def starting_pointer(
    workspace: Workspace,
    version: str | None,
    *,
    require: Require = "failed",
    determined: Callable[[], str | None] = lambda: None,
) -> Pointer:
    """What an application that starts now serves.

    That is `version`, else what was activated last and its gate allows, else the index of the configuration, which
    `determined` gives if there is one, else the newest accepted. Raises InputError when there is none.
    """
    activations = Activations(workspace)
    if version is not None:
        return activations.started_with(version)
    for pointer in activations.latest_first():
        try:
            check_accepted(workspace, pointer.version, require)
        except AccessDeniedError:
            raise
        except InputError:  # each replica reports it, and serves the index when it can
            continue
        return pointer
    newest = artifacts.index(workspace, determined(), require=require)
    return Pointer(newest.version, newest.manifest["created"], built_through=newest.manifest["created"])


def check_accepted(workspace: Workspace, version: str, require: Require) -> artifacts.Artifact:
    """The index of this version. Raises IndexNotFoundError when there is none, GateError or MismatchError when its gate
    forbids it.
    """
    path = f"index/{check_name(version)}"
    manifest = workspace.manifest(path)
    if manifest is None:
        raise IndexNotFoundError(
            f"there is no finished index '{version}' in {workspace.uri}/index; expected one that 'htcl index' made"
        )
    artifact = artifacts.Artifact(path, version, manifest)
    check_gates(workspace, artifacts.models_of(workspace, artifact), artifact, require)
    return artifact


def load_accepted(workspace: Workspace, version: str, model_versions: ModelVersions, *, require: Require) -> SongIndex:
    """The index of this version, for queries that the models of `model_versions` encode.

    Raises IndexNotFoundError, IndexRefusedError for anything wrong with the index itself, and OSError when the storage
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
    """Search for a few of its own songs at every blend's end, so that the first answers find pages and threads in
    place.
    """
    songs = [song for song in index.songs["song_id"].slice(0, WARM_UP_SONGS).to_pylist() if song in index]
    if songs:
        vectors = index.vectors_of(songs)
        for blend in (0.0, 1.0) if index.has_preference else (0.0,):
            index.search(vectors, 10, blend=blend)
