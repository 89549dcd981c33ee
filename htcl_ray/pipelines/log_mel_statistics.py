"""What raw log-mels say of the songs without any model: the baseline that a trained encoder has to beat."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from htcl_ray.index.vectors import matrix_of
from htcl_ray.progress import Progress
from htcl_ray.schemas import FORMAT_VERSION, Split
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

SONGS_AT_ONCE = 64


def log_mel_statistics(workspace: Workspace, features: Artifact) -> np.ndarray:
    """float32 [songs, 2·mels], unit norm, in the order of song ids: mean and deviation of each mel band over a song's
    valid frames.

    Standardised over the training songs, then scaled to unit norm. Read from the features once and kept in
    `statistics/<features>`.
    """
    path = f"statistics/{features.version}"
    if workspace.manifest(path) is None:
        workspace.write_table(f"{path}/log_mel.parquet", _measure(workspace, features))
        workspace.finish(
            path, build_manifest("statistics", config={}, inputs={"features": features.version}, format=FORMAT_VERSION)
        )
    table = workspace.read_tables(path).sort_by("song_id")
    found = np.asarray(matrix_of(table["statistics"]), dtype=np.float32)
    training = found[np.array(table["split"].to_pylist()) == Split.TRAIN]
    if len(training):
        deviation = training.std(axis=0)
        found = (found - training.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return (found / np.where(norms > 0, norms, 1)).astype(np.float32)


def _measure(workspace: Workspace, features: Artifact) -> pa.Table:
    files = [
        workspace.full(f"{features.path}/{name}")
        for name in workspace.children(features.path)
        if name.endswith(".parquet")
    ]
    dataset = pads.dataset(files, filesystem=workspace.fs, format="parquet")
    columns, parts = ["song_id", "split", "log_mel", "valid_frames"], []
    with Progress("evaluate", dataset.count_rows(), "log-mels") as progress:
        for batch in dataset.to_batches(columns=columns, batch_size=SONGS_AT_ONCE):
            mels = batch["log_mel"].to_numpy_ndarray()
            rows = [
                np.concatenate(
                    [mel[:frames].mean(axis=0, dtype=np.float32), mel[:frames].astype(np.float32).std(axis=0)]
                )
                for mel, frames in zip(mels, batch["valid_frames"].to_pylist(), strict=True)
            ]
            statistics = [row.tolist() for row in rows]
            parts.append(pa.table({"song_id": batch["song_id"], "split": batch["split"], "statistics": statistics}))
            progress.advance(len(rows))
    return pa.concat_tables(parts)
