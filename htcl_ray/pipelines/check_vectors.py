"""The songs on which a model's soundness is checked, from the workspace: their features, and their audio files read
anew.
"""

from __future__ import annotations

import numpy as np
import pyarrow.compute as pc
import pyarrow.dataset as pads

from htcl_ray.audio import decode
from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.errors import AudioError
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.task_result import Task
from htcl_ray.evaluation.vector_checks import soundness_tasks
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.storage import Workspace

CHECKED_SONGS = 16


def check_soundness(
    workspace: Workspace, features: Artifact, encoder: SongEncoder, songs: Songs, settings: EvaluateSettings
) -> list[Task]:
    """Collapse and determinism of the models, on up to 16 held-out songs drawn by `evaluate.seed`."""
    held_out = np.flatnonzero(songs.splits == settings.split)
    drawn = np.random.default_rng(settings.seed).permutation(held_out)[:CHECKED_SONGS]
    rows = np.sort(drawn)
    ids = [songs.ids[row] for row in rows]
    files = [
        workspace.full(f"{features.path}/{name}")
        for name in workspace.children(features.path)
        if name.endswith(".parquet")
    ]
    dataset = pads.dataset(files, filesystem=workspace.fs, format="parquet")
    table = dataset.to_table(
        columns=["song_id", "log_mel", "valid_frames", "audio_path"], filter=pc.field("song_id").isin(ids)
    )
    table = table.sort_by("song_id")
    mels = [
        mel[:frames].astype(np.float32)
        for mel, frames in zip(
            table["log_mel"].combine_chunks().to_numpy_ndarray(), table["valid_frames"].to_pylist(), strict=True
        )
    ]
    waveforms = [_waveform(path, encoder) for path in table["audio_path"].to_pylist()]
    texts = sorted({songs.texts[row] for row in held_out})
    return soundness_tasks(encoder, songs, mels, rows, texts, waveforms, settings.seed)


def _waveform(path: str, encoder: SongEncoder) -> np.ndarray | None:
    """None when the file can no longer be read: features outlive their audio."""
    try:
        return decode(path, encoder.recipe)
    except AudioError:
        return None
