"""The base class of losses, and their evaluation in chunks of rows, so that no matrix of logits is held whole.

Shapes: n queries of this process, m keys of all processes (n = m in one process), d dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses.false_negatives import Excluded, exclude_negatives

CHUNK_ENTRIES = 2**21
"""Logits held at a time unless the caller gives a number of rows."""

Matching = Callable[[int, int, Tensor], Tensor]
"""`matching(start, stop, excluded)` → bool [stop − start, m]: keys, of the excluded ones, that match these query
rows."""
ChunkLoss = Callable[..., Tensor]
"""(start, queries[start:stop], *shared) → the scalar loss of these rows."""


@dataclass(frozen=True)
class ContrastiveLoss(ABC):
    """A loss between matching rows of two sets of embeddings, with the values of its learned parameters.

    Subclasses are frozen dataclasses. Each field is a learned scalar, of which a model has one per loss term, stored
    under the field's name.
    """

    logit_scale: Tensor
    """s: logits are cosine · exp(s), so the temperature is exp(−s)."""

    directions: ClassVar[int]
    """2: audio-to-text and text-to-audio are computed apart and averaged; 1: each pair of rows counts once."""

    @classmethod
    @abstractmethod
    def initial_parameters(cls, temperature: float, batch_size: int) -> dict[str, float]:
        """Initial values of the learned parameters, by field; `batch_size` is the global one."""

    @classmethod
    @abstractmethod
    def chance_level(cls, num_candidates: int) -> float | None:
        """Value for equal embeddings, which carry no information; None where it depends on the learned parameters."""

    def several_positives(self, queries: Tensor, keys: Tensor, matches: Tensor, excluded: Tensor) -> Tensor:
        """Sum of the loss over queries that match several keys each. Scalar.

        As `rows`, but with matches [n, m] bool, at least one in a row. Only losses whose entry in the registry says so
        implement it.
        """
        raise NotImplementedError

    @abstractmethod
    def rows(
        self, queries: Tensor, keys: Tensor, positives: Tensor, excluded: Tensor | None, log_q: Tensor | None
    ) -> Tensor:
        """Sum of the loss over queries. Scalar.

        queries [n, d] and keys [m, d] of unit norm; positives [n], the key that matches each query; excluded [n, m]
        bool, keys that are no negatives of a query, or None; log_q [m], see `sum_rows`.
        """

    def __call__(
        self, first: Tensor, second: Tensor, *, excluded: Tensor | None = None, chunk_rows: int | None = None
    ) -> Tensor:
        """Mean over matching rows of first and second [n, d], in one process; arguments as in `info_nce`. Scalar."""
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
        mask = None if excluded is None else lambda start, stop: excluded[start:stop]
        total = self.sum_rows(first, second, excluded=mask, chunk_rows=chunk_rows)
        if self.directions == 2:
            mask = None if excluded is None else lambda start, stop: excluded[:, start:stop].T
            total = total + self.sum_rows(second, first, excluded=mask, chunk_rows=chunk_rows)
        return total / (self.directions * len(first))

    def sum_rows(
        self,
        queries: Tensor,
        keys: Tensor,
        *,
        first_positive: int = 0,
        excluded: Excluded | None = None,
        log_q: Tensor | None = None,
        matching: Matching | None = None,
        chunk_rows: int | None = None,
    ) -> Tensor:
        """Sum of the loss over queries in one direction. Scalar. Memory grows with (n + m)·d, not with n·m.

        queries [n, d] and keys [m, d] of unit norm. The positive of query i is key `first_positive` + i, which always
        counts. Keys that `excluded` marks are left out.

        `log_q` [m]: log of the probability with which each key was drawn into the batch. It is subtracted from every
        logit, the positive's included (Bengio & Senécal 2008; Yi et al., RecSys 2019): the more keys, the closer the
        gradient is to that of the softmax over all songs, each counted once, however unevenly the keys are drawn.

        `matching` finds further keys that match a query, among those that `excluded` marks (which must be given, and
        `log_q` not): they become positives too.
        """

        def chunk(start: int, queries: Tensor, keys: Tensor, *parameters: Tensor) -> Tensor:
            stop = start + len(queries)
            positives = first_positive + torch.arange(start, stop, device=queries.device)
            mask = exclude_negatives(excluded, start, stop, positives)
            loss = type(self)(*parameters)
            if matching is None:
                return loss.rows(queries, keys, positives, mask, log_q)
            assert mask is not None, "keys that match are among the excluded ones"
            assert log_q is None, "several positives are not corrected for popularity"
            matches = matching(start, stop, mask).scatter(1, positives[:, None], True)
            return loss.several_positives(queries, keys, matches, mask)

        parameters = [getattr(self, field.name) for field in fields(self)]
        return sum_row_chunks(chunk, queries, (keys, *parameters), columns=len(keys), chunk_rows=chunk_rows)


def parameters_of(loss: type[ContrastiveLoss]) -> tuple[str, ...]:
    """Names of a loss's learned parameters."""
    return tuple(field.name for field in fields(loss))


def sum_row_chunks(
    loss: ChunkLoss, queries: Tensor, shared: Sequence[Tensor], *, columns: int, chunk_rows: int | None = None
) -> Tensor:
    """Sum of `loss` over the rows of `queries` [n, d], in chunks; all chunks use the tensors of `shared`.

    With more than one chunk, the gradient of each is computed together with its value and added up, so memory grows
    with the sizes of queries and shared, never with n · columns, and nothing is computed twice. `loss` must use no
    other tensor that needs a gradient.
    """
    size = chunk_rows or max(1, CHUNK_ENTRIES // columns)
    if size >= len(queries):
        return loss(0, queries, *shared)
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (queries, *shared))):
        return torch.stack(
            [loss(start, queries[start : start + size], *shared) for start in range(0, len(queries), size)]
        ).sum()
    return cast("Callable[..., Tensor]", _SumRowChunks.apply)(loss, size, queries, *shared)


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
            part_gradients = iter(torch.autograd.grad(part, [leaf for leaf in leaves if leaf.requires_grad]))
            for position, gradient in enumerate(gradients):
                if gradient is not None:
                    whole = gradient[start : start + size] if position == 0 else gradient
                    whole += next(part_gradients)
        ctx.save_for_backward(*gradients)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(None if saved is None else gradient * saved for saved in ctx.saved_tensors)
