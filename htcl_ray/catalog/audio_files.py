"""What the audio files look like from outside, before any is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import pyarrow.fs as pafs

from htcl_ray.errors import WorkspaceError
from htcl_ray.storage import open_filesystem

MISSING = -1
THREADS = 16


def sizes_and_times(paths: Sequence[str]) -> npt.NDArray[np.int64]:
    """Size in bytes (MISSING where there is no such file) and modification time in ns of each path or URI, int64 [paths, 2].

    Local files are asked one by one, remote ones by listing each folder once.
    """
    found = np.full((len(paths), 2), MISSING, dtype=np.int64)
    local = [i for i, path in enumerate(paths) if "://" not in path]
    by_folder: dict[str, list[int]] = {}
    for i, path in enumerate(paths):
        if "://" in path:
            by_folder.setdefault(path.rpartition("/")[0], []).append(i)
    with ThreadPoolExecutor(THREADS) as pool:
        pieces = [local[start : start + 1000] for start in range(0, len(local), 1000)]
        for piece, rows in zip(pieces, pool.map(lambda piece: [_stat(paths[i]) for i in piece], pieces), strict=True):
            found[piece] = rows
        for indices, listing in zip(by_folder.values(), pool.map(_list, by_folder), strict=True):
            for i in indices:
                found[i] = listing.get(paths[i].rpartition("/")[2], (MISSING, MISSING))
    return found


def _stat(path: str) -> tuple[int, int]:
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        return MISSING, MISSING
    return stat.st_size, stat.st_mtime_ns


def _list(folder: str) -> dict[str, tuple[int, int]]:
    """Size and time by name of the files directly in a remote folder."""
    try:
        filesystem, inner = open_filesystem(folder)
        infos = filesystem.get_file_info(pafs.FileSelector(inner, allow_not_found=True))
    except (OSError, WorkspaceError):
        return {}
    return {info.base_name: (info.size, info.mtime_ns or 0) for info in infos if info.type == pafs.FileType.File}
