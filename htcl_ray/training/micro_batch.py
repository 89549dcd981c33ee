"""The gradient of a batch, in one pass or in micro-batches with gradient caching, and their size for `auto`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from htcl_ray.errors import StepError
from htcl_ray.losses.collectives import least_over_workers, sum_gradients, workers_on_this_machine
from htcl_ray.losses.stages import Terms, total_loss
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.batches import AHEAD, Batch, encode
from htcl_ray.training.randomness import get_rng_state, set_rng_state
from htcl_ray.training.stage_tasks import Task

SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Share of the available memory to use: on a CPU the temporary memory of a layer is not counted, on a GPU it is."""
CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Files of limit and use and the reclaimable part of the use, of version 2 and version 1, below /sys/fs/cgroup."""


def compute_gradients(model: HTCL, batch: Batch, task: Task, micro_batch_size: int | None = None) -> Terms:
    """Compute every parameter's gradient of the loss of the global batch; return this worker's share of each term.

    `micro_batch_size`: rows encoded at a time, so memory does not grow with the batch; None encodes all at once.
    Gradients must be empty before the call.
    """
    songs_at_once = (micro_batch_size or len(batch)) * task.songs_per_row
    if songs_at_once >= len(batch):
        terms = task.terms(model, *encode(model, batch), batch.ids)
        torch.autograd.backward(total_loss(terms, task.weights))
    else:
        terms = _two_passes(model, batch, task, songs_at_once)
    sum_gradients(model.parameters())
    return {name: term.detach() for name, term in terms.items()}


def _two_passes(model: HTCL, batch: Batch, task: Task, songs_at_once: int) -> Terms:
    """Compute gradients in micro-batches with GradCache (arXiv 2101.06983).

    Encodes all micro-batches, takes the gradient of the loss with respect to the embeddings, encodes again and
    backpropagates it. The second encoding replays the random numbers of the first, so dropout is the same in both.
    Unlike GradCache, the first encoding also records its graph and drops it at once: with and without gradients, other
    kernels may run, above all when compiled, which may draw or round differently.
    """
    parts = [batch.part(start, start + songs_at_once) for start in range(0, len(batch), songs_at_once)]
    device = batch.features.device
    states, encoded = [], []
    for part in parts:
        states.append(get_rng_state(device))
        encoded.append([vectors.detach() for vectors in encode(model, part)])
    after = get_rng_state(device)
    audio, text = (torch.cat(vectors).requires_grad_() for vectors in zip(*encoded, strict=True))
    terms = task.terms(model, audio, text, batch.ids)
    torch.autograd.backward(total_loss(terms, task.weights))
    assert audio.grad is not None
    assert text.grad is not None
    for part, state, *gradients in zip(
        parts, states, torch.split(audio.grad, songs_at_once), torch.split(text.grad, songs_at_once), strict=True
    ):
        set_rng_state(state, device)
        torch.autograd.backward(encode(model, part), gradients)
    set_rng_state(after, device)
    return terms


def probe_micro_batch_size(
    model: HTCL, longest: Batch, songs_per_row: int, local_rows: int, device: torch.device
) -> int:
    """Measure the most rows, a power of two or all `local_rows`, that fit the memory of every worker.

    All workers must call it, before compiling. `longest` is one song of the largest size in training
    (`BatchLoader.longest`), on the CPU. On a GPU, growing numbers of such songs are encoded and differentiated until
    memory runs out. On a CPU, where that would end the process, the memory of the graph of a few rows is counted and
    extrapolated. Parameters, gradients and random numbers are left unchanged. Raises StepError, on every worker, when
    not even one row fits.
    """
    with left_untouched(model, device):
        budget = SHARE[device.type] * available_bytes(device) - constant_bytes(
            model, longest, songs_per_row * local_rows
        )
        peak = (
            partial(measure_peak, model, longest, device)
            if device.type == "cuda"
            else _extrapolated(model, longest, device)
        )
        rows = most_rows(local_rows, lambda rows: peak(rows * songs_per_row), budget)
    rows = least_over_workers(rows, device)
    if rows == 0:
        raise StepError(
            f"not one row with a clip of {longest.features.shape[1]} frames fits the memory of every worker; "
            "set model.window_seconds, make the model smaller, or give the workers more memory"
        )
    return rows


def most_rows(local_rows: int, peak_bytes: Callable[[int], float], budget: float) -> int:
    """The most rows within the budget among 1, 2, 4, … and `local_rows`, tried in rising order; 0 if none fits."""
    sizes = [2**power for power in range(local_rows.bit_length()) if 2**power < local_rows]
    most = 0
    for rows in [*sizes, local_rows]:
        if peak_bytes(rows) > budget:
            break
        most = rows
    return most


def measure_peak(model: HTCL, longest: Batch, device: torch.device, songs: int) -> float:
    """Peak bytes of encoding and differentiating, or infinity if the GPU runs out of memory."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        encoded = encode(model, repeat_song(longest, songs).to(device))
        torch.autograd.backward(encoded, [torch.ones_like(vectors) for vectors in encoded])
    except torch.cuda.OutOfMemoryError:
        return math.inf
    finally:
        model.zero_grad()
    return torch.cuda.max_memory_allocated(device) - before


def _extrapolated(model: HTCL, longest: Batch, device: torch.device) -> Callable[[int], float]:
    """Extrapolate the bytes that the graph of a number of songs keeps from two small graphs.

    Memory of two songs or more is laid out alike; that of one is not.
    """
    two, four = (kept_bytes(model, repeat_song(longest, count).to(device)) for count in (2, 4))
    return lambda songs: two + (songs - 2) * (four - two) / 2


def kept_bytes(model: HTCL, batch: Batch) -> int:
    """Count the bytes that the graph of encoding a batch keeps for the backward pass."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        # Named, so that the graph lives, and its addresses are not reused, until all are noted.
        encoded = encode(model, batch)
    del encoded
    return sum(kept.values())


def repeat_song(song: Batch, count: int) -> Batch:
    """Batch of one song, repeated without copying."""

    def repeat(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    return Batch(
        repeat(song.features),
        repeat(song.valid_frames),
        {name: repeat(t) for name, t in song.tokens.items()},
        repeat(song.ids),
    )


def constant_bytes(model: HTCL, longest: Batch, songs: int) -> int:
    """Bytes that do not depend on the micro-batch: gradients, two moments, a batch and those being loaded."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return 3 * trained + (1 + AHEAD) * songs * longest.features.nbytes


def available_bytes(device: torch.device) -> float:
    """Bytes that this worker may use: free memory, divided evenly among workers that share it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return free_memory() / workers_on_this_machine(device)


def free_memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory available to new allocations: of the machine, or of the container if that is less."""
    try:
        fields = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux: half of the installed memory
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    for limit_file, used_file, reclaimable in CGROUPS:
        limit, used = cgroup / limit_file, cgroup / used_file
        if limit.is_file() and used.is_file() and (bytes_allowed := limit.read_text(encoding="ascii").strip()) != "max":
            statistics = dict(
                line.split() for line in used.with_name("memory.stat").read_text(encoding="ascii").splitlines()
            )
            in_use = int(used.read_text(encoding="ascii")) - int(statistics.get(reclaimable, 0))
            free = min(free, max(0, int(bytes_allowed) - in_use))
    return free


@contextmanager
def left_untouched(model: HTCL, device: torch.device) -> Iterator[None]:
    """Switch to training mode without gradients; restore mode, gradients and random numbers afterwards."""
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    state, was_training = get_rng_state(device), model.training
    model.train()
    model.zero_grad()
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        model.train(was_training)
        set_rng_state(state, device)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
