"""Random access to features: one uncompressed, memory-mapped file per machine, written from the feature shards.

Shards are compressed for storage and transport, but a training batch needs songs in any order. Only valid frames are
kept. The file is in this user's private folder below the directory for temporary files (TMPDIR). Every process that
uses it holds a shared lock, which ends with the process, so a file without a lock belongs to no run: the last user
removes it, and the next run removes the files of killed ones.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from htcl_ray.errors import StepError, WorkspaceError
from htcl_ray.extractors.families import feature_width
from htcl_ray.training.song_numbers import Rows, Songs
from htcl_ray.workspace.local_copies import identity, lock_folder, private_folder
from htcl_ray.workspace.manifest import fingerprint
from htcl_ray.workspace.storage import Workspace

FRAMES, OFFSETS, WHOLE = "frames.f16", "offsets.npy", "whole.json"
"""WHOLE, the identity of the two finished files, is written last: a folder without it is unfinished."""
BYTES = 2
"""Size of a float16."""
SECONDS_TO_AGREE = 60.0
"""Longest time that a process tries to become the one that writes a missing file."""


class Frames:
    """Features by song number. Close it when training ends."""

    def __init__(self, folder: Path, width: int, lock: int = -1) -> None:
        """Open the files in `folder`, whose frames are vectors of `width` numbers.

        `lock`: descriptor of the folder's shared lock, held until `close`; -1: the folder is the caller's.
        """
        self.folder, self.width, self.lock = folder, width, lock
        self.offsets: npt.NDArray[np.int64] = np.load(folder / OFFSETS)
        self.data: npt.NDArray[np.float16] = np.memmap(folder / FRAMES, dtype=np.float16, mode="r").reshape(-1, width)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file; it is removed when no process uses it."""
        if self.lock >= 0:
            os.close(self.lock)
            self.lock = -1
            _remove_unused(self.folder)

    def lengths(self, songs: Rows) -> Rows:
        """Number of frames of songs, [n]."""
        starts, stops = self.offsets[songs].T
        frames: Rows = stops - starts
        return frames

    def batch(self, songs: Rows, parts: Rows | None = None) -> tuple[npt.NDArray[np.float16], Rows]:
        """Read features of songs, [n, longest, width] fp16, padded with zeros, and their numbers of frames [n].

        `parts` [n, 2]: first frame and end of the part of each song to read; None reads whole songs.
        """
        starts, stops = self.offsets[songs].T
        if parts is not None:
            starts, stops = starts + parts[:, 0], starts + parts[:, 1]
        features = np.zeros((len(songs), int((stops - starts).max()), self.width), dtype=np.float16)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            features[row, : stop - start] = self.data[start:stop]
        return features, stops - starts


def open_frames(workspace: Workspace, path: str, manifest: Mapping[str, Any], songs: Songs) -> Frames:
    """Open the frames of a features artifact, whose songs are `songs`; the first process of a machine writes the file.

    Other processes wait. A partial copy of an interrupted process is completed, and files that no process uses are
    removed. Raises StepError when the disk has too little space.
    """
    root = private_folder()
    folder = root / f"frames-{fingerprint(workspace.uri, path, manifest['created'])}"
    width = feature_width(manifest)
    for other in {path.with_suffix("") for path in root.glob("frames-*")} - {folder}:
        _remove_unused(other)
    tried_since = time.monotonic()
    while True:
        shared = lock_folder(folder, fcntl.LOCK_SH)  # waits for a process that writes
        assert shared is not None
        if _is_whole(folder):
            return Frames(folder, width, shared)
        os.close(shared)
        exclusive = lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if exclusive is None:  # another process looks at it, or is about to write
            if time.monotonic() - tried_since > SECONDS_TO_AGREE:
                raise StepError(
                    f"{folder} is damaged while another run uses it; expected all of its files: "
                    "try again when that run has ended"
                )
            time.sleep(0.05)
            continue
        try:
            if not _is_whole(folder):
                _write(workspace, path, songs, folder, width)
        finally:
            os.close(exclusive)


