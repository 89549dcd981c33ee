"""InfoNCE and the pairwise sigmoid loss. Pure functions of tensors, without communication between workers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.base import ContrastiveLoss


@dataclass(frozen=True)
class InfoNCE(ContrastiveLoss):
    """−log softmax(cosine · exp(s)) at the positive key, in both directions (van den Oord et al., arXiv 1807.03748)."""

    directions: ClassVar[int] = 2

    @classmethod
    def initial_parameters(cls, temperature: float, batch_size: int) -> dict[str, float]:
        """The given temperature."""
        return {"logit_scale": -math.log(temperature)}

    @classmethod
    def chance_level(cls, num_candidates: int) -> float | None:
        """The log of the number of candidates."""
        return math.log(num_candidates)

    def rows(
        self, queries: Tensor, keys: Tensor, positives: Tensor, excluded: Tensor | None, log_q: Tensor | None
    ) -> Tensor:
        """Cross entropy over the keys that are not excluded."""
        logits = queries @ keys.T * self.logit_scale.exp()
        if log_q is not None:
            logits = logits - log_q.to(logits.dtype)
        if excluded is not None:
            logits = logits.masked_fill(excluded, -torch.inf)
        return F.cross_entropy(logits, positives, reduction="sum")

    def several_positives(self, queries: Tensor, keys: Tensor, matches: Tensor, excluded: Tensor) -> Tensor:
        """Mean over a query's positives of the cross entropy of each against the negatives (Khosla et al. 2020).

        The sum over positives is outside the logarithm (`L_out`), and positives are no negatives of each other. With
        one positive it is `rows`.
        """
        logits = queries @ keys.T * self.logit_scale.exp()
        lowest = torch.finfo(logits.dtype).min  # not −∞, whose gradient is NaN where a query has no negative
        negatives = logits.masked_fill(matches | excluded, lowest).logsumexp(dim=1, keepdim=True)
        losses = F.softplus(negatives - logits).masked_fill(~matches, 0)
        return (losses.sum(dim=1) / matches.sum(dim=1)).sum()


@dataclass(frozen=True)
class SigmoidLoss(ContrastiveLoss):
    """−log σ(z · (cosine · exp(s) + b)) of every pair of rows; z = 1 where they match, else −1.

    SigLIP, arXiv 2303.15343.
    """

    logit_bias: Tensor
    """b."""
    directions: ClassVar[int] = 1

    @classmethod
    def initial_parameters(cls, temperature: float, batch_size: int) -> dict[str, float]:
        """The given temperature, and the log odds that two rows of a batch match as bias.

        The paper's bias of −10 is about this number for its batches of 32,768; for small batches it would be far below.
        """
        return {"logit_scale": -math.log(temperature), "logit_bias": -math.log(batch_size - 1)}

    @classmethod
    def chance_level(cls, num_candidates: int) -> float | None:
        """None: the loss of equal embeddings depends on temperature and bias."""
        return None

    def rows(
        self, queries: Tensor, keys: Tensor, positives: Tensor, excluded: Tensor | None, log_q: Tensor | None
    ) -> Tensor:
        """Each pair of a query and a key that is not excluded is a binary decision; `log_q` must be None."""
        assert log_q is None, "the sigmoid loss has no correction for popularity"
        logits = queries @ keys.T * self.logit_scale.exp() + self.logit_bias
        matches = torch.zeros_like(logits, dtype=torch.bool).scatter(1, positives[:, None], True)
        losses = -F.logsigmoid(torch.where(matches, logits, -logits))
        return losses.sum() if excluded is None else losses.masked_fill(excluded, 0).sum()


def info_nce(
    first: Tensor, second: Tensor, logit_scale: Tensor, *, excluded: Tensor | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Compute the symmetric InfoNCE of matching rows, averaged over rows and both directions. Scalar.

    first, second [n, d]: row i of both belong together; lengths do not matter, cosines are taken. `logit_scale`: a
    scalar s, logits are cosine · exp(s). `excluded` [n, n] bool: where true, (i, j) is not a negative; the diagonal is
    never excluded. `chunk_rows` bounds memory: n·chunk_rows logits at a time, same result.
    """
    return InfoNCE(logit_scale)(first, second, excluded=excluded, chunk_rows=chunk_rows)


def sigmoid_loss(
    first: Tensor,
    second: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    excluded: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Compute the pairwise sigmoid loss, summed over pairs and averaged over rows. Scalar.

    Arguments as in `info_nce`; `logit_bias`: a scalar b, added to the logits.
    """
    return SigmoidLoss(logit_scale, logit_bias)(first, second, excluded=excluded, chunk_rows=chunk_rows)
