"""Training steps of both stages: ours (bf16, micro-batches; compiled on a GPU) next to the published step; and one step
split up.

Songs/s are the median over steps after warm-up, batches loaded before the clock runs. Model TFLOP/s and MFU:
`ForwardFlops` of the valid frames and tokens, times 3; what padding and micro-batches compute on top is
not counted, so both lower the MFU. MFU is against the dense bf16 peak for every side, fp32 too, so that rows compare.
"""

from __future__ import annotations

import copy
import functools
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.autograd.profiler_util import FunctionEvent

from benchmarks import synthetic_songs
from benchmarks.gpu.units import Part, training_precision
from benchmarks.steps import Step, our_step, published_step, timed, wait
from benchmarks.synthetic_songs import MIXED_LENGTHS, World
from htcl_ray.models import HTCL
from htcl_ray.models.flops import TRAINING_PASSES, ForwardFlops, peak_tflops
from htcl_ray.training.batches import Batch, BatchLoader, encode
from htcl_ray.training.length_groups import GROUP_COST
from htcl_ray.training.optimization import build_optimizer

COMPILED, EAGER, ONE_GROUP = "ours", "ours, not compiled", "ours, one group"
BF16, FP32 = "published bf16", "published fp32"
CASES: list[tuple[int, str, int, tuple[str, ...]]] = [
    (1, "full", 256, (COMPILED, EAGER, BF16, FP32)),
    (1, "mixed", 256, (COMPILED, ONE_GROUP, BF16)),
    (1, "mixed", 2048, (COMPILED, ONE_GROUP, BF16)),
    (1, "full", 2048, (COMPILED, BF16)),
    (1, "full", 32, (COMPILED, EAGER, BF16)),
    (2, "full", 256, (COMPILED, EAGER, BF16, FP32)),
    (2, "mixed", 256, (COMPILED, ONE_GROUP, BF16)),
    (2, "mixed", 2048, (COMPILED,)),
    (2, "full", 32, (COMPILED, BF16)),
    (2, "full", 8192, (COMPILED,)),
    (1, "full", 8192, (COMPILED,)),
]
"""Stage, clips, rows of the batch, sides; the ones that matter most first, as the time may end. A change of stage makes
new models. ONE_GROUP pads all songs of a micro-batch to the longest, instead of groups of similar length."""
TOY_BATCHES = {32: 4, 256: 8, 2048: 12, 8192: 16}
"""On the CPU."""
MICRO_BATCH, TOY_MICRO_BATCH = 256, 8
"""Songs that ours encodes at a time."""
SPLIT_BATCH = 256
MIN_SECONDS = {"cuda": 2.0, "cpu": 0.0}
"""Each side of each case is timed for at least this long, and three steps."""
PROFILED_STEPS = 2


