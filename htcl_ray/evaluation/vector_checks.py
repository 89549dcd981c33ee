"""Checks of the model itself: collapse of its vectors, and determinism of its encoders.

Differences are the largest absolute difference of any coordinate of the unit-norm vectors of any clip, so they have no
interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.stats.collapse import effective_rank, mean_cosine
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.workspace.manifest import fingerprint

if TYPE_CHECKING:
    from htcl_ray.index.vectors import Vectors
    from htcl_ray.search.encoder import SongEncoder

LONGER = 64
"""Frames by which the neighbour of a padded clip exceeds the longest clip: eight tokens of padding for the clip."""
PADDING_DB = 30.0
"""Mean and standard deviation of the noise that replaces padding: far louder than music."""

Spaces = dict[str, np.ndarray]


def vector_check_tasks(
    encoder: SongEncoder,
    songs: EvaluatedSongs,
    mels: Sequence[np.ndarray],
    mel_rows: np.ndarray,
    texts: Sequence[str],
    waveforms: Sequence[np.ndarray | None],
    seed: int,
) -> list[TaskResult]:
    """Tasks `collapse` and `determinism` of the semantic space and, with stage 2, of the preference space.

    `mels`: stored log-mels of some held-out songs, each [valid frames, n_mels] in dB; `mel_rows`: int [len(mels)],
    their rows in `songs`; `waveforms`: their current audio files, each [samples] at the rate of the model, None where a
    file can no longer be read; `texts`: the unique texts of the held-out songs; `seed`: of the noise that replaces
    padding.
    """
    clips = [(songs.ids[row], waveform is not None) for row, waveform in zip(mel_rows, waveforms, strict=True)]
    held_out = np.flatnonzero(np.isin(songs.splits, songs.splits[mel_rows]))
    population = fingerprint(clips, [songs.ids[row] for row in held_out], list(texts), seed)
    tasks = (_collapse(encoder, songs, held_out, texts), _determinism(encoder, songs, mels, mel_rows, waveforms, seed))
    return [
        replace(
            task,
            methods={
                space: {name: replace(item, population=population) for name, item in metrics.items()}
                for space, metrics in task.methods.items()
            },
        )
        for task in tasks
    ]


def index_task(manifest: Mapping[str, Any]) -> TaskResult:
    """Task `index`: recall@10 of the index of this manifest against exact search, at its worst blend."""
    recall = Estimate(float(manifest["quality"]["recall_at_10"]), int(manifest["songs"]))
    return TaskResult("index", "index", "songs", "nothing", None, {"index": {"recall@10": recall}})


def _collapse(encoder: SongEncoder, songs: EvaluatedSongs, held_out: np.ndarray, texts: Sequence[str]) -> TaskResult:
    """Collapse of the held-out songs, one of each duplicate group, and of the texts."""
    _, first = np.unique([songs.duplicate_groups[row] for row in held_out], return_index=True)
    text_vectors = _spaces(encoder.encode_texts(texts)) if texts else {}
    methods = {}
    for space in _names(songs):
        methods[space] = {
            **_spread("audio", songs.spaces[space][held_out[first]]),
            **_spread("text", text_vectors.get(space, np.empty((0, 1)))),
        }
    return TaskResult(
        "collapse", "collapse", "songs or texts", "nothing", None, methods, {"songs": len(first), "texts": len(texts)}
    )


def _spread(kind: str, vectors: np.ndarray) -> dict[str, Estimate]:
    if len(vectors) < 2:
        return {}
    metrics = {"mean_cosine": mean_cosine(vectors), "effective_rank": effective_rank(vectors)}
    return {f"{kind}_{name}": Estimate(value, len(vectors)) for name, value in metrics.items()}


def _determinism(
    encoder: SongEncoder,
    songs: EvaluatedSongs,
    mels: Sequence[np.ndarray],
    mel_rows: np.ndarray,
    waveforms: Sequence[np.ndarray | None],
    seed: int,
) -> TaskResult:
    """The largest differences in each space.

    `repeat_difference`: two encodings of the same batch. `batch_difference`: each clip alone and all in one batch.
    `padding_difference`: each clip alone and next to a longer neighbour, with loud noise in its padding.
    `stored_difference`: the stored log-mels encoded again and the stored vectors; both are computed from the same
    numbers. `from_audio_difference`: the audio files, read again with the audio settings of the model, and the stored
    vectors. It is not 0 for a correct model, because log-mels are stored with 11 significant bits: 0.001 to 0.015 with
    small untrained models, and 0.2 to 1.3 when n_fft, hop_length or top_db differ.
    """
    alone = _stack([_spaces(encoder.encode_songs([mel])) for mel in mels])
    together = _spaces(encoder.encode_songs(mels))
    again = _spaces(encoder.encode_songs(mels))
    padded = _padded(encoder, mels, seed)
    readable = [i for i, waveform in enumerate(waveforms) if waveform is not None]
    given = [waveform for waveform in waveforms if waveform is not None]
    reread = encoder.audio_features(given) if given else []
    from_audio = _spaces(encoder.encode_songs(reread)) if reread else {}
    methods = {}
    for space in _names(songs):
        stored = songs.spaces[space][mel_rows]
        metrics = {
            "repeat_difference": _largest(together[space], again[space]),
            "batch_difference": _largest(together[space], alone[space]),
            "padding_difference": _largest(padded[space], alone[space]),
            "stored_difference": _largest(together[space], stored),
        }
        if reread:
            metrics["from_audio_difference"] = _largest(from_audio[space], stored[readable])
        methods[space] = metrics
    counts = {"clips": len(mels), "unreadable_files": len(mels) - len(readable)}
    return TaskResult("determinism", "determinism", "clips", "nothing", None, methods, counts)


def _padded(encoder: SongEncoder, mels: Sequence[np.ndarray], seed: int) -> Spaces:
    """Vectors of each clip in a batch with a longer neighbour; [clips, dim] in each space."""
    longest = max(mels, key=len)
    neighbour = np.resize(longest, (len(longest) + LONGER, longest.shape[1]))
    rng = np.random.default_rng(seed)
    rows = []
    for mel in mels:
        batch = rng.normal(PADDING_DB, PADDING_DB, size=(2, 2 * len(neighbour), neighbour.shape[1])).astype(np.float32)
        batch[0, : len(mel)] = mel
        batch[1, : len(neighbour)] = neighbour
        vectors = _spaces(encoder.encode_features(batch, np.array([len(mel), len(neighbour)])))
        rows.append({space: both[:1] for space, both in vectors.items()})
    return _stack(rows)


def _names(songs: EvaluatedSongs) -> list[str]:
    return [space for space in ("semantic", "preference") if space in songs.spaces]


def _spaces(vectors: Vectors) -> Spaces:
    both = {"semantic": vectors.semantic, "preference": vectors.preference}
    return {space: rows for space, rows in both.items() if rows is not None}


def _stack(rows: Sequence[Spaces]) -> Spaces:
    return {space: np.concatenate([row[space] for row in rows]) for space in rows[0]}


def _largest(first: np.ndarray, second: np.ndarray) -> Estimate:
    return Estimate(float(np.abs(first - second).max()), len(first))
