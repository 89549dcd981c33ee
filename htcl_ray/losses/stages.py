"""The losses of both stages as named terms, each over the global batch.

Every worker computes only its own rows of the logits, against the gathered rows of all. A worker's terms are divided by
the global batch: summed over workers they are the loss of one process on the whole batch, and so are the gradients.

A model with biases (`logit_bias`) takes the pairwise sigmoid loss, one without them InfoNCE.

Shapes: n rows of this worker, W workers, d dimensions. `ids` int64 [·, 3]: song, duplicate group, normalised text, as
global integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.collectives import gather_rows, rank
from htcl_ray.losses.contrastive import info_nce_rows
from htcl_ray.losses.false_negatives import Excluded, false_negatives
from htcl_ray.losses.sigmoid import sigmoid_rows
from htcl_ray.models.htcl import HTCL

Terms = dict[str, Tensor]
Related = Callable[[Tensor, Tensor], Tensor]
"""(ids of rows [n, 3], ids of columns [m, 3]) → bool [n, m]: which must not be pushed apart."""


@dataclass(frozen=True)
class Side:
    """One side of a contrastive term: unit-norm vectors and ids of this worker's rows, and of everyone's, which are the
    other side's keys.

    Keys may be more than rows: those behind the rows of everyone match no query.
    """

    own: Tensor
    own_ids: Tensor
    everyone: Tensor
    all_ids: Tensor
    log_q: Tensor | None = None
    """[keys]: log of the probability with which each key was drawn, to correct for it."""
    unused: Tensor | None = None
    """bool [keys]: keys that no query sees."""

    @classmethod
    def of(cls, vectors: Tensor, ids: Tensor, log_q: Tensor | None = None) -> Side:
        """Gather a side. Half precision is widened: cosines and logits need at least fp32. `log_q` [songs]: of every
        song.
        """
        own = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
        all_ids = gather_rows(ids)
        return cls(own, ids, gather_rows(own), all_ids, None if log_q is None else log_q[all_ids[:, 0]])

    def with_more_keys(self, more: Side, unused: Tensor) -> Side:
        """Side with the keys of another behind its own, those of `unused` [keys of the other] left out."""
        return replace(
            self,
            everyone=torch.cat([self.everyone, more.everyone]),
            all_ids=torch.cat([self.all_ids, more.all_ids]),
            unused=torch.cat([unused.new_zeros(len(self.everyone)), unused]),
        )


def pretrain_terms(model: HTCL, audio: Tensor, text: Tensor, ids: Tensor, *, masked: bool = True) -> Terms:
    """Stage 1. Encoded audio and text [n, d] of the same songs. `masked`: false negatives are left out."""
    related = false_negatives if masked else None
    return {"text": _term(model, "text", Side.of(audio, ids), Side.of(text, ids), related)}


def finetune_terms(
    model: HTCL,
    audio: Tensor,
    text: Tensor,
    ids: Tensor,
    known_pairs: Tensor | None,
    *,
    masked: bool = True,
    log_q: Tensor | None = None,
    with_rejected: bool = False,
    rehearsed: int = 0,
) -> Terms:
    """Stage 2. Encoded audio and text [2n, d]: first the n trigger songs, then the n songs recalled from them.

    `text`: audio ↔ text over both songs and the rehearsed ones, (2 + `rehearsed`)nW rows. `preference`: trigger audio ↔
    recalled audio. `fusion`: the mean of trigger audio ↔ recalled fusion and recalled audio ↔ trigger fusion.
    `known_pairs`: sorted codes of the training pairs, never negatives. `masked`: false negatives are left out; if not,
    known pairs are of no use.

    `log_q` [songs, 2]: log of the probability that a song is drawn as trigger and as recalled song; InfoNCE of
    preference and fusion is corrected for it. The text term is not: it keeps stage 1's objective, in which every song
    counts alike.

    `with_rejected`: audio and text have n more rows after the recalled songs, of songs rejected after the triggers.
    Their audio joins the keys that all triggers are compared with in `preference`. A trigger without one has its
    recalled song there again, which no query then sees.

    `rehearsed`: audio and text end with `rehearsed` · n more rows, of songs of the whole training catalogue, for the
    text term alone.
    """
    related = functools.partial(false_negatives, known_pairs=known_pairs) if masked else None
    n = len(audio) // (2 + with_rejected + rehearsed)
    both = slice(0, 2 * n)
    matched = torch.cat([torch.arange(2 * n), torch.arange(len(audio) - rehearsed * n, len(audio))]).to(audio.device)
    fusion = model.fuse(audio[both], text[both])
    log_q_trigger, log_q_recalled = (None, None) if log_q is None else log_q.unbind(dim=1)
    trigger, trigger_fusion = (Side.of(vectors[:n], ids[:n], log_q_trigger) for vectors in (audio, fusion))
    recalled, recalled_fusion = (
        Side.of(vectors[n : 2 * n], ids[n : 2 * n], log_q_recalled) for vectors in (audio, fusion)
    )
    preferred = recalled
    if with_rejected:
        rejected = Side.of(audio[2 * n : 3 * n], ids[2 * n : 3 * n])
        preferred = recalled.with_more_keys(rejected, unused=rejected.all_ids[:, 0] == recalled.all_ids[:, 0])
    there = _term(model, "fusion", trigger, recalled_fusion, related)
    back = _term(model, "fusion", recalled, trigger_fusion, related)
    return {
        "text": _term(
            model, "text", Side.of(audio[matched], ids[matched]), Side.of(text[matched], ids[matched]), related
        ),
        "preference": _term(model, "preference", trigger, preferred, related),
        "fusion": (there + back) / 2,
    }


def _term(model: HTCL, name: str, first: Side, second: Side, related: Related | None) -> Tensor:
    """One term over the global batch, this worker's share: symmetric InfoNCE, or the sigmoid loss, which sees every
    pair of rows once.
    """
    scale, rows = model.logit_scale[name], len(first.everyone)
    offset = rank() * len(first.own)
    excluded = _excluded(first, second, related)
    if model.logit_bias is not None:
        bias = model.logit_bias[name]
        return sigmoid_rows(first.own, second.everyone, scale, bias, first_positive=offset, excluded=excluded) / rows
    there = info_nce_rows(
        first.own, second.everyone, scale, first_positive=offset, excluded=excluded, log_q=second.log_q
    )
    excluded = _excluded(second, first, related)
    back = info_nce_rows(second.own, first.everyone, scale, first_positive=offset, excluded=excluded, log_q=first.log_q)
    return (there + back) / (2 * rows)


def _excluded(queries: Side, keys: Side, related: Related | None) -> Excluded | None:
    """Which keys a query does not see."""
    unused = keys.unused
    if related is None:
        return None if unused is None else lambda start, stop: unused.expand(stop - start, -1)
    if unused is None:
        return lambda start, stop: related(queries.own_ids[start:stop], keys.all_ids)
    return lambda start, stop: related(queries.own_ids[start:stop], keys.all_ids) | unused


def total_loss(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """The weighted sum that is optimised."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
