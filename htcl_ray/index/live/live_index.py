"""The index that a replica serves: switched whole, kept up to date from the log of updates, and the same on every
replica.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from htcl_ray.config.sections import Require, ServeSettings
from htcl_ray.errors import IndexRefusedError, InputError, SongNotFoundError
from htcl_ray.index.live.activation import Activations, Pointer, check_name, load_accepted, warm_up
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import Retry, Update, UpdateLog
from htcl_ray.index.vectors import ModelVersions, Vectors
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace

STOP_SECONDS = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Active:
    """What is served from one switch to the next. A request takes it once, so that its answer is of one version."""

    version: str
    service: SearchService
    activated_at: str
    replay: Replay


class SwitchUnderWay(Exception):
    """Another index is being loaded."""


class LiveIndex:
    """What to serve is a function of the workspace, so that all replicas agree within a poll and a new one agrees with
    the old.

    The latest counts of what the application was started with and what was activated since (see `activation.py`); with
    `settings.activate_newest`, an index of the same models that was finished later still. While one is refused, the one
    before it is served; a refusal is reported once, and the index is tried again, since models may not be copied yet or
    a disk may be full.
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
        """Load what is to be served, with the log applied.

        `model_versions`: of the encoder. `started`: what the application was started with, of `starting_pointer`;
        without it, the newest accepted index of these models. `require`: `gate.require`. Raises IndexRefusedError when
        nothing can be served.
        """
        self.workspace = workspace
        self._settings = settings
        self._model_versions = model_versions
        self._require: Require = require
        self._log = UpdateLog(workspace)
        self._activations = Activations(workspace)
        self._started = started
        self._built: dict[str, Pointer | None] = {}
        """Every finished index seen: when it was made, or None when it is of other models."""
        self._refused: dict[Pointer, tuple[str, Retry]] = {}
        """Indexes that could not be loaded: why, and when they are tried again, since that may take minutes and
        gigabytes."""
        self._changing = threading.Lock()
        """Held while the log is applied or written, and while the reference is switched."""
        self._switching = threading.Lock()
        """Held while another index is loaded, until it is switched to or refused."""
        self._stop = threading.Event()
        self._watcher: threading.Thread | None = None
        self.failed_polls = 0
        self.active = self._first()

    @property
    def service(self) -> SearchService:
        """Over the index that is active now."""
        return self.active.service

    @property
    def version(self) -> str:
        """Of that index."""
        return self.active.version

    @property
    def broken(self) -> dict[str, str]:
        """Files of the log that cannot be used, with the reasons."""
        return dict(self._log.broken)

    def activate(self, version: str) -> None:
        """Serve another index: load it beside, check it, apply the log, warm it, tell the other replicas, switch, drop
        the old one.

        Raises IndexNotFoundError or IndexRefusedError, and then the old one stays; SwitchUnderWay while another is
        being loaded; OSError when the storage fails.
        """
        check_name(version)
        if not self._switching.acquire(blocking=False):
            raise SwitchUnderWay
        try:
            replay = self._load(version)
            self._switch(replay, self._activations.append(version))
        finally:
            self._switching.release()

    def upsert(self, song_id: str, vectors: Vectors, metadata: Mapping[str, Any]) -> str:
        """Put a song in, or in place of the one of this id; gives the update's name.

        `vectors`: one row of unit norm, of this index's models; `metadata`: any columns of `schemas.INDEX_SONGS` but
        song_id; what is known of the others stays. When this returns, the update is durable and in every later answer
        here; the other replicas follow with their next poll.
        """
        index = self.service.index
        if len(vectors) != 1 or vectors.dim != index.dim or (vectors.preference is not None) != index.has_preference:
            raise ValueError(f"expected one row of vectors of {index.dim} dimensions, as the index has")
        with self._changing:
            self.active.replay.catch_up()
            return self._write(Update(song_id, vectors, self._model_versions, self._known(song_id) | dict(metadata)))

    def describe(self, song_id: str, metadata: Mapping[str, Any]) -> str:
        """Change what is said of a song, its vectors kept: the given columns; see `upsert`. Raises
        SongNotFoundError.
        """
        with self._changing:
            self.active.replay.catch_up()
            vectors = self.service.index.vectors_of([song_id])
            return self._write(Update(song_id, vectors, self._model_versions, self._known(song_id) | dict(metadata)))

    def remove(self, song_id: str) -> str:
        """Take a song out; see `upsert`. Raises SongNotFoundError."""
        with self._changing:
            self.active.replay.catch_up()
            if song_id not in self.service.index:
                raise SongNotFoundError(f"there is no song '{song_id}' in the index")
            return self._write(Update(song_id, None, {}, {}))

    def poll(self) -> None:
        """Apply what was added to the log, and switch when another index is to be served. Raises OSError when the
        storage fails.
        """
        with self._changing:
            self.active.replay.catch_up()
        if self._switching.acquire(blocking=False):
            try:
                self._follow()
            finally:
                self._switching.release()

    def start(self, after_poll: Callable[[], None] = lambda: None) -> None:
        """Poll every `settings.poll_seconds` in a thread, until `stop`; `after_poll` is called there each time."""
        self._watcher = threading.Thread(target=self._watch, args=(after_poll,), name="htcl-live-index", daemon=True)
        self._watcher.start()

    def stop(self) -> None:
        """End the thread."""
        self._stop.set()
        if self._watcher is not None:
            self._watcher.join(STOP_SECONDS)

    def _watch(self, after_poll: Callable[[], None]) -> None:
        while not self._stop.wait(self._settings.poll_seconds):
            try:
                self.poll()
            except Exception as error:  # whatever it is, the next poll may succeed, and what is served stays
                self.failed_polls += 1
                log.warning("looking for updates in %s failed and is tried again: %s", self.workspace.uri, error)
            after_poll()

    def _known(self, song_id: str) -> dict[str, Any]:
        """Columns of the index but song_id; none of a song that it does not hold."""
        index = self.service.index
        row = index.metadata_of(song_id) if song_id in index else {}
        return {name: value for name, value in row.items() if name != "song_id"}

    def _write(self, update: Update) -> str:
        file, row = self._log.append(update)
        self.active.replay.written(file, row)
        return row["name"][0].as_py()

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
                except Exception as error:  # whatever it is, a later try may succeed, and what is served stays
                    self._refuse(pointer, error)
                else:
                    self._refused.pop(pointer, None)
                    log.info("serving index %s", pointer.version)
                    return

    def _wanted(self) -> Iterator[Pointer]:
        """What to serve, best first."""
        for number, pointer in enumerate(self._chosen()):
            if number == 0 and self._settings.activate_newest:
                yield from self._built_after(pointer.built_through)
            yield pointer
        if self._started is None:
            yield from self._built_after("")

    def _chosen(self) -> Iterator[Pointer]:
        """What the application was started with and what was activated, the latest choice first."""
        started = self._started
        for pointer in self._activations.latest_first():
            if started is not None and started.order >= pointer.order:
                yield started
                started = None
            yield pointer
        if started is not None:
            yield started

    def _built_after(self, moment: str) -> list[Pointer]:
        """Finished indexes of these models, the newest first."""
        names = self.workspace.children("index")
        for name in names:
            if name not in self._built and (manifest := self._manifest(name)) is not None:
                same = manifest.get("model_versions") == self._model_versions
                created = str(manifest.get("created"))
                self._built[name] = Pointer(name, created, built_through=created) if same else None
        found = [
            pointer
            for name in names
            if (pointer := self._built.get(name)) is not None and pointer.built_through > moment
        ]
        return sorted(found, key=lambda pointer: pointer.built_through, reverse=True)

    def _manifest(self, name: str) -> dict[str, Any] | None:
        try:
            return self.workspace.manifest(f"index/{name}")
        except InputError:  # half-copied, damaged or of a newer format: whoever asks for it by name is told
            return None

    def _refuse(self, pointer: Pointer, error: Exception) -> None:
        before, retry = self._refused.get(pointer, (None, None))
        reason = str(error) or type(error).__name__
        self._refused[pointer] = reason, Retry.after(retry)
        if before != reason:
            log.warning("index %s is not served, and tried again later: %s", pointer.version, reason)


def _active(replay: Replay, pointer: Pointer) -> Active:
    return Active(pointer.version, SearchService(replay.index), pointer.activated_at, replay)
