"""Training steps of this package and of the published code as functions of a batch, and their timing."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks import synthetic_songs
from benchmarks.published_step import PublishedModel
from benchmarks.synthetic_songs import World
from htcl_ray.models import HTCL
from htcl_ray.training.batches import Batch
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.optimization import build_optimizer, compile_towers

Step = Callable[[Batch], None]


def our_step(
    world: World,
    model: HTCL,
    stage: int,
    device: torch.device,
    micro_batch_size: int | None = None,
    *,
    compiled: bool = False,
) -> Step:
    """Build the step of the training loop. `compiled` compiles the towers of `model` in place."""
    settings = world.config.pretrain if stage == 1 else world.config.finetune
    task = synthetic_songs.make_task(world, stage, device)
    optimizer = build_optimizer(model.train(), settings)
    if compiled:
        sample = synthetic_songs.first_batch(world, model, 1, 64, torch.device("cpu"))
        compile_towers(model, sample, device, print)

    def step(batch: Batch) -> None:
        compute_gradients(model, batch, task, micro_batch_size)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_temperatures()

    return step


def published_step(world: World, text: torch.nn.Module, stage: int, device: torch.device) -> Callable[..., None]:
    """Build the reimplemented published step, which trains the BERT `text`; `step(batch, bf16=True)` uses autocast."""
    published = PublishedModel(world.config.model, world.config.audio, text, stage).to(device).train()
    optimizer = published.optimizer()

    def step(batch: Batch, bf16: bool = False) -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = published.loss(batch)
        loss.backward()
        optimizer.step()

    return step


def wait(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def timed(
    step: Callable[[], None], device: torch.device, *, at_least: float, warmup: int, steps: int = 3
) -> list[float]:
    """Time each step in seconds, after `warmup` steps, for at least `at_least` seconds and `steps` steps."""
    for _ in range(warmup):
        step()
    wait(device)
    seconds: list[float] = []
    while sum(seconds) < at_least or len(seconds) < steps:
        started = time.perf_counter()
        step()
        wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds
