"""Starting real gloo processes."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing


def _process(rank: int, workers: int, store: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    try:
        work(*arguments)
    finally:
        dist.destroy_process_group()
    os._exit(0)  # rather than through the interpreter's end, where torch's own threads now and then abort the process


def run_workers(workers: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    """Run `work(*arguments)` in that many processes of one group; they meet at a file, so no port is needed."""
    multiprocessing.spawn(
        _process, (workers, str(folder / f"store-{uuid.uuid4().hex}"), work, arguments), nprocs=workers
    )
