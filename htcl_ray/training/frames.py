"""Random access to log-mels: one uncompressed memory-mapped file a machine, made once from the feature shards.

Shards are compressed for storage and transport; a training batch wants songs in any order. Only the valid frames are kept.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from htcl_ray.errors import WorkspaceError
from htcl_ray.storage import Workspace, fingerprint
from htcl_ray.training.songs import Rows, Songs

FRAMES, OFFSETS = "frames.f16", "offsets.npy"


class Frames:
    """Log-mels by song number."""

    def __init__(self, folder: Path, n_mels: int) -> None:
        self.offsets: npt.NDArray[np.int64] = np.load(folder / OFFSETS)
        self.data: npt.NDArray[np.float16] = np.memmap(folder / FRAMES, dtype=np.float16, mode="r").reshape(-1, n_mels)

    def lengths(self, songs: Rows) -> Rows:
        """Frames of songs, [n]."""
        starts, stops = self.offsets[songs].T
        return stops - starts

    def batch(self, songs: Rows, parts: Rows | None = None) -> tuple[npt.NDArray[np.float16], Rows]:
        """Log-mels of songs, [n, longest, n_mels] fp16 in dB with zeros behind each, and their frames [n].

        `parts` [n, 2]: first frame and end of what is read of each song; None reads songs whole.
        """
        starts, stops = self.offsets[songs].T
        if parts is not None:
            starts, stops = starts + parts[:, 0], starts + parts[:, 1]
        mel = np.zeros((len(songs), int((stops - starts).max()), self.data.shape[1]), dtype=np.float16)
        for row, (start, stop) in enumerate(zip(starts, stops, strict=True)):
            mel[row, : stop - start] = self.data[start:stop]
        return mel, stops - starts


def open_frames(workspace: Workspace, path: str, manifest: Mapping[str, Any], songs: Songs) -> Frames:
    """The frames of a features artifact; `songs` are the artifact's. The first process of a machine makes the file, others wait.

    It lies in the system's directory for temporary files (TMPDIR); what it holds is there again whenever it is deleted.
    """
    root = Path(tempfile.gettempdir()) / f"htcl-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    folder = root / f"frames-{fingerprint(workspace.uri, path, manifest['created'])}"
    with open(folder.with_suffix(".lock"), "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            beside = folder.with_suffix(".new")
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir()
            _write(workspace, path, songs, beside)
            beside.rename(folder)
    return Frames(folder, manifest["config"]["audio"]["n_mels"])


def _write(workspace: Workspace, path: str, songs: Songs, folder: Path) -> None:
    number = {song_id: row for row, song_id in enumerate(songs.song_ids)}
    offsets = np.zeros((len(number), 2), dtype=np.int64)
    written = 0
    with open(folder / FRAMES, "wb") as out:
        for name in workspace.children(path):
            if not name.endswith(".parquet"):
                continue
            with workspace.fs.open_input_file(workspace.full(f"{path}/{name}")) as source:
                table = pq.read_table(source, columns=["song_id", "log_mel", "valid_frames"])
            mels = table["log_mel"].combine_chunks().to_numpy_ndarray() if len(table) else ()
            for song_id, mel, valid in zip(table["song_id"].to_pylist(), mels, table["valid_frames"].to_pylist(), strict=True):
                row = number.get(song_id)
                if row is None:
                    continue
                out.write(np.ascontiguousarray(mel[:valid], dtype=np.float16).tobytes())
                offsets[row] = written, written + valid
                written += valid
    absent = int((offsets[:, 1] == 0).sum())
    if absent:
        raise WorkspaceError(f"{workspace.uri_of(path)} changed while it was read: {absent} songs are missing; run 'htcl preprocess' again")
    np.save(folder / OFFSETS, offsets)
