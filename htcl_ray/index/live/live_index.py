"""The index that a replica serves, switched atomically and kept up to date from the update log."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from htcl_ray.api.responses import ServedIndexResponse, Updates
from htcl_ray.config.sections import Require, ServeSettings
from htcl_ray.errors import IndexRefusedError, InputError, SongNotFoundError
from htcl_ray.index.live.activation import Activations, Pointer, check_name, load_accepted, warm_up
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import Retry, Update, UpdateLog
from htcl_ray.index.vectors import ModelVersions, Vectors
from htcl_ray.schemas import ESTIMATED
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace

STOP_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Active:
    """The served index between two switches. A request reads it once, so that its response is of one version."""

    version: str
    service: SearchService
    activated_at: str
    replay: Replay


class SwitchInProgress(Exception):
    """Another index is being loaded."""


class LiveIndex:
    """The served index of one replica, a function of the workspace, so that all replicas agree after one poll.

    The latest of the index that the application started with and the activations since (see `activation.py`) is
    served; with `settings.activate_newest`, a newer index of the same models takes precedence. While an index is
    rejected, its predecessor is served. A rejection is logged once, and loading is retried, because models may not be
    copied yet or a disk may be full.
    """

    def __init__(
        self,
        workspace: Workspace,
        settings: ServeSettings,
        model_versions: ModelVersions,
        started: Pointer | None = None,
        *,
        require: Require = "failed",
    ) -> None:
        """Load the index to serve and apply the update log.

        `model_versions`: models of the encoder. `started`: the index that the application was started with, from
        `starting_pointer`; default the newest accepted index of these models. `require`: `gate.require`. Raises
        IndexRefusedError when no index can be served.
        """
        self.workspace = workspace
        self._settings = settings
        self._model_versions = model_versions
        self._require: Require = require
        self._log = UpdateLog(workspace)
        self._activations = Activations(workspace)
        self._started = started
        self._built: dict[str, Pointer | None] = {}
        """Pointer of every finished index seen, or None for an index of other models."""
        self._refused: dict[Pointer, tuple[str, Retry]] = {}
        """Indexes that could not be loaded, with the reason and the time of the next attempt."""
        self._changing = threading.Lock()
        """Held while the log is applied or written, and while the active index is replaced."""
        self._switching = threading.Lock()
        """Held while another index is loaded, until it is active or rejected."""
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self.failed_polls = 0
        self.active = self._first()

    @property
    def service(self) -> SearchService:
        """Search service of the active index."""
        return self.active.service

    @property
    def version(self) -> str:
        """Version of the active index."""
        return self.active.version

    @property
    def broken(self) -> dict[str, str]:
        """Unreadable files of the log, with the reasons."""
        return dict(self._log.broken)

    def activate(self, version: str) -> None:
        """Switch to another index: load, check, apply the log, warm up, record the activation, replace the active one.

        The current index is served until the switch. Raises IndexNotFoundError or IndexRefusedError, and then it stays
        active; SwitchInProgress while another index is being loaded; OSError when the storage fails.
        """
        check_name(version)
        if not self._switching.acquire(blocking=False):
            raise SwitchInProgress
        try:
            replay = self._load(version)
            self._switch(replay, self._activations.append(version))
        finally:
            self._switching.release()

    def upsert(self, song_id: str, vectors: Vectors, metadata: Mapping[str, Any]) -> str:
        """Insert or replace a song, and return the name of the update.

        `vectors`: one unit-norm row of this index's models. `metadata`: any columns of `schemas.INDEX_SONGS` except
        song_id; other columns keep their values, except those that were estimated from the former audio. When this
        returns, the update is durable and visible on this replica; the others apply it with their next poll.
        """
        index = self.service.index
        if len(vectors) != 1 or vectors.dim != index.dim or (vectors.preference is not None) != index.has_preference:
            raise ValueError(f"expected one row of vectors of {index.dim} dimensions, as the index has")
        with self._changing:
            self.active.replay.catch_up()
            return self._write(
                Update(song_id, vectors, self._model_versions, _stated(self._known(song_id)) | dict(metadata))
            )

    def describe(self, song_id: str, metadata: Mapping[str, Any]) -> str:
        """Change the given metadata columns of a song and keep its vectors; see `upsert`. Raises SongNotFoundError."""
        with self._changing:
            self.active.replay.catch_up()
            vectors = self.service.index.vectors_of([song_id])
            known = self._known(song_id)
            estimated = [column for column in known.get(ESTIMATED) or () if column not in metadata] or None
            about = known | {ESTIMATED: estimated} | dict(metadata)
            return self._write(Update(song_id, vectors, self._model_versions, about))

    def remove(self, song_id: str) -> str:
        """Delete a song; see `upsert`. Raises SongNotFoundError."""
        with self._changing:
            self.active.replay.catch_up()
            if song_id not in self.service.index:
                raise SongNotFoundError(f"the index holds no song '{song_id}'")
            return self._write(Update(song_id, None, {}, {}))

    def poll(self) -> None:
        """Apply new updates of the log, and switch when another index is selected.

        Raises OSError when the storage fails.
        """
        with self._changing:
            self.active.replay.catch_up()
        if self._switching.acquire(blocking=False):
            try:
                self._follow()
            finally:
                self._switching.release()

    def start(self, after_poll: Callable[[], None] = lambda: None) -> None:
        """Poll every `settings.poll_seconds` in a thread until `stop`, and call `after_poll` in it after each poll."""
        self._watcher = threading.Thread(target=self._watch, args=(after_poll,), name="htcl-live-index", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """Stop the polling thread."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join(STOP_SECONDS)

    def _watch(self, after_poll: Callable[[], None]) -> None:
        while not self._stop.wait(self._settings.poll_seconds):
            try:
                self.poll()
            except Exception as error:  # any failure: the next poll may succeed  # noqa: BLE001
                self.failed_polls += 1
                log.warning("polling %s for updates failed and is retried: %s", self.workspace.uri, error)
            after_poll()

    def _known(self, song_id: str) -> dict[str, Any]:
        """Stored columns of a song except song_id; empty for an unknown song."""
        index = self.service.index
        row = index.metadata_of(song_id) if song_id in index else {}
        return {name: value for name, value in row.items() if name != "song_id"}

    def _write(self, update: Update) -> str:
        file, row = self._log.append(update)
        self.active.replay.written(file, row)
        return str(row["name"][0].as_py())

    def _load(self, version: str) -> Replay:
        index = load_accepted(self.workspace, version, self._model_versions, require=self._require)
        replay = Replay(index, self._log)
        replay.catch_up()
        warm_up(index)
        return replay

    def _switch(self, replay: Replay, pointer: Pointer) -> None:
        with self._changing:
            replay.catch_up()
            self.active = _active(replay, pointer)

    def _first(self) -> Active:
        problem: InputError | None = None
        for pointer in self._wanted():
            if pointer not in self._refused:
                try:
                    replay = self._load(pointer.version)
                except IndexRefusedError as error:
                    self._refuse(pointer, error)
                    problem = error
                else:
                    self._started = self._started or pointer
                    return _active(replay, pointer)
        raise problem or IndexRefusedError(
            f"{self.workspace.uri} holds no index of these models; run 'htcl index' first"
        )

    def _follow(self) -> None:
        for pointer in self._wanted():
            if pointer.version == self.version:
                return
            if pointer not in self._refused or self._refused[pointer][1].due:
                try:
                    self._switch(self._load(pointer.version), pointer)
                except Exception as error:  # any failure: a later attempt may succeed  # noqa: BLE001
                    self._refuse(pointer, error)
                else:
                    self._refused.pop(pointer, None)
                    log.info("serving index %s", pointer.version)
                    return

    def _wanted(self) -> Iterator[Pointer]:
        """Pointers of the indexes to serve, in order of precedence."""
        for number, pointer in enumerate(self._chosen()):
            if number == 0 and self._settings.activate_newest:
                yield from self._built_after(pointer.built_through)
            yield pointer
        if self._started is None:
            yield from self._built_after("")

    def _chosen(self) -> Iterator[Pointer]:
        """The index that the application started with and the activations, the latest first."""
        started = self._started
        for pointer in self._activations.latest_first():
            if started is not None and started.order >= pointer.order:
                yield started
                started = None
            yield pointer
        if started is not None:
            yield started

    def _built_after(self, moment: str) -> list[Pointer]:
        """Indexes of these models finished after `moment`, the newest first."""
        names = self.workspace.children("index")
        for name in names:
            if name not in self._built and (manifest := self._manifest(name)) is not None:
                same = manifest.get("model_versions") == self._model_versions
                created = str(manifest.get("created"))
                self._built[name] = Pointer(name, created, built_through=created) if same else None
        newer = [
            pointer
            for name in names
            if (pointer := self._built.get(name)) is not None and pointer.built_through > moment
        ]
        return sorted(newer, key=lambda pointer: pointer.built_through, reverse=True)

    def _manifest(self, name: str) -> dict[str, Any] | None:
        try:
            return self.workspace.manifest(f"index/{name}")
        except InputError:  # half-copied, damaged or of a newer format; activating it by name raises the error
            return None

    def _refuse(self, pointer: Pointer, error: Exception) -> None:
        before, retry = self._refused.get(pointer, (None, None))
        reason = str(error) or type(error).__name__
        self._refused[pointer] = reason, Retry.after(retry)
        if before != reason:
            log.warning("index %s is not served, and is retried later: %s", pointer.version, reason)


def describe_served(live: LiveIndex) -> ServedIndexResponse:
    """The response that describes the active index and the state of its update log."""
    active = live.active
    index, replay = active.service.index.snapshot(), active.replay
    return ServedIndexResponse(
        version=active.version,
        songs=len(index),
        dim=index.dim,
        has_preference=index.has_preference,
        model_versions=index.model_versions,
        manifest=index.manifest,
        activated_at=active.activated_at,
        updates=Updates(
            applied=replay.applied,
            skipped=replay.skipped,
            broken=len(live.broken),
            last=replay.last,
            songs_added=len(replay.added),
            songs_removed=len(replay.removed),
            files=replay.files,
            failed_polls=live.failed_polls,
        ),
    )


def _active(replay: Replay, pointer: Pointer) -> Active:
    return Active(pointer.version, SearchService(replay.index), pointer.activated_at, replay)


def _stated(known: Mapping[str, Any]) -> dict[str, Any]:
    """Stored columns of a song without the values that were estimated from its audio."""
    return {**known, **dict.fromkeys(known.get(ESTIMATED) or ()), ESTIMATED: None}
