"""Sizes and modification times of audio files, from file systems and bucket listings, without opening the files."""

from __future__ import annotations

import errno
import os
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from htcl_ray.errors import WorkspaceError
from htcl_ray.schemas import Reason
from htcl_ray.workspace.filesystem import (
    SUPPORTED,
    explain,
    list_folder,
    open_filesystem,
    split_options,
    storage_errors,
)
from htcl_ray.workspace.paths import is_uri, local_path

MISSING, DENIED, UNSUPPORTED = -1, -2, -3
UNUSABLE = {
    MISSING: (Reason.AUDIO_NOT_FOUND, "{} does not exist"),
    DENIED: (Reason.ACCESS_DENIED, "access denied to {}"),
    UNSUPPORTED: (Reason.UNSUPPORTED_URI, f"{{}} cannot be opened; expected {SUPPORTED}"),
    0: (Reason.AUDIO_EMPTY, "{} is empty (0 bytes)"),
}
"""Size that marks an unusable file → its reason and its detail, with {} for the path, in the quarantine table."""
NO_SUCH_FILE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
THREADS = 16


def sizes_and_times(paths: Sequence[str]) -> npt.NDArray[np.int64]:
    """Look up size in bytes and modification time in ns of each path or URI, int64 [paths, 2].

    MISSING, DENIED or UNSUPPORTED stand in place of the size. Local files are looked up one by one; each folder of an
    object store is listed once. Raises AccessDeniedError when listing a folder is denied and StorageError when storage
    fails otherwise, which are no properties of a song.
    """
    sizes = np.full((len(paths), 2), MISSING, dtype=np.int64)
    local: list[tuple[int, str]] = []
    by_folder: dict[str, dict[int, str]] = {}
    for i, path in enumerate(paths):
        try:
            on_disk = local_path(path)
        except WorkspaceError:
            sizes[i, 0] = UNSUPPORTED
            continue
        if on_disk is not None:
            local.append((i, on_disk))
            continue
        bare, options = split_options(path)
        folder, _, name = bare.rpartition("/")
        if is_uri(folder):  # otherwise the URI is a bucket without a key
            by_folder.setdefault(folder + options, {})[i] = urllib.parse.unquote(name)
    pieces = [local[start : start + 1000] for start in range(0, len(local), 1000)]
    pool = ThreadPoolExecutor(THREADS)
    try:
        for piece, rows in zip(pieces, pool.map(lambda piece: [_stat(path) for _, path in piece], pieces), strict=True):
            sizes[[i for i, _ in piece]] = rows
        for songs, listing in zip(by_folder.values(), pool.map(_list, by_folder), strict=True):
            for i, name in songs.items():
                sizes[i] = (UNSUPPORTED, MISSING) if listing is None else listing.get(name, (MISSING, MISSING))
    finally:
        pool.shutdown(cancel_futures=True)
    return sizes


def _stat(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
        readable = os.access(path, os.R_OK, effective_ids=True)
    except OSError as error:
        if error.errno in NO_SUCH_FILE:
            return MISSING, MISSING
        if isinstance(error, PermissionError):
            return DENIED, MISSING
        raise explain(error, path) from None
    except ValueError:  # a null character
        return MISSING, MISSING
    return stat.st_size if readable else DENIED, stat.st_mtime_ns


def _list(folder: str) -> dict[str, tuple[int, int]] | None:
    """List (size, time) by name of the files directly in a folder of an object store; None for an unsupported URI."""
    try:
        filesystem, inner = open_filesystem(folder)
    except WorkspaceError:
        return None
    with storage_errors(folder):
        infos = list_folder(filesystem, inner)
    return {info.base_name: (info.size, info.mtime_ns or 0) for info in infos if info.type == pafs.FileType.File}
