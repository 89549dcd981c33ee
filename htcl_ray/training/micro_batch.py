"""How many rows a worker can encode at a time: `micro_batch_size: auto`."""

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
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.randomness import get_rng_state, set_rng_state
from htcl_ray.training.stage_tasks import Task

SHARE = {"cpu": 0.5, "cuda": 0.9}
"""Of the memory that is available: on a CPU what one layer needs in passing is not counted, on a GPU it is measured."""
CGROUPS = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
)
"""Limit, use, and the part of the use that is given up on demand: version 2 and version 1, below /sys/fs/cgroup."""


def compute_gradients(model: HTCL, batch: Batch, task: Task, micro_batch_size: int | None = None) -> Terms:
    """Fill every parameter's gradient with that of the loss of the global batch; return this worker's share of each
    term.

    `micro_batch_size`: rows encoded at a time, so memory does not grow with the batch; None encodes all at once.
    Gradients must be empty before.
    """
    songs_at_once = (micro_batch_size or len(batch)) * task.songs_per_row
    if songs_at_once >= len(batch):
        terms = task.terms(model, *encode(model, batch), batch.ids)
        total_loss(terms, task.weights).backward()
    else:
        terms = _two_passes(model, batch, task, songs_at_once)
    sum_gradients(model.parameters())
    return {name: term.detach() for name, term in terms.items()}


def _two_passes(model: HTCL, batch: Batch, task: Task, songs_at_once: int) -> Terms:
    """Cached-embedding gradients: encode, take the loss's gradient of the embeddings, encode again and hand it on.

    The second encoding replays the first one's random numbers, so dropout is the same in both. The scheme is GradCache
    (arXiv 2101.06983), but the first encoding records its graph too and drops it at once: what is computed for a
    gradient may use other kernels than what is not, above all when compiled, and those may draw or round otherwise.
    """
    parts = [batch.part(start, start + songs_at_once) for start in range(0, len(batch), songs_at_once)]
    device = batch.mel.device
    states, encoded = [], []
    for part in parts:
        states.append(get_rng_state(device))
        encoded.append([vectors.detach() for vectors in encode(model, part)])
    after = get_rng_state(device)
    audio, text = (torch.cat(vectors).requires_grad_() for vectors in zip(*encoded, strict=True))
    terms = task.terms(model, audio, text, batch.ids)
    total_loss(terms, task.weights).backward()
    assert audio.grad is not None
    assert text.grad is not None
    for part, state, *gradients in zip(
        parts, states, audio.grad.split(songs_at_once), text.grad.split(songs_at_once), strict=True
    ):
        set_rng_state(state, device)
        torch.autograd.backward(encode(model, part), gradients)
    set_rng_state(after, device)
    return terms


def probe_micro_batch_size(
    model: HTCL, longest: Batch, songs_per_row: int, local_rows: int, device: torch.device
) -> int:
    """The most rows, a power of two or all `local_rows`, that fit the memory of every worker. All workers must call it.

    `longest` is one song as large as training may meet it (`BatchLoader.longest`), on the CPU. On a GPU growing numbers
    of such songs are encoded and differentiated until memory runs short. On a CPU, where running short would end the
    process, what the graph of a few rows keeps is counted and extrapolated. Parameters, gradients and random numbers
    are left as they were. To be called before compiling. Raises StepError, on every worker, when not even one row fits.
    """
    with _left_untouched(model, device):
        budget = SHARE[device.type] * _available(device) - _fixed(model, longest, songs_per_row * local_rows)
        peak = (
            partial(_measured, model, longest, device)
            if device.type == "cuda"
            else _extrapolated(model, longest, device)
        )
        found = most_rows(local_rows, lambda rows: peak(rows * songs_per_row), budget)
    found = least_over_workers(found, device)
    if found == 0:
        raise StepError(
            f"not one row with a clip of {longest.mel.shape[1]} frames fits the memory of every worker; "
            "set model.window_seconds, make the model smaller, or give the workers more memory"
        )
    return found


def most_rows(local_rows: int, peak_bytes: Callable[[int], float], budget: float) -> int:
    """The most rows within the budget among 1, 2, 4, … and `local_rows`; 0 when one is too many. Asks from below, and
    stops.
    """
    sizes = [2**power for power in range(local_rows.bit_length()) if 2**power < local_rows]
    found = 0
    for rows in [*sizes, local_rows]:
        if peak_bytes(rows) > budget:
            break
        found = rows
    return found


def _measured(model: HTCL, longest: Batch, device: torch.device, songs: int) -> float:
    """Bytes that encoding and differentiating takes at its peak, or infinity when the GPU has not as many."""
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        encoded = encode(model, _repeated(longest, songs).to(device))
        torch.autograd.backward(encoded, [torch.ones_like(vectors) for vectors in encoded])
    except torch.cuda.OutOfMemoryError:
        return math.inf
    finally:
        model.zero_grad()
    return torch.cuda.max_memory_allocated(device) - before


def _extrapolated(model: HTCL, longest: Batch, device: torch.device) -> Callable[[int], float]:
    """Songs → bytes that their graph keeps, from two small graphs. Two songs are the least that is laid out like
    many.
    """
    two, four = (_kept_bytes(model, _repeated(longest, count).to(device)) for count in (2, 4))
    return lambda songs: two + (songs - 2) * (four - two) / 2


def _kept_bytes(model: HTCL, batch: Batch) -> int:
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        encoded = encode(
            model, batch
        )  # named, so that the graph and the addresses that it keeps live until all are noted
    del encoded
    return sum(kept.values())


def _repeated(song: Batch, count: int) -> Batch:
    def repeat(tensor: Tensor) -> Tensor:
        return tensor.expand(count, *tensor.shape[1:])

    return Batch(
        repeat(song.mel),
        repeat(song.valid_frames),
        {name: repeat(t) for name, t in song.tokens.items()},
        repeat(song.ids),
    )


def _fixed(model: HTCL, longest: Batch, songs: int) -> int:
    """Bytes that training holds whatever the micro-batch: gradients, two moments, and two batches, one being loaded."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return 3 * trained + 2 * songs * longest.mel.nbytes


def _available(device: torch.device) -> float:
    """Bytes that this worker may take: what nobody uses, shared evenly by the workers of this machine where they share
    it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    return _free_memory() / workers_on_this_machine(device)


def _free_memory(cgroup: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes of memory that new allocations can have: of the machine, or of the container where that is less."""
    try:
        fields = dict(line.split(":") for line in meminfo.read_text(encoding="ascii").splitlines())
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except OSError:  # no Linux: all that is built in, as if half of it were in use
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
def _left_untouched(model: HTCL, device: torch.device) -> Iterator[None]:
    """Training mode, and gradients put aside; afterwards mode, gradients and random numbers are what they were."""
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
