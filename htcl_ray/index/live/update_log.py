"""Log of the upserts and removals of songs since the indexes were built, shared by all indexes of a workspace.

`updates/` holds Arrow files with rows of `schemas.UPDATES`. A write adds a file of one row; `merge` combines files. A
row's `name` is `<20 digits: time in ns>-<8 hex digits: writer>`. For one song, the row with the greatest name wins, so
replay is idempotent and independent of the order and the files in which rows are read. A writer uses a name greater
than all names that it has read, so a write that starts after the response to another one wins whatever the clocks say.

A file's name ends with 16 digits of the SHA-256 of its bytes, so that damage is detected before parsing. `uploads/`
keeps the audio of upserted songs.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
import uuid
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.audio.formats import EXTENSIONS
from htcl_ray.errors import WorkspaceError
from htcl_ray.index.vectors import (
    ENCODER_DAMAGED,
    UNIT_NORM_TOLERANCE,
    ModelVersions,
    Vectors,
    check_unit_norm,
    matrix_of,
)
from htcl_ray.schemas import FORMAT_VERSION, UPDATES
from htcl_ray.workspace.storage import Workspace

FOLDER = "updates"
UPLOADS = "uploads"
UPSERT, REMOVE = "upsert", "remove"
READERS = 16
"""Files read in parallel; object storage takes tens of milliseconds for each."""
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 2.0, 300.0
_NAME = re.compile(r"\d{20}-[0-9a-f]{8}")
_FILE = re.compile(r"(\d{20}-[0-9a-f]{8}|merged)-([0-9a-f]{16})\.arrow")

Key = TypeVar("Key")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retry:
    """Time of the next attempt to read a file that may be half-copied, with exponential backoff."""

    delay: float
    """Seconds between this attempt and the one before."""
    until: float
    """Time of the attempt, of `time.monotonic()`."""

    @classmethod
    def after(cls, before: Retry | None) -> Retry:
        """The next attempt after one that failed now."""
        delay = FIRST_RETRY_SECONDS if before is None else min(2 * before.delay, LONGEST_RETRY_SECONDS)
        return cls(delay, time.monotonic() + delay)

    @property
    def due(self) -> bool:
        """Whether the time has come."""
        return time.monotonic() >= self.until


@dataclass(frozen=True)
class Update:
    """Upsert of one song with one row of vectors, or its removal (`vectors` is None)."""

    song_id: str
    vectors: Vectors | None
    model_versions: ModelVersions
    """Fingerprints of the models that made the vectors."""
    about: Mapping[str, Any]
    """Any columns of `schemas.INDEX_SONGS` except `song_id`."""


class UpdateLog:
    """Reader and writer of a workspace's log, safe to use from many threads, processes and machines."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.broken: dict[str, str] = {}
        """Unreadable files with the reason. Each is logged once, and retried with backoff while it exists."""
        self._retries: dict[str, Retry] = {}
        self._writer = uuid.uuid4().hex[:8]
        self._clock = 0
        self._lock = threading.Lock()

    def files(self) -> list[str]:
        """Names of the files to read, in any order."""
        names = set(self.workspace.children(FOLDER))
        for name in names:
            if not _FILE.fullmatch(name):
                self._report(name, "its name is not that of an update")
        self.broken = {name: reason for name, reason in self.broken.items() if name in names}
        self._retries = {name: retry for name, retry in self._retries.items() if name in names}
        return [
            name for name in names if name not in self.broken or (name in self._retries and self._retries[name].due)
        ]

    def append(self, update: Update) -> tuple[str, pa.Table]:
        """Write one update durably, and return the file's name and its row.

        Raises InputError for vectors that are not finite or not of unit norm.
        """
        if update.vectors is not None:
            check_unit_norm(update.vectors, lambda _: f"song '{update.song_id}'", ENCODER_DAMAGED)
        return self._write(_row(self._next_name(), update))

    def read(self, files: Collection[str]) -> tuple[pa.Table, set[str]]:
        """Rows of these files, and the names of the files that exist; the others were merged since they were listed.

        A damaged file has no rows; it is logged once and added to `broken`. Raises OSError when the storage fails.
        """
        with ThreadPoolExecutor(READERS) as pool:
            parts = dict(zip(files, pool.map(self._read_file, files), strict=True))
        tables = [table for table in parts.values() if table is not None]
        rows = pa.concat_tables([UPDATES.empty_table(), *tables]).combine_chunks()
        newest = pc.max(rows["name"]).as_py()
        if newest is not None:
            with self._lock:
                self._clock = max(self._clock, int(newest[:20]))
        return rows, {name for name, table in parts.items() if table is not None or name in self.broken}

    def read_all(self) -> tuple[pa.Table, set[str]]:
        """Rows and names of all files; complete even when another process merges files meanwhile."""
        while True:
            files = self.files()
            rows, present = self.read(files)
            if len(present) == len(files):
                return rows, present

    def merge(self) -> int:
        """Merge all effective rows into one file, delete the merged files, and return their number.

        Safe to interrupt, and safe to run concurrently with readers, writers and other merges: the new file is durable
        before any other is deleted, and reading rows twice is idempotent. Damaged files stay.
        """
        rows, files = self.read_all()
        files -= self.broken.keys()
        if len(files) < 2:
            return 0
        merged = self._write(_effective(rows), "merged")[0]
        for name in files - {merged}:
            try:
                self.workspace.fs.delete_file(self.workspace.full(f"{FOLDER}/{name}"))
            except FileNotFoundError:  # another merge was faster
                continue
        return len(files - {merged})

    def _next_name(self) -> str:
        with self._lock:
            self._clock = max(self._clock + 1, time.time_ns())
            return f"{self._clock:020d}-{self._writer}"

    def _write(self, rows: pa.Table, prefix: str | None = None) -> tuple[str, pa.Table]:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, UPDATES.with_metadata({"format_version": str(FORMAT_VERSION)})) as writer:
            writer.write_table(rows)
        data = sink.getvalue().to_pybytes()
        name = f"{prefix or rows['name'][0].as_py()}-{_checksum(data)}.arrow"
        self.workspace.write_bytes(f"{FOLDER}/{name}", data, durable=True)
        return name, rows

    def _read_file(self, name: str) -> pa.Table | None:
        """The file's rows, or None when it is missing or damaged."""
        path = f"{FOLDER}/{name}"
        try:
            data = self.workspace.read_bytes(path)
        except WorkspaceError:
            return None
        try:
            rows = _parse(name, data)
        except (ValueError, pa.ArrowException) as error:
            self._retries[name] = Retry.after(self._retries.get(name))
            self._report(name, str(error).splitlines()[0])
            return None
        self.broken.pop(name, None)
        return rows

    def _report(self, name: str, reason: str) -> None:
        if name not in self.broken:
            self.broken[name] = reason
            log.warning(
                "%s is not applied: %s; remove it, or restore it",
                self.workspace.uri_of(f"{FOLDER}/{name}"),
                reason,
            )


