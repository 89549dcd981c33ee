"""The training loop of one stage, from its first step or a checkpoint to its last, without Ray."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from htcl_ray.config.sections import StageSettings
from htcl_ray.errors import StepError
from htcl_ray.losses.collectives import copy_from_first, rank, sum_over_workers, world_size
from htcl_ray.losses.stages import Terms
from htcl_ray.models.flops import TRAINING_PASSES, ForwardFlops, peak_tflops
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.batches import Batch, BatchLoader, BatchRows
from htcl_ray.training.checkpoint import TrainingState, gather_state, save_checkpoint
from htcl_ray.training.health import HealthWatch, refuse_equal_texts
from htcl_ray.training.micro_batch import compute_gradients, probe_micro_batch_size
from htcl_ray.training.optimization import (
    build_optimizer,
    compile_towers,
    freeze,
    learning_rate_factor,
    set_learning_rate,
)
from htcl_ray.training.order import global_batch, steps_per_epoch, worker_rows
from htcl_ray.training.progress_lines import Metrics, ProgressLines
from htcl_ray.training.randomness import seed_worker, set_rng_state
from htcl_ray.training.stage_tasks import Task
from htcl_ray.training.validation import validate, validation_gallery

COMPILED_SONGS = {"cpu": 4, "cuda": 64}
"""Kind of device → most songs that compiled towers are first tried on; the compiler also chooses by their number."""
SaveCheckpoint = Callable[[Path], None]
OnCheckpoint = Callable[[Metrics | None, int, SaveCheckpoint], None]


def train(
    model: HTCL,
    task: Task,
    loader: BatchLoader,
    settings: StageSettings,
    device: torch.device,
    *,
    on_checkpoint: OnCheckpoint,
    say: Callable[[str], None],
    resume: TrainingState | None = None,
    show_progress: bool = True,
) -> None:
    """Train `model` in place, from the first step or that of `resume` to the last.

    `on_checkpoint(metrics, step, save)` is called on every worker after each epoch, and within it every
    `checkpoint_every_steps` with no metrics; `save(folder)` writes a checkpoint to a folder; only one worker calls it.
    `say` prints lines, on the first worker only; without `show_progress`, progress lines are left out. Raises
    ConfigError or MismatchError, before the first step, when the text tower embeds different texts alike; StepError
    when a gradient is no longer a number, or when `settings.health` says to stop.
    """
    say = say if rank() == 0 else lambda line: None
    model.to(device)
    if resume is None:
        model.audio_encoder.fit_input(loader.sample())
    copy_from_first(model)
    if resume is None:
        refuse_equal_texts(model, loader.songs)
    freeze(model, settings)
    optimizer = build_optimizer(model, settings)
    batch = global_batch(task.rows, settings.global_batch_size, world_size())
    steps = steps_per_epoch(task.rows, batch)
    probed = settings.micro_batch_size == "auto"
    micro_batch_size = _micro_batch_size(
        model, task, loader, settings, batch // world_size(), device, resume=resume, say=say
    )
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    longest = loader.longest()
    flops = ForwardFlops(model, longest.features.shape[1], longest.tokens["input_ids"].shape[1])
    if settings.compile:
        rows = min(micro_batch_size or batch // world_size(), COMPILED_SONGS[device.type])
        compile_towers(model, loader.load_first_windows(loader.songs.train[:rows]), device, say)
    step = 0 if resume is None else resume.step
    sums = {
        name: torch.zeros((), device=device)
        for name in [*task.weights, "gradient_norm", "seconds_waiting_for_data", "padded_share", "tflop_a_song"]
    }
    if resume is not None:
        optimizer.load_state_dict(resume.optimizer)
        sums |= {name: value.to(device) for name, value in resume.sums_of(rank(), world_size()).items()}
        _print_differences(task, resume, micro_batch_size, say)
    rng = None if resume is None else resume.rng_of(rank(), world_size())
    seed_worker(settings.seed, rank(), step)
    gallery = validation_gallery(loader.songs.validation, task.validation_pairs)
    watch = None if settings.health.action == "off" else HealthWatch(task, loader, settings, device, step=step, say=say)
    if rng is not None:
        set_rng_state(rng, device)
    progress = ProgressLines(
        task, batch, settings.epochs, steps, start=step, say=say if show_progress else lambda line: None
    )
    while step < settings.epochs * steps:
        epoch, position = divmod(step, steps)
        model.train()
        order = task.order(epoch)
        first = rank() * (batch // world_size())
        own = [
            BatchRows(at, first, worker_rows(order, at, batch, rank(), world_size())) for at in range(position, steps)
        ]
        for songs in _timed(loader.stream(own, epoch), sums["seconds_waiting_for_data"]):
            set_learning_rate(optimizer, learning_rate_factor(step, settings.epochs * steps, settings))
            sums["padded_share"] += songs.padded_share(micro_batch_size and micro_batch_size * task.songs_per_row)
            operations = TRAINING_PASSES * flops.of(songs.valid_frames, songs.lengths_of_texts())
            sums["tflop_a_song"] += operations / len(songs) / 1e12
            terms = compute_gradients(model, songs.to(device), task, micro_batch_size)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_gradient_norm or math.inf)
            _refuse_non_finite(task, terms, norm, step)
            optimizer.step()
            optimizer.zero_grad()
            model.clamp_temperatures()
            step += 1
            for name, value in {**terms, "gradient_norm": norm / world_size()}.items():
                sums[name] += value.to(sums[name].dtype)
            progress.step(epoch, step, sums, model)
            if settings.checkpoint_every_steps and step % settings.checkpoint_every_steps == 0 and step % steps:
                on_checkpoint(
                    None, step, _saver(model, gather_state(step, micro_batch_size, probed, optimizer, sums, device))
                )
        metrics = _epoch_metrics(task, sums, steps)
        metrics |= {f"temperature_{name}": value for name, value in model.temperatures().items()}
        metrics |= {
            "epoch": epoch + 1,
            "step": step,
            "rows_seen": float(step * batch),
            "learning_rate": optimizer.param_groups[-1]["lr"],
        }
        metrics |= validate(model, loader, gallery)
        metrics |= {
            "songs_per_second": progress.songs_per_second(step),
            "peak_memory_gb": peak_memory_gb(device),
            "candidates": float(batch),
        }
        if peak is not None:
            metrics["mfu"] = metrics["tflop_a_song"] * metrics["songs_per_second"] / (peak * world_size())
        progress.epoch(metrics)
        if watch is not None:
            probe = watch.measure(model)
            metrics |= probe
            watch.check(probe, step)
        sums = {name: torch.zeros_like(value) for name, value in sums.items()}
        on_checkpoint(
            metrics, step, _saver(model, gather_state(step, micro_batch_size, probed, optimizer, sums, device))
        )


def _micro_batch_size(
    model: HTCL,
    task: Task,
    loader: BatchLoader,
    settings: StageSettings,
    local_rows: int,
    device: torch.device,
    *,
    resume: TrainingState | None,
    say: Callable[[str], None],
) -> int | None:
    """Return the configured micro-batch size, or measure it for `auto`.

    A resumed run with as many workers keeps the size that it measured before.
    """
    if settings.micro_batch_size != "auto":
        return settings.micro_batch_size
    if resume is not None and resume.probed and resume.workers == world_size():
        return resume.micro_batch_size
    rows = probe_micro_batch_size(model, loader.longest(), task.songs_per_row, local_rows, device)
    say(f"{task.name}  {rows} rows of {local_rows} fit a worker's memory at a time")
    return rows


def _print_differences(
    task: Task, resume: TrainingState, micro_batch_size: int | None, say: Callable[[str], None]
) -> None:
    """Print the differences to the run of the checkpoint that change the order of random numbers or of sums."""
    differences = []
    if resume.workers != world_size():
        differences.append(f"the checkpoint was made by {resume.workers} worker(s), now the run has {world_size()}")
    if resume.micro_batch_size != micro_batch_size:
        differences.append(
            f"the checkpoint was made with micro_batch_size {resume.micro_batch_size}, now it is {micro_batch_size}"
        )
    for difference in differences:
        say(f"{task.name}  {difference}; the run resumes, but not bit for bit as without the interruption")


def _timed(batches: Iterator[Batch], waited: Tensor) -> Iterator[Batch]:
    """Yield the batches; add the seconds spent waiting for each to `waited`."""
    while True:
        started = time.monotonic()
        songs = next(batches, None)
        if songs is None:
            return
        waited += time.monotonic() - started
        yield songs


def _refuse_non_finite(task: Task, terms: Terms, norm: Tensor, step: int) -> None:
    """Raise StepError for a gradient that is not finite, on all workers and before the weights change."""
    if not math.isfinite(norm.item()):
        losses = ", ".join(f"{name} {value.item():.3g}" for name, value in terms.items())
        raise StepError(
            f"{task.name}: the gradient of step {step + 1} has norm {norm.item()} "
            f"(this worker's share of the loss: {losses}); lower {task.name}.learning_rate, "
            f"or set {task.name}.max_gradient_norm and {task.name}.warmup_share"
        )


def _saver(model: HTCL, state: TrainingState) -> SaveCheckpoint:
    return lambda folder: save_checkpoint(folder, model, state)


def _epoch_metrics(task: Task, sums: dict[str, Tensor], steps: int) -> Metrics:
    """Average over the epoch's steps; a worker's terms are shares of the global batch's, so they are summed."""
    total = sum_over_workers(torch.stack(list(sums.values())))
    of = dict(zip(sums, total.tolist(), strict=True))
    terms = {f"loss_{name}": of[name] / steps for name in task.weights}
    loss = sum(weight * terms[f"loss_{name}"] for name, weight in task.weights.items())
    metrics = {"loss": loss, **terms, "gradient_norm": of["gradient_norm"] / steps}
    metrics |= {name: of[name] / steps / world_size() for name in ("padded_share", "tflop_a_song")}
    return {**metrics, "seconds_waiting_for_data": of["seconds_waiting_for_data"] / world_size()}


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far, in GB: allocated by torch on a GPU, resident memory of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
