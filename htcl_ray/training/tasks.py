"""What the two stages train on: the order of an epoch, and the loss of a batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from htcl_ray.models.htcl import HTCL
from htcl_ray.objectives.stages import Terms, finetune_terms, pretrain_terms
from htcl_ray.settings import FinetuneSettings, PretrainSettings
from htcl_ray.training.order import pair_order, song_order
from htcl_ray.training.songs import Pairs, Rows, Songs, known_pair_codes

LossTerms = Callable[[HTCL, Tensor, Tensor, Tensor], Terms]
"""(model, audio [S, dim], text [S, dim], ids [S, 3]) → named terms, this worker's share of each."""


@dataclass(frozen=True)
class Task:
    """One stage's data and objective."""

    name: str
    rows: int
    """Rows of an epoch: songs in stage 1, pairs in stage 2."""
    songs_per_row: int
    order: Callable[[int], Rows]
    """Epoch → song numbers [rows, songs_per_row]."""
    terms: LossTerms
    weights: dict[str, float]
    """Weight of each term in what is optimised."""
    validation_pairs: Rows | None = None


def pretrain_task(songs: Songs, settings: PretrainSettings) -> Task:
    """Stage 1: every training song once an epoch."""
    return Task(
        name="pretrain",
        rows=len(songs.train),
        songs_per_row=1,
        order=lambda epoch: song_order(settings.seed, epoch, songs.train),
        terms=pretrain_terms,
        weights={"text": 1.0},
    )


def finetune_task(pairs: Pairs, settings: FinetuneSettings, device: torch.device) -> Task:
    """Stage 2: training pairs drawn by weight. A batch holds the triggers of its pairs, then the recalled songs."""
    draws = settings.pairs_per_epoch or len(pairs.train)
    known = torch.from_numpy(known_pair_codes(pairs.train)).to(device)
    return Task(
        name="finetune",
        rows=draws,
        songs_per_row=2,
        order=lambda epoch: pair_order(settings.seed, epoch, pairs.train, pairs.weights, draws),
        terms=lambda model, audio, text, ids: finetune_terms(model, audio, text, ids, known),
        weights={
            "text": settings.text_loss_weight,
            "preference": settings.preference_loss_weight,
            "fusion": settings.fusion_loss_weight,
        },
        validation_pairs=pairs.validation,
    )