def latest(names: Iterable[str], keys: Iterable[Key]) -> dict[Key, int]:
    """Row of the greatest name of each key."""
    chosen: dict[Key, tuple[str, int]] = {}
    for row, (name, key) in enumerate(zip(names, keys, strict=True)):
        if key not in chosen or name > chosen[key][0]:
            chosen[key] = (name, row)
    return {key: row for key, (_, row) in chosen.items()}


def vectors_of(rows: pa.Table) -> Vectors:
    """Vectors of upserts, all of the same models."""
    preference = rows["preference"]
    return Vectors(matrix_of(rows["semantic"]), None if preference.null_count else matrix_of(preference))


def _row(name: str, update: Update) -> pa.Table:
    halves = (None, None) if update.vectors is None else (update.vectors.semantic, update.vectors.preference)
    upsert = update.vectors is not None
    columns = {
        "name": name,
        "op": UPSERT if upsert else REMOVE,
        "song_id": update.song_id,
        "semantic": None if halves[0] is None else halves[0][0],
        "preference": None if halves[1] is None else halves[1][0],
        "semantic_model": update.model_versions.get("semantic") if upsert else None,
        "preference_model": update.model_versions.get("preference") if upsert else None,
        **update.about,
    }
    return pa.table({field.name: pa.array([columns.get(field.name)], field.type) for field in UPDATES}, schema=UPDATES)


def _parse(name: str, data: bytes) -> pa.Table:
    """Rows of a file. Raises ValueError when the file is not one that `UpdateLog` writes."""
    match = _FILE.fullmatch(name)
    if match is None or match[2] != _checksum(data):
        raise ValueError(f"its SHA-256 begins with {_checksum(data)}, but its name says otherwise")
    with pa.ipc.open_file(pa.BufferReader(data)) as reader:
        version = int((reader.schema.metadata or {}).get(b"format_version", b"0"))
        if not 0 < version <= FORMAT_VERSION:
            raise ValueError(f"it has format version {version}, but this htcl-ray reads up to {FORMAT_VERSION}")
        rows = reader.read_all().replace_schema_metadata(None)
    if not rows.schema.equals(UPDATES):
        raise ValueError("its columns are not those of an update")
    if not all(_NAME.fullmatch(row or "") for row in rows["name"].to_pylist()):
        raise ValueError("a row's name is not that of an update")
    upserts = rows.filter(pc.equal(rows["op"], UPSERT))
    if upserts.num_rows + pc.sum(pc.equal(rows["op"], REMOVE)).as_py() != rows.num_rows or rows["song_id"].null_count:
        raise ValueError("a row is neither an upsert nor a removal of a song")
    for half in ("semantic", "preference"):
        given = upserts[half].drop_null()
        if half == "semantic" and len(given) < len(upserts):
            raise ValueError("an upsert has no semantic vector")
        if not (np.abs(_norms(given) - 1) < UNIT_NORM_TOLERANCE).all():
            raise ValueError(f"a {half} vector is not of unit norm")
    return rows


def _norms(vectors: pa.ChunkedArray) -> np.ndarray:
    """Norm of each of n lists of numbers, [n]; nan when a list is empty or not finite."""
    counts = pc.list_value_length(vectors).to_numpy()
    if not counts.all():
        return np.full(len(counts), np.nan)
    numbers = vectors.combine_chunks().flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int64)
    return np.sqrt(np.add.reduceat(numbers**2, starts)) if len(counts) else np.empty(0)


def _effective(rows: pa.Table) -> pa.Table:
    """The last removal of each song, and its last upsert for each pair of models unless the removal is later.

    Rows are sorted by name.
    """
    names = rows["name"].to_pylist()
    songs, ops, semantic, preference = (
        rows[name].to_pylist() for name in ("song_id", "op", "semantic_model", "preference_model")
    )
    kept = latest(names, zip(songs, ops, semantic, preference, strict=True)).values()
    removed = {songs[row]: names[row] for row in kept if ops[row] == REMOVE}
    chosen = [row for row in kept if ops[row] == REMOVE or names[row] > removed.get(songs[row], "")]
    return rows.take(sorted(chosen, key=names.__getitem__)).combine_chunks()


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def store_upload(workspace: Workspace, data: bytes, file_name: str | None) -> str:
    """Keep the audio of an upserted song, so that another model can embed it later, and return its URI.

    The same bytes are stored once per extension. Nothing of the client's file name becomes part of the path but the
    extension, if it is one of an audio format.
    """
    extension = PurePath(file_name or "").suffix.lower()
    path = f"{UPLOADS}/{hashlib.sha256(data).hexdigest()}{extension if extension in EXTENSIONS else ''}"
    if not workspace.exists(path):
        workspace.write_bytes(path, data, durable=True)
    return workspace.location_of(path)
