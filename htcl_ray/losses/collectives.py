"""Collectives of the training workers; the only module of the package that uses torch.distributed.

Without a process group every function is the one-worker case. All workers must call each function equally often and in
the same order.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from htcl_ray.errors import HtclError

PREPARATION = timedelta(days=1)
"""Longest wait for a worker that prepares its data; torch's own timeout of a collective is 30 minutes."""
BUCKET_BYTES = 32 * 2**20
"""Gradients are summed over workers in buckets of at most this size."""


def world_size() -> int:
    """Number of workers."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Rank of this worker, from 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Gather the rows [n, …] of every worker in order of rank, [W·n, …]; n is the same on every worker.

    Differentiable: the gradient of a worker's rows is the sum of the gradients of all workers' losses.
    """
    return rows if world_size() == 1 else cast("Callable[[Tensor], Tensor]", GatherRows.apply)(rows)


class GatherRows(torch.autograd.Function):
    """The differentiable gather of `gather_rows`."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        """Gather the rows of all workers."""
        parts = [torch.empty_like(rows) for _ in range(world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Sum the gradient over workers and return the part of this worker's rows."""
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)  # gloo has no reduce-scatter; rows·dim numbers are few next to the model
        own = len(gradient) // world_size()
        return gradient[rank() * own : (rank() + 1) * own]


def sum_over_workers(values: Tensor) -> Tensor:
    """Sum element-wise over workers, without gradient."""
    total = values.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def least_over_workers(value: int, device: torch.device) -> int:
    """The smallest of all workers' numbers; `device` is one that their backend supports."""
    least = torch.tensor(value, device=device)
    if world_size() > 1:
        dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return int(least)


def workers_on_this_machine(device: torch.device) -> int:
    """Number of workers on this worker's machine, itself included: those with the same host name."""
    name = torch.tensor([zlib.crc32(platform.node().encode())], device=device)
    return int((gather_rows(name) == name).sum())


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum every parameter's gradient over workers, in buckets; called once per step.

    Losses are divided by the global batch, so the sum is the gradient of one process on the whole batch.
    """
    if world_size() == 1:
        return
    bucket: list[Tensor] = []
    for gradient in [parameter.grad for parameter in parameters if parameter.grad is not None]:
        if bucket and (
            gradient.dtype != bucket[0].dtype or sum(t.nbytes for t in bucket) + gradient.nbytes > BUCKET_BYTES
        ):
            sum_in_place(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        sum_in_place(bucket)


def sum_in_place(tensors: list[Tensor]) -> None:
    """Sum tensors of one type over workers, in one collective."""
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, torch.split(flat, [tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def copy_from_first(module: nn.Module) -> None:
    """Copy the parameters and buffers of the first worker to all workers."""
    if world_size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


def wait_for_all() -> None:
    """Block until every worker has called this function."""
    if world_size() > 1:
        dist.barrier()


@contextmanager
def prepared_together() -> Iterator[None]:
    """Wait at the end of this block until every worker has ended it; an HtclError of one worker is raised on all.

    Without it, a worker that copies a large data set makes the first collective of the others time out, and one that
    raises leaves them waiting.
    """
    group = dist.new_group(backend="gloo", timeout=PREPARATION) if world_size() > 1 else None
    failure: HtclError | None = None
    try:
        yield
    except HtclError as error:
        failure = error
    if group is not None:
        failures: list[HtclError | None] = [None] * world_size()
        dist.all_gather_object(failures, failure, group=group)
        dist.destroy_process_group(group)
        failure = next((reported for reported in failures if reported is not None), None)
    if failure is not None:
        raise failure
