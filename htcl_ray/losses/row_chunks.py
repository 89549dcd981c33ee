"""Sums over a matrix of logits that is never held whole: some rows at a time, each chunk's gradient taken at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK_ENTRIES = 2**21
"""Logits held at a time when the caller names no number of rows."""

ChunkLoss = Callable[..., Tensor]
"""(start, queries[start:stop], *shared) → the scalar loss of these rows."""


def sum_row_chunks(
    loss: ChunkLoss, queries: Tensor, shared: Sequence[Tensor], *, columns: int, chunk_rows: int | None = None
) -> Tensor:
    """Sum of `loss` over the rows of `queries` [n, d]. `shared`: what every chunk depends on, and may get a gradient.

    More than one chunk: each one's gradient is computed with it and added up, so that memory grows with the sizes of
    queries and shared, never with n · columns, and nothing is computed twice. `loss` must use no other tensor that
    needs a gradient.
    """
    size = chunk_rows or max(1, CHUNK_ENTRIES // columns)
    if size >= len(queries):
        return loss(0, queries, *shared)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, *shared))):
        return torch.stack(
            [loss(start, queries[start : start + size], *shared) for start in range(0, len(queries), size)]
        ).sum()
    return _SumRowChunks.apply(loss, size, queries, *shared)


class _SumRowChunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: ChunkLoss, size: int, queries: Tensor, *shared: Tensor) -> Tensor:
        total = queries.new_zeros(())
        needed = ctx.needs_input_grad[2:]
        gradients = [
            torch.zeros_like(tensor) if need else None for need, tensor in zip(needed, (queries, *shared), strict=True)
        ]
        for start in range(0, len(queries), size):
            # leaves of a graph of the chunk's own, freed before the next one is built
            leaves = [
                tensor.detach().requires_grad_(need)
                for need, tensor in zip(needed, (queries[start : start + size], *shared), strict=True)
            ]
            with torch.enable_grad():
                part = loss(start, *leaves)
            total += part.detach()
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            found = iter(torch.autograd.grad(part, wanted))
            for position, gradient in enumerate(gradients):
                if gradient is not None:
                    whole = gradient[start : start + size] if position == 0 else gradient
                    whole += next(found)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if saved is None else gradient * saved for saved in ctx.saved_tensors)
