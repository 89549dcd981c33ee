"""How good the model is now: retrieval in one fixed gallery of validation songs, dropout off."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from htcl_ray.evaluation.semantic import first_correct_rank, rank_summary
from htcl_ray.models.htcl import HTCL
from htcl_ray.objectives.gather import gather_rows, rank, world_size
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.songs import Rows

GALLERY = 2048
"""At most this many songs, so that an epoch's end costs little and figures of one catalogue stay comparable."""
RECALL_AT = 10


def validation_gallery(validation: Rows) -> Rows:
    """The gallery: all validation songs, or the same sample of them every time."""
    if len(validation) <= GALLERY:
        return validation
    return np.sort(np.random.default_rng(0).choice(validation, GALLERY, replace=False))


def validate(model: HTCL, loader: BatchLoader, gallery: Rows, pairs: Rows | None) -> dict[str, float]:
    """Metrics of the gallery; workers share the work and each gets the whole result. Empty when the gallery is.

    `validation_recall@10`, `validation_ndcg@10` and `validation_median_rank`: text → audio, songs with the same text being one correct
    set, of which the first counts. With pairs, `validation_pair_recall@10` and so on: recalled song found from the trigger's audio,
    itself left out.
    """
    if not len(gallery):
        return {}
    audio, text = _embed(model, loader, gallery)
    _, first_song, text_of_song = np.unique(loader.songs.ids[gallery, 2], return_index=True, return_inverse=True)
    ranks = first_correct_rank(text[first_song], audio, np.arange(len(first_song)), text_of_song)
    metrics = _named("validation", ranks)
    if pairs is not None:
        inside = pairs_inside(gallery, pairs)
        if len(inside):
            metrics |= _named("validation_pair", pair_ranks(audio, inside))
    return metrics


def pairs_inside(gallery: Rows, pairs: Rows) -> Rows:
    """The pairs [p, 2] whose songs both lie in the gallery (sorted), as positions in it; at most so many that ranking them costs little."""
    place = np.searchsorted(gallery, pairs).clip(max=len(gallery) - 1)
    return place[(gallery[place] == pairs).all(axis=1)][: 8 * GALLERY]


def pair_ranks(vectors: npt.NDArray[np.float32], pairs: Rows) -> npt.NDArray[np.float64]:
    """Rank, from 1, of each pair's second song among all songs but the first, by similarity to the first; ties count half."""
    trigger, recalled = pairs.T
    scores = vectors[trigger] @ vectors.T
    row = np.arange(len(pairs))
    wanted = scores[row, recalled][:, None].copy()
    scores[row, trigger] = -np.inf
    return (scores > wanted).sum(axis=1) + ((scores == wanted).sum(axis=1) + 1) / 2


def _named(prefix: str, ranks: npt.NDArray[np.float64]) -> dict[str, float]:
    summary = rank_summary(ranks, [RECALL_AT])
    return {
        f"{prefix}_recall@{RECALL_AT}": summary[f"recall@{RECALL_AT}"],
        f"{prefix}_ndcg@{RECALL_AT}": float(np.where(ranks <= RECALL_AT, 1 / np.log2(1 + ranks), 0.0).mean()),
        f"{prefix}_median_rank": summary["median_rank"],
    }


def _embed(model: HTCL, loader: BatchLoader, songs: Rows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Audio and text vectors of songs, each worker embedding a part."""
    device = model.audio_encoder.cls.device
    each = -(-len(songs) // world_size())
    own = songs[np.minimum(np.arange(rank() * each, (rank() + 1) * each), len(songs) - 1)]
    audio, text = [], []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, len(own), 64):
            batch = loader.load(own[start : start + 64])
            audio.append(model.embed_mel(batch.mel, batch.valid_frames))
            text.append(model.embed_text([loader.songs.texts[row] for row in own[start : start + 64].tolist()]))
    everyone = [gather_rows(torch.cat(vectors).to(device)).cpu().numpy()[: len(songs)] for vectors in (audio, text)]
    return everyone[0], everyone[1]
