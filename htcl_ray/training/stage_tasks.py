"""The tasks of the two stages: the order of an epoch and the loss terms of a batch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from htcl_ray.config.sections import FinetuneSettings, PretrainSettings
from htcl_ray.losses.stages import Terms, finetune_terms, pretrain_terms
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.order import pair_order, song_order, with_rehearsed, with_rejected
from htcl_ray.training.song_numbers import (
    Pairs,
    Rows,
    Songs,
    directed_pair_codes,
    known_pair_codes,
    log_draw_probability,
)

LossTerms = Callable[[HTCL, Tensor, Tensor, Tensor], Terms]
"""(model, audio [S, dim], text [S, dim], ids [S, 3]) → named terms, this worker's share of each."""


@dataclass(frozen=True)
class Task:
    """One stage's data and objective."""

    name: str
    rows: int
    """Rows of an epoch: songs in stage 1, pairs in stage 2."""
    songs_per_row: int
    """1 in stage 1; in stage 2 the 2 of a pair, a rejected song (`explicit_negatives`), and the rehearsed songs."""
    order: Callable[[int], Rows]
    """Epoch → song numbers [rows, songs_per_row]."""
    terms: LossTerms
    weights: dict[str, float]
    """Weight of each term in the total loss."""
    validation_pairs: Rows | None = None


def pretrain_task(songs: Songs, settings: PretrainSettings) -> Task:
    """Stage 1: training songs in random order."""
    return Task(
        name="pretrain",
        rows=settings.songs_per_epoch or len(songs.train),
        songs_per_row=1,
        order=lambda epoch: song_order(settings.seed, epoch, songs.train, settings.songs_per_epoch),
        terms=functools.partial(pretrain_terms, masked=settings.mask_false_negatives),
        weights={"text": 1.0},
    )


def finetune_task(pairs: Pairs, training_songs: Rows, settings: FinetuneSettings, device: torch.device) -> Task:
    """Stage 2: training pairs drawn by weight.

    A batch holds the triggers of its pairs, then the recalled songs, then, with `explicit_negatives`, songs rejected
    after the triggers, then `rehearsal_songs_per_pair` of all `training_songs` for each pair.
    """
    draws = settings.pairs_per_epoch or len(pairs.train)
    known = torch.from_numpy(known_pair_codes(pairs.train)).to(device)
    positives = (
        torch.from_numpy(directed_pair_codes(pairs.train)).to(device) if settings.uses_several_positives else None
    )
    log_q = (
        torch.from_numpy(log_draw_probability(pairs.train, pairs.weights)).to(device)
        if settings.popularity_correction
        else None
    )

    def order(epoch: int) -> Rows:
        drawn = pair_order(settings.seed, epoch, pairs.train, pairs.weights, draws)
        if settings.explicit_negatives:
            drawn = with_rejected(settings.seed, epoch, drawn, pairs.rejected, pairs.rejected_weights)
        if settings.rehearsal_songs_per_pair:
            drawn = with_rehearsed(settings.seed, epoch, drawn, training_songs, settings.rehearsal_songs_per_pair)
        return drawn

    def terms(model: HTCL, audio: Tensor, text: Tensor, ids: Tensor) -> Terms:
        return finetune_terms(
            model,
            audio,
            text,
            ids,
            known,
            masked=settings.mask_false_negatives,
            log_q=log_q,
            positives=positives,
            with_rejected=settings.explicit_negatives,
            rehearsed=settings.rehearsal_songs_per_pair,
        )

    return Task(
        name="finetune",
        rows=draws,
        songs_per_row=2 + settings.explicit_negatives + settings.rehearsal_songs_per_pair,
        order=order,
        terms=terms,
        weights={
            "text": settings.text_loss_weight,
            "preference": settings.preference_loss_weight,
            "fusion": settings.fusion_loss_weight,
        },
        validation_pairs=pairs.validation,
    )
