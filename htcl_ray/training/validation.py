"""Validation during training: retrieval in one fixed gallery of validation songs, with dropout off."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from htcl_ray.evaluation.tasks.semantic import first_correct_rank, rank_summary
from htcl_ray.losses.collectives import gather_rows, rank, world_size
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.song_numbers import Rows

GALLERY = 2048
"""Most songs of a gallery, so that validation is cheap and metrics of one catalogue stay comparable."""
PAIRS = 8 * GALLERY
"""Most pairs of a gallery, so that ranking them is cheap."""
PAIRS_AT_ONCE = 2**20
"""Pairs that are looked up in the gallery at once."""
RECALL_AT = 10


class Gallery(NamedTuple):
    """Songs and pairs for validation: the same after every epoch, for every worker and in every trial of a search."""

    songs: Rows
    """[songs], sorted."""
    pairs: Rows
    """[pairs, 2]: trigger and recalled song, as positions in `songs`; empty without pairs."""


def validation_gallery(validation: Rows, pairs: Rows | None = None) -> Gallery:
    """Choose all validation songs and the pairs among them, or a fixed sample of them.

    `validation`: sorted; `pairs`: [p, 2], songs of `validation`. In a larger catalogue, pairs are drawn first and the
    gallery is made of their songs, since few pairs would lie inside a sample of songs; other songs fill the rest.
    """
    random = np.random.default_rng(0)
    songs = validation
    if len(validation) > GALLERY:
        songs = validation[:0]
        if pairs is not None and len(pairs):
            drawn = pairs[random.choice(len(pairs), min(len(pairs), PAIRS), replace=False)]
            _, first = np.unique(drawn, return_index=True)
            new = np.bincount(first // 2, minlength=len(drawn))  # songs that a pair brings and no pair before it
            songs = np.unique(drawn[np.cumsum(new) <= GALLERY])
        others = np.setdiff1d(
            random.choice(validation, min(len(validation), 2 * GALLERY), replace=False), songs, assume_unique=True
        )
        songs = np.sort(np.concatenate([songs, random.permutation(others)[: GALLERY - len(songs)]]))
    inside = np.empty((0, 2), dtype=np.int64) if pairs is None else pairs_inside(songs, pairs)
    if len(inside) > PAIRS:
        inside = inside[np.sort(random.choice(len(inside), PAIRS, replace=False))]
    return Gallery(songs, inside)


def pairs_inside(songs: Rows, pairs: Rows) -> Rows:
    """The pairs [p, 2] with both songs among `songs` (sorted), as positions in it."""
    inside = [np.empty((0, 2), dtype=np.int64)]
    for start in range(0, len(pairs) if len(songs) else 0, PAIRS_AT_ONCE):
        part = pairs[start : start + PAIRS_AT_ONCE]
        place = np.searchsorted(songs, part).clip(max=len(songs) - 1)
        inside.append(place[(songs[place] == part).all(axis=1)])
    return np.concatenate(inside)


def validate(model: HTCL, loader: BatchLoader, gallery: Gallery) -> dict[str, float]:
    """Compute the metrics of the gallery; workers share the work, each gets all metrics. Empty for an empty gallery.

    `validation_recall@10`, `validation_ndcg@10` and `validation_median_rank`: text → audio, songs with the same text
    being one correct set, of which the first counts. With pairs, `validation_pair_recall@10` and so on: rank of the
    recalled song by the trigger's audio, the trigger itself left out.
    """
    songs, pairs = gallery
    if not len(songs):
        return {}
    audio, text = _embed(model, loader, songs)
    _, first_song, text_of_song = np.unique(loader.songs.ids[songs, 2], return_index=True, return_inverse=True)
    ranks = first_correct_rank(text[first_song], audio, np.arange(len(first_song)), text_of_song)
    metrics = _named("validation", ranks)
    if len(pairs):
        metrics |= _named("validation_pair", pair_ranks(audio, pairs))
    return metrics


def pair_ranks(vectors: npt.NDArray[np.float32], pairs: Rows) -> npt.NDArray[np.float64]:
    """Rank, from 1, of each pair's second song among all songs but the first, by similarity; ties count half."""
    trigger, recalled = pairs.T
    scores = vectors[trigger] @ vectors.T
    row = np.arange(len(pairs))
    wanted = scores[row, recalled][:, None].copy()
    scores[row, trigger] = -np.inf
    ranks: npt.NDArray[np.float64] = (scores > wanted).sum(axis=1) + ((scores == wanted).sum(axis=1) + 1) / 2
    return ranks


def _named(prefix: str, ranks: npt.NDArray[np.float64]) -> dict[str, float]:
    summary = rank_summary(ranks, [RECALL_AT])
    return {
        f"{prefix}_recall@{RECALL_AT}": summary[f"recall@{RECALL_AT}"],
        f"{prefix}_ndcg@{RECALL_AT}": float(np.where(ranks <= RECALL_AT, 1 / np.log2(1 + ranks), 0.0).mean()),
        f"{prefix}_median_rank": summary["median_rank"],
    }


def _embed(model: HTCL, loader: BatchLoader, songs: Rows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Audio and text vectors of songs, each worker embedding a part."""
    device = model.device
    each = -(-len(songs) // world_size())
    own = songs[np.minimum(np.arange(rank() * each, (rank() + 1) * each), len(songs) - 1)]
    audio, text = [], []
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        for start in range(0, len(own), 64):
            batch = loader.load(own[start : start + 64])
            audio.append(model.embed_features(batch.features, batch.valid_frames))
            text.append(model.embed_text([loader.songs.texts[row] for row in own[start : start + 64].tolist()]))
    both = [gather_rows(torch.cat(vectors).to(device)).cpu().numpy()[: len(songs)] for vectors in (audio, text)]
    return both[0], both[1]
