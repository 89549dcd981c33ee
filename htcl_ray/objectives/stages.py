"""The losses of both stages as named terms, each over the global batch.

Every worker computes only its own rows of the logits, against the gathered rows of all. A worker's terms are divided by the global
batch: summed over workers they are the loss of one process on the whole batch, and so are the gradients.

Shapes: n rows of this worker, W workers, d dimensions. `ids` int64 [·, 3]: song, duplicate group, normalised text, as global integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.models.htcl import HTCL
from htcl_ray.objectives.contrastive import false_negatives, info_nce_rows
from htcl_ray.objectives.gather import gather_rows, rank

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class Side:
    """One side of a contrastive term: unit-norm vectors and ids of this worker's rows and of everyone's."""

    own: Tensor
    own_ids: Tensor
    everyone: Tensor
    all_ids: Tensor

    @classmethod
    def of(cls, vectors: Tensor, ids: Tensor) -> Side:
        """Gather a side. Half precision is widened: cosines and logits need at least fp32."""
        own = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
        return cls(own, ids, gather_rows(own), gather_rows(ids))


def pretrain_terms(model: HTCL, audio: Tensor, text: Tensor, ids: Tensor) -> Terms:
    """Stage 1. Encoded audio and text [n, d] of the same songs."""
    return {"text": symmetric(Side.of(audio, ids), Side.of(text, ids), model.logit_scale["text"])}


def finetune_terms(model: HTCL, audio: Tensor, text: Tensor, ids: Tensor, known_pairs: Tensor | None) -> Terms:
    """Stage 2. Encoded audio and text [2n, d]: first the n trigger songs, then the n songs recalled from them.

    `text`: audio ↔ text over both songs, 2nW rows. `preference`: trigger audio ↔ recalled audio. `fusion`: the mean of trigger audio ↔
    recalled fusion and recalled audio ↔ trigger fusion. `known_pairs`: sorted codes of the training pairs, never negatives.
    """
    scale = model.logit_scale
    half = len(audio) // 2
    fusion = model.fuse(audio, text)
    trigger, recalled = Side.of(audio[:half], ids[:half]), Side.of(audio[half:], ids[half:])
    trigger_fusion, recalled_fusion = Side.of(fusion[:half], ids[:half]), Side.of(fusion[half:], ids[half:])
    there = symmetric(trigger, recalled_fusion, scale["fusion"], known_pairs)
    back = symmetric(recalled, trigger_fusion, scale["fusion"], known_pairs)
    return {
        "text": symmetric(Side.of(audio, ids), Side.of(text, ids), scale["text"], known_pairs),
        "preference": symmetric(trigger, recalled, scale["preference"], known_pairs),
        "fusion": (there + back) / 2,
    }


def symmetric(first: Side, second: Side, logit_scale: Tensor, known_pairs: Tensor | None = None) -> Tensor:
    """Symmetric InfoNCE over the global batch, this worker's share, false negatives left out."""
    offset = rank() * len(first.own)
    there = info_nce_rows(
        first.own,
        second.everyone,
        logit_scale,
        first_positive=offset,
        excluded=lambda a, b: false_negatives(first.own_ids[a:b], second.all_ids, known_pairs),
    )
    back = info_nce_rows(
        second.own,
        first.everyone,
        logit_scale,
        first_positive=offset,
        excluded=lambda a, b: false_negatives(second.own_ids[a:b], first.all_ids, known_pairs),
    )
    return (there + back) / (2 * len(first.everyone))


def total_loss(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum that is optimised."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
