"""The twenty kernels that take most of five of our training steps, stage 1, full clips. On the CPU: the operations
that take most time.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks import synthetic_songs
from benchmarks.gpu.step import MICRO_BATCH, TOY_MICRO_BATCH, busy_seconds, on_gpu
from benchmarks.gpu.units import Part, training_precision
from benchmarks.steps import our_step, wait

STEPS, TOP = 5, 20
ROWS = {"cuda": 256, "cpu": 8}


def run(part: Part) -> None:
    """One trace."""
    with tempfile.TemporaryDirectory() as scratch:
        part.run({f"stage 1, full, batch {ROWS[part.kind]}": lambda: trace(part, Path(scratch))})


def trace(part: Part, scratch: Path) -> dict[str, Any]:
    """Kernel → total time, calls and share of all GPU time."""
    rows, device = ROWS[part.kind], part.device
    world = synthetic_songs.make_world(scratch / "frames", "paper" if part.on_gpu else "demo", rows, "full")
    model = synthetic_songs.make_model(world, 1, device)
    batch = synthetic_songs.first_batch(world, model, 1, rows, device)
    step = our_step(world, model, 1, device, MICRO_BATCH if part.on_gpu else TOY_MICRO_BATCH, compiled=part.on_gpu)
    with training_precision("bf16", device):
        for _ in range(3):
            step(batch)
        wait(device)
        with profile(activities=[ProfilerActivity.CUDA if part.on_gpu else ProfilerActivity.CPU]) as profiled:
            started = time.perf_counter()
            for _ in range(STEPS):
                step(batch)
            wait(device)
            elapsed = time.perf_counter() - started
    events = [event for event in profiled.events() if on_gpu(event) == part.on_gpu]
    seconds: Counter[str] = Counter()
    calls = Counter(event.name for event in events)
    for event in events:
        seconds[event.name] += (event.time_range.elapsed_us() if part.on_gpu else event.self_cpu_time_total) / 1e6
    total = sum(seconds.values())
    kernels: list[dict[str, Any]] = [
        {"name": name[:160], "seconds": value, "share": value / total, "calls": calls[name]}
        for name, value in seconds.most_common(TOP)
    ]
    for kernel in kernels:
        milliseconds = 1000 * kernel["seconds"] / STEPS
        print(
            f"     {kernel['share']:6.1%}  {milliseconds:9.3f} ms a step  {kernel['calls']:6d} calls  {kernel['name'][:90]}",
            flush=True,
        )
    values: dict[str, Any] = {"steps": STEPS, "elapsed_seconds": elapsed, "kernels": kernels}
    if part.on_gpu:
        values["share_of_time_without_gpu_work"] = max(0.0, 1 - busy_seconds(events) / elapsed)
    shown = sum(kernel["share"] for kernel in kernels)
    return {
        **values,
        "line": f"{STEPS} steps in {elapsed:.2f} s; the {len(kernels)} kernels above are {shown:.0%} of {total:.2f} s of work",
    }