def run(part: Part) -> None:
    """Every case, and after the first of each stage the split of a step."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(part, Path(scratch))
        units: dict[str, Callable[[], dict[str, Any]]] = {}
        for stage, clips, batch, sides in CASES:
            for side in sides:
                units[f"stage {stage}, {clips}, batch {bench.rows(batch)}, {side}"] = bench.unit(
                    stage, clips, batch, side
                )
            if (clips, batch) == ("full", SPLIT_BATCH):
                units[f"split of stage {stage}, full, batch {bench.rows(batch)}"] = functools.partial(
                    bench.split, stage
                )
        part.run(units)


@dataclass(frozen=True)
class Sides:
    """Both sides of one stage, on the device."""

    stage: int
    model: HTCL
    """Ours; on a GPU its towers are compiled, on a CPU that would take longer than all the rest."""
    flops: ForwardFlops
    steps: dict[str, Step]


class Bench:
    """Worlds and models, made when a case first needs them; the models of one stage are held at a time."""

    def __init__(self, part: Part, scratch: Path) -> None:
        self.part, self.scratch = part, scratch
        self.size = "paper" if part.on_gpu else "demo"
        self.peak = peak_tflops(torch.cuda.get_device_name()) if part.on_gpu else None
        self.worlds: dict[str, World] = {}
        self.held: Sides | None = None
        self.songs_per_second: dict[str, float] = {}
        self.batch: tuple[tuple[int, str, int], Batch] | None = None

    def rows(self, batch: int) -> int:
        """Rows of a batch on this device."""
        return batch if self.part.on_gpu else TOY_BATCHES[batch]

    def unit(self, stage: int, clips: str, batch: int, side: str) -> Callable[[], dict[str, Any]]:
        """The measurement of one case."""
        return lambda: self.case(stage, clips, self.rows(batch), side)

    def world(self, clips: str) -> World:
        """Songs with clips of those lengths: enough for the largest batch of pairs."""
        if clips not in self.worlds:
            songs = 2 * max(self.rows(batch) for _, _, batch, _ in CASES)
            self.worlds[clips] = synthetic_songs.make_world(self.scratch / clips, self.size, songs, clips)  # type: ignore[arg-type]
        return self.worlds[clips]

    def sides(self, stage: int) -> Sides:
        """The models and steps of a stage. The published step, in both precisions, gets a text tower of its own, which
        is not compiled.
        """
        if self.held is None or self.held.stage != stage:
            self.held = self.batch = None
            gc.collect()
            world, device = self.world("full"), self.part.device
            model = synthetic_songs.make_model(world, stage, device)
            flops = ForwardFlops(model, world.config.audio.max_frames, min(64, world.config.text.max_tokens))
            text = copy.deepcopy(model.text_encoder.transformer)
            micro = MICRO_BATCH if self.part.on_gpu else TOY_MICRO_BATCH
            published = published_step(world, text, stage, device)
            own = our_step(world, model, stage, device, micro // stage, compiled=self.part.on_gpu)
            steps: dict[str, Step] = {
                COMPILED: own,
                EAGER: functools.partial(_not_compiled, own),
                ONE_GROUP: functools.partial(_in_one_group, own),
                BF16: functools.partial(published, bf16=True),
                FP32: published,
            }
            self.held = Sides(stage, model, flops, steps)
        return self.held

    def load(self, stage: int, clips: str, rows: int, model: Any) -> Batch:
        """The batch of a case, on the device; kept for the next side of the same case."""
        key = (stage, clips, rows)
        if self.batch is None or self.batch[0] != key:
            self.batch = None
            self.batch = key, synthetic_songs.first_batch(self.world(clips), model, stage, rows, self.part.device)
        return self.batch[1]

    def case(self, stage: int, clips: str, rows: int, side: str) -> dict[str, Any]:
        """One side of one case."""
        if (rate := self.songs_per_second.get(side)) and 6 * rows * stage / rate > self.part.seconds_left() - 10:
            return {"skipped": f"not measured: at {rate:.0f} songs/s it would outlast the part's time"}
        device = self.part.device
        sides = self.sides(stage)
        model, step = sides.model, sides.steps[side]
        batch = self.load(stage, clips, rows, model)
        frames, tokens = batch.valid_frames.tolist(), batch.tokens["attention_mask"].sum(dim=1).tolist()
        if self.part.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() / 1e9 if self.part.on_gpu else 0.0
        try:
            with training_precision("bf16" if side.startswith(COMPILED) else "fp32", device):
                started = time.perf_counter()
                step(batch)
                wait(device)
                first = time.perf_counter() - started
                seconds = timed(lambda: step(batch), device, at_least=MIN_SECONDS[self.part.kind], warmup=1)
                median = statistics.median(seconds)
                idle = self._idle_share(step, batch) if self.part.on_gpu and median < 3 else None
        finally:
            model.zero_grad()  # a step that ran out of memory leaves gradients behind
        rate, tflops = len(batch) / median, TRAINING_PASSES * sides.flops.of(frames, tokens) / median / 1e12
        self.songs_per_second[side] = rate
        if side in (COMPILED, EAGER):
            padded = batch.padded_share(MICRO_BATCH if self.part.on_gpu else TOY_MICRO_BATCH)
        else:
            longest = batch.features.shape[1] if side == ONE_GROUP else self.world(clips).config.audio.max_frames
            padded = 1 - sum(frames) / (longest * len(frames))
        values = {
            "songs_per_second": rate,
            "seconds_per_step": {"median": median, "least": min(seconds), "most": max(seconds), "steps": len(seconds)},
            "model_tflops": tflops,
            "mfu": tflops / self.peak if self.peak else None,
            "padded_share": padded,
            "share_of_time_without_gpu_work": idle,
            "memory_before_gb": held,
            "peak_memory_gb": torch.cuda.max_memory_allocated() / 1e9 if self.part.on_gpu else None,
            "first_step_seconds": first,
            "compilation_seconds": max(0.0, first - median) if side == COMPILED else 0.0,
        }
        if clips == "mixed":
            values["lengths"] = MIXED_LENGTHS
        shown = [f"{rate:,.0f} songs/s", f"{tflops:.3g} TFLOP/s"]
        shown += [f"MFU {values['mfu']:.1%}"] if self.peak else []
        shown += [f"padded {values['padded_share']:.0%}"]
        shown += [f"GPU idle {idle:.1%}"] if idle is not None else []
        shown += [f"peak {values['peak_memory_gb']:.1f} GB"] if self.part.on_gpu else []
        shown += [f"first step {first:.1f} s"]
        return {**values, "line": ", ".join(shown)}

    def _idle_share(self, step: Step, batch: Batch) -> float:
        """Share of the time of some steps in which no kernel or copy runs on the GPU."""
        from torch.profiler import ProfilerActivity, profile

        started = time.perf_counter()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            wait(self.part.device)
            started = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                step(batch)
            wait(self.part.device)
            elapsed = time.perf_counter() - started
        return max(0.0, 1 - busy_seconds(trace.events()) / elapsed)

    def split(self, stage: int) -> dict[str, Any]:
        """Seconds of the parts of our step, each alone with forward and backward, as a share of the whole step."""
        rows = self.rows(SPLIT_BATCH)
        sides = self.sides(stage)
        model, step = sides.model, sides.steps[COMPILED]
        world, device = self.world("full"), self.part.device
        batch = self.load(stage, "full", rows, model)
        micro = batch.part(0, min(len(batch), MICRO_BATCH if self.part.on_gpu else TOY_MICRO_BATCH))
        passes = len(batch) / len(micro)
        task = synthetic_songs.make_task(world, stage, device)
        optimizer = build_optimizer(model, world.config.pretrain)
        encoder, least = model.audio_encoder, MIN_SECONDS[self.part.kind] / 4

        def seconds(work: Callable[[], None]) -> float:
            return statistics.median(timed(work, device, at_least=least, warmup=1))

        with training_precision("bf16", device):
            whole = seconds(lambda: step(batch))
            parts = {"both towers and heads": passes * seconds(lambda: _both_ways(encode(model, micro)))}
            with torch.autocast(device.type, dtype=torch.bfloat16):
                parts["text tower and head"] = passes * seconds(lambda: _both_ways([model.encode_text(micro.tokens)]))
                frames, valid = encoder.prepare(micro.features.float(), micro.valid_frames)
                parts["convolutions"] = passes * seconds(lambda: _both_ways([_convolved(encoder, frames)]))
                tokens = encoder.projection(encoder.projection_norm(encoder.convolutions(frames))).detach()
                heads = world.config.model.heads
                q = (
                    tokens.new_empty(len(micro), heads, tokens.shape[1] + 1, tokens.shape[2] // heads)
                    .normal_()
                    .requires_grad_()
                )
                attended = None if valid is None else F.pad(valid, (1, 0), value=True)[:, None, None, :]
                once = seconds(lambda: _both_ways([F.scaled_dot_product_attention(q, q, q, attn_mask=attended)]))
                parts["audio attention (scores and mixing)"] = passes * len(encoder.layers) * once
            embeddings = [torch.randn(len(batch), model.dim, device=device, requires_grad=True) for _ in range(2)]
            parts["loss"] = seconds(lambda: _both_ways(task.terms(model, *embeddings, batch.ids).values()))
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

            def optimize() -> None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()

            parts["clipping and optimizer"] = seconds(optimize)
            model.zero_grad()
        loader = BatchLoader(world.songs, world.frames, model.text_encoder, None)
        numbers = np.arange(len(batch))
        started = time.perf_counter()
        loaded = loader.load(numbers)
        parts["data: loading in a thread (overlaps the step)"] = time.perf_counter() - started
        parts["data: copy to the device"] = seconds(lambda: wait_for(loaded.to(device), device))
        shares = {name: value / whole for name, value in parts.items()}
        listed = ", ".join(f"{name} {1000 * value:.1f} ms ({shares[name]:.0%})" for name, value in parts.items())
        return {
            "step_seconds": whole,
            "seconds": parts,
            "share_of_step": shares,
            "line": f"step {1000 * whole:.1f} ms: {listed}",
        }


def _not_compiled(step: Step, batch: Batch) -> None:
    with torch.compiler.set_stance("force_eager"):
        step(batch)


def _in_one_group(step: Step, batch: Batch) -> None:
    before = dict(GROUP_COST)
    GROUP_COST.update(dict.fromkeys(before, float("inf")))
    try:
        step(batch)
    finally:
        GROUP_COST.update(before)


def busy_seconds(events: Any) -> float:
    """Time in which at least one of the GPU's kernels or copies ran: the length of the union of their intervals."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted((event.time_range.start, event.time_range.end) for event in events if on_gpu(event)):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy / 1e6


def on_gpu(event: FunctionEvent) -> bool:
    """Whether the event is work of the GPU rather than of the process."""
    return event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False)


def wait_for(_: Any, device: torch.device) -> None:
    """The device has done all that it was given."""
    wait(device)


def _convolved(encoder: Any, frames: torch.Tensor) -> torch.Tensor:
    x = encoder.projection(encoder.projection_norm(encoder.convolutions(frames)))
    return x + encoder.position(x)


def _both_ways(outputs: Any) -> None:
    """Backward of the sum of the outputs, which may not need a gradient of their own inputs."""
    outputs = list(outputs)
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
