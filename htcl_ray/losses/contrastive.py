"""InfoNCE on embeddings that are already here: pure functions of tensors, no communication.

Shapes: n rows of this process, m rows of everyone (n = m in one process), d dimensions. `logit_scale` is a scalar s:
logits are cosine · exp(s), so the temperature is exp(−s).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.false_negatives import Excluded, without_positives
from htcl_ray.losses.row_chunks import sum_row_chunks


def info_nce(
    first: Tensor, second: Tensor, logit_scale: Tensor, *, excluded: Tensor | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Symmetric InfoNCE of matching rows, averaged: ½·(first → second + second → first). Scalar.

    first, second [n, d]: row i of both belong together; lengths do not matter, cosines are taken. `excluded` [n, n]
    bool: where true, (i, j) is not a negative; the diagonal never is excluded. `chunk_rows` bounds memory: n·chunk_rows
    logits at a time, same result.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    there = info_nce_rows(
        first,
        second,
        logit_scale,
        excluded=None if excluded is None else lambda a, b: excluded[a:b],
        chunk_rows=chunk_rows,
    )
    back = info_nce_rows(
        second,
        first,
        logit_scale,
        excluded=None if excluded is None else lambda a, b: excluded[:, a:b].T,
        chunk_rows=chunk_rows,
    )
    return (there + back) / (2 * len(first))


def info_nce_rows(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    *,
    first_positive: int = 0,
    excluded: Excluded | None = None,
    log_q: Tensor | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over queries of −log softmax(cosine · exp(s)) at the positive key. One direction. Scalar.

    queries [n, d] and keys [m, d], unit norm. The positive of query i is key `first_positive` + i; it is always a
    candidate. Keys that `excluded` names are left out of the denominator. Memory grows with (n + m)·d, not with n·m.

    `log_q` [m]: log of the probability with which each key was drawn into the batch. It is subtracted from every logit,
    the positive's included (Bengio & Senécal 2008; Yi et al., RecSys 2019): the more keys, the closer the gradient is
    to that of the softmax over all songs, each counted once, however unevenly the keys are drawn.
    """

    def loss(start: int, queries: Tensor, keys: Tensor, logit_scale: Tensor) -> Tensor:
        stop = start + len(queries)
        positives = first_positive + torch.arange(start, stop, device=queries.device)
        logits = queries @ keys.T * logit_scale.exp()
        if log_q is not None:
            logits = logits - log_q.to(logits.dtype)
        mask = without_positives(excluded, start, stop, positives)
        if mask is not None:
            logits = logits.masked_fill(mask, -torch.inf)
        return F.cross_entropy(logits, positives, reduction="sum")

    return sum_row_chunks(loss, queries, (keys, logit_scale), columns=len(keys), chunk_rows=chunk_rows)
