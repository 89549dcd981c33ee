"""The pairwise sigmoid loss (SigLIP, arXiv 2303.15343) on embeddings that are already here: every (query, key) is a yes
or no of its own.

Shapes as in `contrastive`. `logit_bias` is a scalar b: logits are cosine · exp(s) + b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.false_negatives import Excluded, without_positives
from htcl_ray.losses.row_chunks import sum_row_chunks


def sigmoid_loss(
    first: Tensor,
    second: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    excluded: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """−1/n · Σᵢⱼ log σ(zᵢⱼ · (cosineᵢⱼ · exp(s) + b)), z = 1 for matching rows and −1 otherwise. Scalar.

    first, second [n, d]: row i of both belong together; lengths do not matter, cosines are taken. `excluded` [n, n]
    bool: where true, (i, j) is left out; the diagonal never is. `chunk_rows` bounds memory: n·chunk_rows logits at a
    time, same result.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    mask = None if excluded is None else lambda a, b: excluded[a:b]
    return sigmoid_rows(first, second, logit_scale, logit_bias, excluded=mask, chunk_rows=chunk_rows) / len(first)


def sigmoid_rows(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    first_positive: int = 0,
    excluded: Excluded | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over queries and keys of −log σ(z · (cosine · exp(s) + b)). Scalar.

    queries [n, d] and keys [m, d], unit norm. z is 1 for query i and key `first_positive` + i, which always counts, and
    −1 otherwise. Keys that `excluded` names are left out. Memory grows with (n + m)·d, not with n·m.
    """

    def loss(start: int, queries: Tensor, keys: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        stop = start + len(queries)
        positives = first_positive + torch.arange(start, stop, device=queries.device)
        logits = queries @ keys.T * logit_scale.exp() + logit_bias
        matches = torch.zeros_like(logits, dtype=torch.bool).scatter(1, positives[:, None], True)
        losses = -F.logsigmoid(torch.where(matches, logits, -logits))
        mask = without_positives(excluded, start, stop, positives)
        return losses.sum() if mask is None else losses.masked_fill(mask, 0).sum()

    return sum_row_chunks(loss, queries, (keys, logit_scale, logit_bias), columns=len(keys), chunk_rows=chunk_rows)
