"""Training one stage, from its first epoch or a checkpoint to its last. No Ray: results leave through callbacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from htcl_ray.errors import StepError
from htcl_ray.models.htcl import HTCL
from htcl_ray.objectives.gather import copy_from_first, rank, sum_over_workers, world_size
from htcl_ray.settings import StageSettings
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.checkpoint import TrainingState, gather_state, save_checkpoint
from htcl_ray.training.optim import build_optimizer, learning_rate_factor, set_learning_rate
from htcl_ray.training.order import global_batch, steps_per_epoch, worker_rows
from htcl_ray.training.progress import Metrics, Progress
from htcl_ray.training.randomness import seed_worker, set_rng_state
from htcl_ray.training.step import compute_gradients
from htcl_ray.training.tasks import Task
from htcl_ray.training.validation import validate, validation_gallery

SaveCheckpoint = Callable[[Path], None]


def train(
    model: HTCL,
    task: Task,
    loader: BatchLoader,
    settings: StageSettings,
    device: torch.device,
    *,
    on_epoch: Callable[[Metrics, SaveCheckpoint], None],
    say: Callable[[str], None],
    resume: TrainingState | None = None,
) -> None:
    """Train `model` in place for the epochs that are left.

    `on_epoch(metrics, save)` is called on every worker after each epoch; `save(folder)` writes a checkpoint there and is for one worker
    to call. `say` gets progress lines, on the first worker only. Raises StepError when the loss is no longer a number.
    """
    copy_from_first(model)
    model.to(device)
    optimizer = build_optimizer(model, settings)
    seed_worker(settings.seed, rank())
    batch = global_batch(task.rows, settings.batch_size, world_size())
    steps = steps_per_epoch(task.rows, batch)
    done, step = 0, 0
    if resume is not None:
        done, step = resume.epoch, resume.step
        optimizer.load_state_dict(resume.optimizer)
        state = resume.rng_of(rank(), world_size())
        if state is not None:
            set_rng_state(state, device)
    gallery = validation_gallery(loader.songs.validation)
    progress = Progress(task, batch, settings.epochs, steps, start=step, say=say if rank() == 0 else lambda line: None)
    for epoch in range(done, settings.epochs):
        model.train()
        order = task.order(epoch)
        own = [worker_rows(order, position, batch, rank(), world_size()).T.reshape(-1) for position in range(steps)]
        sums = {name: torch.zeros((), device=device) for name in [*task.weights, "gradient_norm"]}
        for songs in loader.stream(own):
            set_learning_rate(optimizer, learning_rate_factor(step, settings.epochs * steps, settings))
            terms = compute_gradients(model, songs.to(device), task, settings.micro_batch_size)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm or math.inf)
            optimizer.step()
            optimizer.zero_grad()
            model.clamp_temperatures()
            step += 1
            for name, value in {**terms, "gradient_norm": norm / world_size()}.items():
                sums[name] += value.to(sums[name].dtype)
            progress.step(epoch, step, sums, model)
        metrics = _epoch_metrics(task, sums, steps)
        if not math.isfinite(metrics["loss"]) or not math.isfinite(metrics["gradient_norm"]):
            raise StepError(
                f"{task.name}: the loss of epoch {epoch + 1} is {metrics['loss']} and the gradient norm {metrics['gradient_norm']}; "
                f"lower {task.name}.learning_rate, or set {task.name}.max_gradient_norm and {task.name}.warmup_share"
            )
        metrics |= {f"temperature_{name}": value for name, value in model.temperatures().items()}
        metrics |= {"epoch": epoch + 1, "step": step, "learning_rate": optimizer.param_groups[-1]["lr"]}
        metrics |= validate(model, loader, gallery, task.validation_pairs)
        metrics |= {"songs_per_second": progress.songs_per_second(step), "candidates": float(batch)}
        progress.epoch(metrics)
        state_now = gather_state(epoch + 1, step, optimizer, device)
        on_epoch(metrics, lambda folder, state=state_now: save_checkpoint(folder, model, state))  # type: ignore[misc]


def _epoch_metrics(task: Task, sums: dict[str, Tensor], steps: int) -> Metrics:
    """Means over the epoch's steps; a worker's terms are shares of the global batch's, so they are added up."""
    total = sum_over_workers(torch.stack(list(sums.values()))) / steps
    means = dict(zip(sums, total.tolist(), strict=True))
    loss = sum(task.weights[name] * means[name] for name in task.weights)
    return {"loss": loss, **{f"loss_{name}": means[name] for name in task.weights}, "gradient_norm": means["gradient_norm"]}