def _remove_unused(folder: Path) -> None:
    """Remove a folder and its lock unless a process holds it."""
    lock = lock_folder(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if lock is None:
        return
    try:
        (folder / WHOLE).unlink(missing_ok=True)  # first, so that half a folder is never taken for a whole one
        shutil.rmtree(folder, ignore_errors=True)
        folder.with_suffix(".lock").unlink(missing_ok=True)
    finally:
        os.close(lock)


def _is_whole(folder: Path) -> bool:
    """Whether both files are still the finished ones: cleaners of temporary directories remove old files singly."""
    try:
        return bool(json.loads((folder / WHOLE).read_text()) == [identity(folder / name) for name in (FRAMES, OFFSETS)])
    except (OSError, ValueError):
        return False


def _write(workspace: Workspace, path: str, songs: Songs, folder: Path, width: int) -> None:
    """Copy the songs' valid frames in the order of the shards, after those that an interrupted process has copied."""
    number = {song_id: row for row, song_id in enumerate(songs.song_ids)}
    table = workspace.read_tables(path, ["song_id", "valid_frames", "__filename"])
    rows = np.array([number.get(song_id, -1) for song_id in table["song_id"].to_pylist()], dtype=np.int64)
    ends = np.cumsum(np.where(rows >= 0, table["valid_frames"].to_numpy(), 0))
    offsets = np.zeros((len(number), 2), dtype=np.int64)
    offsets[rows[rows >= 0]] = np.stack([np.append(0, ends[:-1]), ends], axis=1)[rows >= 0]
    if not offsets[:, 1].all():
        raise _changed(workspace, path, f"{(offsets[:, 1] == 0).sum()} songs are missing")
    folder.mkdir(exist_ok=True)
    if (folder / WHOLE).exists():  # files that were finished and then changed, so nothing in them is trusted
        for name in (WHOLE, OFFSETS, FRAMES):
            (folder / name).unlink(missing_ok=True)
    frame, copied = width * BYTES, 0
    try:
        with open(folder / FRAMES, "ab") as out:
            complete = out.tell() // frame
            copied = int(ends[ends <= complete].max(initial=0))
            out.truncate(copied * frame)
            free, needed = shutil.disk_usage(folder).free, (int(ends[-1]) - copied) * frame
            if free < needed:
                raise _no_room(folder, len(number), needed, free)
            shards = table["__filename"].combine_chunks().dictionary_encode()
            first = np.searchsorted(shards.indices.to_numpy(), np.arange(len(shards.dictionary) + 1))
            for shard, start, stop in zip(shards.dictionary.to_pylist(), first[:-1], first[1:], strict=True):
                if ends[stop - 1] > copied:
                    copied = _append(workspace, shard, out, rows[start:stop] >= 0, ends[start:stop], copied)
                    if copied != ends[stop - 1]:
                        raise _changed(
                            workspace,
                            path,
                            f"up to the end of {shard} it has {copied} frames instead of {ends[stop - 1]}",
                        )
        np.save(folder / OFFSETS, offsets)
        identities = [identity(folder / name) for name in (FRAMES, OFFSETS)]
        (folder / f"unfinished-{WHOLE}").write_text(json.dumps(identities))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        needed = int(ends[-1]) * frame
        shutil.rmtree(folder, ignore_errors=True)
        raise _no_room(folder, len(number), needed, shutil.disk_usage(folder.parent).free) from None
    os.replace(folder / f"unfinished-{WHOLE}", folder / WHOLE)


def _append(workspace: Workspace, file: str, out: Any, wanted: npt.NDArray[np.bool_], ends: Rows, copied: int) -> int:
    """Append the wanted songs of a shard that are not copied yet; returns the number of frames that are then copied."""
    with workspace.fs.open_input_file(file) as source:
        table = pq.read_table(source, columns=["features", "valid_frames"])
    features = table["features"].combine_chunks().to_numpy_ndarray() if len(table) else ()
    for frames, valid, chosen, end in zip(features, table["valid_frames"].to_pylist(), wanted, ends, strict=True):
        if chosen and end > copied:
            out.write(np.ascontiguousarray(frames[:valid], dtype=np.float16).tobytes())
            copied += valid
    return copied


def _changed(workspace: Workspace, path: str, what: str) -> WorkspaceError:
    return WorkspaceError(f"{workspace.uri_of(path)} changed while it was read: {what}; run 'htcl preprocess' again")


def _no_room(folder: Path, songs: int, needed: int, free: int) -> StepError:
    return StepError(
        f"the features of {songs} songs need {needed:,} bytes in {folder.parent} on {platform.node()}, "
        f"where {free:,} are free; free some space, or set the environment variable TMPDIR to a folder on a larger "
        "disk before Ray starts on that machine (on a private cluster, before this command)"
    )
