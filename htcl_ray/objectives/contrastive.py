"""InfoNCE on embeddings that are already here: pure functions of tensors, no communication.

Shapes: n rows of this process, m rows of everyone (n = m in one process), d dimensions, k kinds of ids. `logit_scale` is a scalar s:
logits are cosine · exp(s), so the temperature is exp(−s).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ENTRIES = 2**21
"""Logits held at a time; larger matrices are computed in row chunks and once more for the gradient."""

Excluded = Callable[[int, int], Tensor]
"""`excluded(start, stop)` → bool [stop − start, m]: which keys are no negatives of these query rows."""


def info_nce(
    first: Tensor, second: Tensor, logit_scale: Tensor, *, excluded: Tensor | None = None, chunk_rows: int | None = None
) -> Tensor:
    """Symmetric InfoNCE of matching rows, averaged: ½·(first → second + second → first). Scalar.

    first, second [n, d]: row i of both belong together; lengths do not matter, cosines are taken. `excluded` [n, n] bool: where true,
    (i, j) is not a negative; the diagonal never is excluded. `chunk_rows` bounds memory: n·chunk_rows logits at a time, same result.
    """
    first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    there = info_nce_rows(
        first, second, logit_scale, excluded=None if excluded is None else lambda a, b: excluded[a:b], chunk_rows=chunk_rows
    )
    back = info_nce_rows(
        second, first, logit_scale, excluded=None if excluded is None else lambda a, b: excluded[:, a:b].T, chunk_rows=chunk_rows
    )
    return (there + back) / (2 * len(first))


def info_nce_rows(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor,
    *,
    first_positive: int = 0,
    excluded: Excluded | None = None,
    chunk_rows: int | None = None,
) -> Tensor:
    """Sum over queries of −log softmax(cosine · exp(s)) at the positive key. One direction. Scalar.

    queries [n, d] and keys [m, d], unit norm. The positive of query i is key `first_positive` + i; it is always a candidate. Keys
    that `excluded` names are left out of the denominator. Memory grows with (n + m)·d, not with n·m.
    """
    rows = chunk_rows or max(1, CHUNK_ENTRIES // len(keys))
    total = queries.new_zeros(())
    for start in range(0, len(queries), rows):
        stop = min(start + rows, len(queries))
        arguments = (queries[start:stop], keys, logit_scale, start, first_positive, excluded)
        if rows >= len(queries):
            total = total + _chunk_loss(*arguments)
        else:
            total = total + checkpoint(_chunk_loss, *arguments, use_reentrant=False, preserve_rng_state=False)
    return total


def _chunk_loss(queries: Tensor, keys: Tensor, logit_scale: Tensor, start: int, first_positive: int, excluded: Excluded | None) -> Tensor:
    positives = first_positive + start + torch.arange(len(queries), device=queries.device)
    logits = queries @ keys.T * logit_scale.exp()
    if excluded is not None:
        mask = excluded(start, start + len(queries)).scatter(1, positives[:, None], False)
        logits = logits.masked_fill(mask, -torch.inf)
    return F.cross_entropy(logits, positives, reduction="sum")


def false_negatives(row_ids: Tensor, column_ids: Tensor, known_pairs: Tensor | None = None) -> Tensor:
    """Which (row, column) must not be pushed apart: bool [n, m].

    row_ids [n, k] and column_ids [m, k], int64: true where any kind of id is equal (song, duplicate group, normalised text). The first
    kind is the song; `known_pairs` are sorted `pair_codes` of songs that belong together, true in either order.
    """
    related = torch.zeros(len(row_ids), len(column_ids), dtype=torch.bool, device=row_ids.device)
    for kind in range(row_ids.shape[1]):
        related |= row_ids[:, None, kind] == column_ids[None, :, kind]
    if known_pairs is not None and len(known_pairs):
        low = torch.minimum(row_ids[:, None, 0], column_ids[None, :, 0])
        codes = pair_codes(low, torch.maximum(row_ids[:, None, 0], column_ids[None, :, 0]))
        found = torch.searchsorted(known_pairs, codes).clamp(max=len(known_pairs) - 1)
        related |= known_pairs[found] == codes
    return related


def pair_codes(low: Tensor, high: Tensor) -> Tensor:
    """One int64 for each unordered pair of song ids below 2³¹, low ≤ high."""
    return (low << 32) | high
