"""The losses of both stages as named terms, each over the global batch.

Every worker computes only its own rows of the logits, against the gathered rows of all. A worker's terms are divided by
the global batch: summed over workers they are the loss of one process on the whole batch, and so are the gradients.

Shapes: n rows of this worker, W workers, d dimensions. `ids` int64 [·, 3]: song, duplicate group, normalised text, as
global integers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.base import ContrastiveLoss, Matching
from htcl_ray.losses.collectives import gather_rows, rank
from htcl_ray.losses.false_negatives import Excluded, directed_matches, false_negatives

Terms = dict[str, Tensor]
Related = Callable[[Tensor, Tensor], Tensor]
"""(ids of rows [n, 3], ids of columns [m, 3]) → bool [n, m]: the false negatives."""


class TermModel(Protocol):
    """The part of a model that the terms use."""

    def loss(self, term: str) -> ContrastiveLoss:
        """The loss of a term with the term's learned parameters."""

    def fuse(self, audio: Tensor, text: Tensor) -> Tensor:
        """Fusion of encoded audio and text [n, d] of the same songs, [n, d]."""


@dataclass(frozen=True)
class Side:
    """One side of a contrastive term: unit-norm vectors and ids of this worker's rows, and the keys of all workers.

    The keys of one side are the candidates of the other side's rows. Keys may outnumber rows; those after the
    rows of all workers match no query.
    """

    own: Tensor
    own_ids: Tensor
    keys: Tensor
    key_ids: Tensor
    log_q: Tensor | None = None
    """[keys]: log of the probability with which each key was drawn, to correct for it."""
    unused: Tensor | None = None
    """bool [keys]: keys that are no candidates of any query."""
    extra: int = 0
    """Number of keys after those of the rows of all workers."""

    @property
    def of_rows(self) -> Tensor:
        """Mask of the keys that are rows of the other side, [keys]."""
        return torch.arange(len(self.keys), device=self.keys.device) < len(self.keys) - self.extra

    @classmethod
    def of(cls, vectors: Tensor, ids: Tensor, log_q: Tensor | None = None) -> Side:
        """Gather a side from all workers; `log_q` [songs] is that of every song.

        Half precision is widened: cosines and logits need at least fp32.
        """
        own = F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=1)
        key_ids = gather_rows(ids)
        return cls(own, ids, gather_rows(own), key_ids, None if log_q is None else log_q[key_ids[:, 0]])

    def with_more_keys(self, more: Side, unused: Tensor) -> Side:
        """Append the keys of another side; `unused` [keys of the other] marks those that are no candidates."""
        return replace(
            self,
            keys=torch.cat([self.keys, more.keys]),
            key_ids=torch.cat([self.key_ids, more.key_ids]),
            unused=torch.cat([unused.new_zeros(len(self.keys)), unused]),
            extra=len(more.keys),
        )


def pretrain_terms(model: TermModel, audio: Tensor, text: Tensor, ids: Tensor, *, masked: bool = True) -> Terms:
    """Compute the term of stage 1 from encoded audio and text [n, d] of the same songs.

    `masked`: false negatives are excluded.
    """
    related = false_negatives if masked else None
    return {"text": _term(model, "text", Side.of(audio, ids), Side.of(text, ids), related)}


def finetune_terms(
    model: TermModel,
    audio: Tensor,
    text: Tensor,
    ids: Tensor,
    known_pairs: Tensor | None,
    *,
    masked: bool = True,
    log_q: Tensor | None = None,
    positives: Tensor | None = None,
    with_rejected: bool = False,
    rehearsed: int = 0,
) -> Terms:
    """Compute the terms of stage 2 from encoded audio and text [2n, d]: n trigger songs, then their n recalled songs.

    `text`: audio ↔ text over both songs and the rehearsed ones, (2 + `rehearsed`)nW rows. `preference`: trigger audio ↔
    recalled audio. `fusion`: the mean of trigger audio ↔ recalled fusion and recalled audio ↔ trigger fusion.
    `known_pairs`: sorted codes of the training pairs, which are false negatives too. `masked`: false negatives are
    excluded; if not, known pairs have no effect.

    `log_q` [songs, 2]: log of the probability that a song is drawn as trigger and as recalled song; InfoNCE of
    preference and fusion is corrected for it. The text term is not: it keeps stage 1's objective, in which every song
    has equal weight.

    `positives`: sorted codes (trigger, recalled) of the training pairs. Every recalled song of the batch that is paired
    with a trigger is then a positive of it in `preference`, and every such trigger of a recalled song, not only that of
    its row. Needs `masked` and `known_pairs`, and not `log_q`.

    `with_rejected`: audio and text have n more rows after the recalled songs: the explicit negatives, songs rejected
    after the triggers. Their audio joins the candidates of all triggers in `preference`. A trigger without one has its
    recalled song in that place, which is then no candidate.

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
        preferred = recalled.with_more_keys(rejected, unused=rejected.key_ids[:, 0] == recalled.key_ids[:, 0])
    trigger_to_fusion = _term(model, "fusion", trigger, recalled_fusion, related)
    recalled_to_fusion = _term(model, "fusion", recalled, trigger_fusion, related)
    return {
        "text": _term(
            model, "text", Side.of(audio[matched], ids[matched]), Side.of(text[matched], ids[matched]), related
        ),
        "preference": _term(model, "preference", trigger, preferred, related, positives),
        "fusion": (trigger_to_fusion + recalled_to_fusion) / 2,
    }


def _term(
    model: TermModel, name: str, first: Side, second: Side, related: Related | None, positives: Tensor | None = None
) -> Tensor:
    """Compute the share of this worker in one term over the global batch; `positives` as in `finetune_terms`."""
    loss = model.loss(name)
    offset = rank() * len(first.own)
    total = loss.sum_rows(
        first.own,
        second.keys,
        first_positive=offset,
        excluded=_excluded(first, second, related),
        log_q=second.log_q,
        matching=_matching(first, second, positives),
    )
    if loss.directions == 2:
        total = total + loss.sum_rows(
            second.own,
            first.keys,
            first_positive=offset,
            excluded=_excluded(second, first, related),
            log_q=first.log_q,
            matching=_matching(second, first, positives, reverse=True),
        )
    return total / (loss.directions * len(first.keys))


def _excluded(queries: Side, keys: Side, related: Related | None) -> Excluded | None:
    """Keys that are no negatives of a query."""
    unused = keys.unused
    if related is None:
        return None if unused is None else lambda start, stop: unused.expand(stop - start, -1)
    if unused is None:
        return lambda start, stop: related(queries.own_ids[start:stop], keys.key_ids)
    return lambda start, stop: related(queries.own_ids[start:stop], keys.key_ids) | unused


def _matching(queries: Side, keys: Side, positives: Tensor | None, *, reverse: bool = False) -> Matching | None:
    """Keys of the batch's rows that form one of the directed pairs with a query; no other key is a positive."""
    if positives is None:
        return None
    songs, candidates = queries.own_ids[:, 0], keys.key_ids[:, 0]
    return lambda start, stop, excluded: directed_matches(
        songs[start:stop], candidates, positives, excluded & keys.of_rows, reverse=reverse
    )


def total_loss(terms: Terms, weights: Mapping[str, float]) -> Tensor:
    """Compute the weighted sum of the terms, which is optimised."""
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()
