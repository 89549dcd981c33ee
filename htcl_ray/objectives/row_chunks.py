"""Sums over a matrix of logits that is never held whole: some rows at a time, and once more for the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ENTRIES = 2**21
"""Logits held at a time when the caller names no number of rows."""


def sum_row_chunks(loss: Callable[[int, int], Tensor], rows: int, columns: int, chunk_rows: int | None = None) -> Tensor:
    """Sum of `loss(start, stop)`, the scalar loss of rows `start` to `stop`, over all rows.

    More than one chunk: what a chunk computes is forgotten and computed again in the backward pass, so memory does not grow with
    rows · columns. `loss` must draw no random numbers.
    """
    size = chunk_rows or max(1, CHUNK_ENTRIES // columns)
    if size >= rows:
        return loss(0, rows)
    parts = [
        checkpoint(loss, start, min(start + size, rows), use_reentrant=False, preserve_rng_state=False) for start in range(0, rows, size)
    ]
    return torch.stack(parts).sum()
