"""Checks of the model itself: whether its vectors have collapsed, and whether the same sound always gives the same
vector.

The differences are the largest absolute difference of any coordinate of any clip's unit-norm vectors, so they have no
interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.stats.collapse import effective_rank, mean_cosine
from htcl_ray.evaluation.task_result import Task
from htcl_ray.workspace.manifest import fingerprint

if TYPE_CHECKING:
    from htcl_ray.index.vectors import Vectors
    from htcl_ray.search.encoder import SongEncoder

LONGER = 64
"""Frames by which the neighbour of a padded clip is longer than the longest clip: eight tokens, all of them padding to
the clip."""
PADDING_DB = 30.0
"""Deviation of the noise that stands where padding is, and its mean: far louder than music."""

Spaces = dict[str, np.ndarray]


def soundness_tasks(
    encoder: SongEncoder,
    songs: Songs,
    mels: Sequence[np.ndarray],
    mel_rows: np.ndarray,
    texts: Sequence[str],
    waveforms: Sequence[np.ndarray | None],
    seed: int,
) -> list[Task]:
    """Tasks `collapse` and `determinism` of the semantic space and, with stage 2, of the preference space.

    `mels`: stored log-mels of some held-out songs, each [valid frames, n_mels] in dB; `mel_rows`: int [len(mels)],
    their rows in `songs`; `waveforms`: what their audio files hold now, each [samples] at the model's rate, None where
    a file can no longer be read; `texts`: the unique texts of the held-out songs; `seed`: of the noise that is put
    where padding is.
    """
    clips = [(songs.ids[row], waveform is not None) for row, waveform in zip(mel_rows, waveforms, strict=True)]
    held_out = np.flatnonzero(np.isin(songs.splits, songs.splits[mel_rows]))
    asked = fingerprint(clips, [songs.ids[row] for row in held_out], list(texts), seed)
    tasks = (_collapse(encoder, songs, held_out, texts), _determinism(encoder, songs, mels, mel_rows, waveforms, seed))
    return [
        replace(
            task,
            methods={
                space: {name: replace(found, population=asked) for name, found in of.items()}
                for space, of in task.methods.items()
            },
        )
        for task in tasks
    ]


def index_task(manifest: Mapping[str, Any]) -> Task:
    """Task `index`: share of the 10 best songs of exact search that the index of this manifest finds, at its worst
    blend.
    """
    recall = Estimate(float(manifest["quality"]["recall_at_10"]), int(manifest["songs"]))
    return Task("index", "index", "songs", "nothing", None, {"index": {"recall@10": recall}})


def _collapse(encoder: SongEncoder, songs: Songs, held_out: np.ndarray, texts: Sequence[str]) -> Task:
    """Over the held-out songs, one of each duplicate group, and over the texts."""
    _, first = np.unique([songs.duplicate_groups[row] for row in held_out], return_index=True)
    words = _spaces(encoder.encode_texts(texts)) if texts else {}
    methods = {}
    for space in _names(songs):
        methods[space] = {
            **_spread("audio", songs.spaces[space][held_out[first]]),
            **_spread("text", words.get(space, np.empty((0, 1)))),
        }
    return Task(
        "collapse", "collapse", "songs or texts", "nothing", None, methods, {"songs": len(first), "texts": len(texts)}
    )


def _spread(kind: str, vectors: np.ndarray) -> dict[str, Estimate]:
    if len(vectors) < 2:
        return {}
    found = {"mean_cosine": mean_cosine(vectors), "effective_rank": effective_rank(vectors)}
    return {f"{kind}_{name}": Estimate(value, len(vectors)) for name, value in found.items()}


def _determinism(
    encoder: SongEncoder,
    songs: Songs,
    mels: Sequence[np.ndarray],
    mel_rows: np.ndarray,
    waveforms: Sequence[np.ndarray | None],
    seed: int,
) -> Task:
    """The figures of each space.

    `repeat_difference`: two encodings of the same batch. `batch_difference`: each clip alone and all in one batch.
    `padding_difference`: each clip alone and beside a longer neighbour, with loud noise where its padding is.
    `stored_difference`: the stored log-mels encoded again and the stored vectors; both are computed from the same
    numbers. `from_audio_difference`: the same from the audio file by the model's own recipe. It is not 0 for a sound
    model, because log-mels are stored with 11 significant bits: 0.001 to 0.015 with small untrained models, and 0.2 to
    1.3 when n_fft, hop_length or top_db were others.
    """
    alone = _stack([_spaces(encoder.encode_mels([mel])) for mel in mels])
    together = _spaces(encoder.encode_mels(mels))
    again = _spaces(encoder.encode_mels(mels))
    padded = _padded(encoder, mels, seed)
    heard = [i for i, waveform in enumerate(waveforms) if waveform is not None]
    anew = _log_mels(encoder, [waveform for waveform in waveforms if waveform is not None])
    from_audio = _spaces(encoder.encode_mels(anew)) if anew else {}
    methods = {}
    for space in _names(songs):
        stored = songs.spaces[space][mel_rows]
        figures = {
            "repeat_difference": _largest(together[space], again[space]),
            "batch_difference": _largest(together[space], alone[space]),
            "padding_difference": _largest(padded[space], alone[space]),
            "stored_difference": _largest(together[space], stored),
        }
        if anew:
            figures["from_audio_difference"] = _largest(from_audio[space], stored[heard])
        methods[space] = figures
    counts = {"clips": len(mels), "unreadable_files": len(mels) - len(heard)}
    return Task("determinism", "determinism", "clips", "nothing", None, methods, counts)


def _log_mels(encoder: SongEncoder, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-mels [frames, n_mels] of waveforms, as preprocessing makes them."""
    if not waveforms:
        return []
    from htcl_ray.audio import log_mel  # audio libraries, which stored log-mels do not need

    recipe = encoder.recipe
    return [log_mel(waveform, recipe.sample_rate, recipe)[: recipe.max_frames] for waveform in waveforms]


def _padded(encoder: SongEncoder, mels: Sequence[np.ndarray], seed: int) -> Spaces:
    """Each clip's vectors beside a longer neighbour: [clips, dim] a space."""
    longest = max(mels, key=len)
    neighbour = np.resize(longest, (len(longest) + LONGER, longest.shape[1]))
    rng = np.random.default_rng(seed)
    rows = []
    for mel in mels:
        batch = rng.normal(PADDING_DB, PADDING_DB, size=(2, 2 * len(neighbour), neighbour.shape[1])).astype(np.float32)
        batch[0, : len(mel)] = mel
        batch[1, : len(neighbour)] = neighbour
        vectors = _spaces(encoder.encode_mel(batch, np.array([len(mel), len(neighbour)])))
        rows.append({space: both[:1] for space, both in vectors.items()})
    return _stack(rows)


def _names(songs: Songs) -> list[str]:
    return [space for space in ("semantic", "preference") if space in songs.spaces]


def _spaces(vectors: Vectors) -> Spaces:
    both = {"semantic": vectors.semantic, "preference": vectors.preference}
    return {space: found for space, found in both.items() if found is not None}


def _stack(rows: Sequence[Spaces]) -> Spaces:
    return {space: np.concatenate([row[space] for row in rows]) for space in rows[0]}


def _largest(first: np.ndarray, second: np.ndarray) -> Estimate:
    return Estimate(float(np.abs(first - second).max()), len(first))
