"""Our training step beside a plain restatement of the published one (published_step.py), on the same data and sizes.

    python -m benchmarks.train_step [--batches 32 128] [--stages 1 2] [--seconds 8] [--device auto]

On the CPU: demo model size, both stages, fp32. With a GPU: paper size (1,251 frames, text tower of bert-base-multilingual-uncased's size
with random weights), stage 1, batch 32 to 8,192; ours in bf16 with SDPA, torch.compile and fused Adam, in micro-batches of at most
--micro-batch-size; theirs in fp32 in one pass. Batches are loaded before the clock runs. Every measurement is a process of its own; the
two sides alternate, and a figure is the median over the steps of all rounds. A size that does not fit is recorded as such.

Memory: peak beyond what there was when model, optimizer and data were made. On the CPU that is the process's resident memory, on a GPU
what torch allocated. Reading: batches loaded (memory-mapped log-mels, the file in the page cache; tokenisation) without training, and the
share of an epoch that the loop waits for them. TFLOP/s: multiplications and additions of matrix products and convolutions of one forward
pass (`flops`, which leaves out norms, activations and the optimizer), times 3 for forward and backward; what micro-batches compute again
is not counted. Prints tables and writes benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.resident_memory import in_own_process, resident_mb

if TYPE_CHECKING:
    import torch

    from benchmarks.synthetic_songs import World
    from htcl_ray.models import HTCL
    from htcl_ray.training.batches import Batch

SIZES = {"cpu": ("demo", [32, 128]), "cuda": ("paper", [32, 256, 2048, 8192])}
"""Model size and batches."""
ROUNDS = 2
WARMUP_STEPS = {"cpu": 1, "cuda": 3}
READ_BATCH, READ_STEPS = {"demo": 64, "paper": 256}, 16
PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}
"""Dense bf16 by part of the device's name, from the makers' data sheets; the first that matches."""


def peak_tflops(device_name: str) -> float | None:
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def flops(model: Any, frames: int, text_tokens: int, clips: int) -> int:
    """Of one forward pass over `clips` clips of `frames` frames and as many texts of `text_tokens` tokens, both towers and heads.

    A product [a, b] × [b, c] is 2·a·b·c. The logits are left out: they are under 1 % at any size measured here.
    """
    sizes, recipe, text = model.record.model, model.recipe, model.text_encoder.transformer.config
    length, inputs, total = frames, recipe.n_mels, 0
    for kernel in (5, 3, 3):
        length = (length - kernel) // 2 + 1
        total += length * sizes.conv_channels * inputs * kernel
        inputs = sizes.conv_channels
    width = sizes.width
    total += length * (inputs * width + width * width // sizes.position_groups * sizes.position_kernel)
    total += sizes.layers * _layer(length + 1, width, sizes.feed_forward)
    total += text.num_hidden_layers * _layer(text_tokens, text.hidden_size, text.intermediate_size) + text.hidden_size**2
    total += sum(p.numel() for head in (model.audio_head, model.text_head) for p in head.parameters() if p.ndim == 2)
    return 2 * total * clips


def _layer(tokens: int, width: int, feed_forward: int) -> int:
    """Multiplications of a Transformer layer: four projections, scores and mixing, feed-forward."""
    return tokens * (4 * width**2 + 2 * width * feed_forward) + 2 * tokens**2 * width


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One side at one size: seconds of its steps and memory."""
    import torch

    from benchmarks import synthetic_songs

    device, rows, stage = torch.device(case["device"]), case["batch"], case["stage"]
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", case["size"], rows * stage)
        model = synthetic_songs.make_model(world, stage, device)
        batch = synthetic_songs.first_batch(world, model, stage, rows, device)
        step = (our_step if case["side"] == "ours" else published_step)(case, world, model, device)
        before = _memory_mb(device)
        try:
            seconds = _timed(lambda: step(batch), case["seconds"], WARMUP_STEPS[device.type], device)
        except torch.cuda.OutOfMemoryError:
            return {"error": "out of memory"}
        frames = batch.mel.shape[1] if case["side"] == "ours" else world.config.audio.max_frames
        tokens = batch.tokens["input_ids"].shape[1]
        return {
            "seconds": seconds,
            "memory_before_mb": before["now"],
            "peak_memory_mb": _memory_mb(device)["peak"],
            "forward_flops": flops(model, frames, tokens, len(batch)),
            "frames": frames,
            "text_tokens": tokens,
        }


def our_step(case: dict[str, Any], world: World, model: HTCL, device: torch.device) -> Callable[[Batch], None]:
    """A step as the training loop takes it."""
    import torch

    from benchmarks import synthetic_songs
    from htcl_ray.training.optim import build_optimizer
    from htcl_ray.training.step import compute_gradients
    from htcl_ray.training.towers import compile_towers

    settings = world.config.pretrain if case["stage"] == 1 else world.config.finetune
    task = synthetic_songs.make_task(world, case["stage"], device)
    optimizer = build_optimizer(model.train(), settings)
    if device.type == "cuda":
        compile_towers(model, device)

    def step(batch: Batch) -> None:
        compute_gradients(model, batch, task, case["micro_batch_size"])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.clamp_temperatures()

    return step


def published_step(case: dict[str, Any], world: World, model: HTCL, device: torch.device) -> Callable[[Batch], None]:
    """The restated step, with a text tower like ours: it takes ours over."""
    from benchmarks.published_step import PublishedModel

    theirs = PublishedModel(world.config.model, world.config.audio, model.text_encoder.transformer, case["stage"]).to(device).train()
    optimizer = theirs.optimizer()

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        theirs.loss(batch).backward()
        optimizer.step()

    return step


def _timed(step: Callable[[], None], at_least: float, warmup: int, device: torch.device) -> list[float]:
    """Seconds of each step, for at least that many seconds and three steps."""
    for _ in range(warmup):
        step()
    _wait(device)
    seconds: list[float] = []
    while sum(seconds) < at_least or len(seconds) < 3:
        started = time.perf_counter()
        step()
        _wait(device)
        seconds.append(time.perf_counter() - started)
    return seconds


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _memory_mb(device: torch.device) -> dict[str, float]:
    import torch

    if device.type == "cuda":
        return {"now": torch.cuda.memory_allocated() / 1e6, "peak": torch.cuda.max_memory_allocated() / 1e6}
    return resident_mb()


def measure_reading(case: dict[str, Any]) -> dict[str, float]:
    """Songs read in a second without training, and the share of an epoch of stage 1 that the loop waits for them."""
    import numpy as np
    import torch

    from benchmarks import synthetic_songs
    from htcl_ray.training.batches import BatchLoader, BatchRows

    device, rows = torch.device(case["device"]), READ_BATCH[case["size"]]
    songs = READ_STEPS * rows
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", case["size"], songs)
        model = synthetic_songs.make_model(world, 1, device)
        loader = BatchLoader(world.songs, world.frames, model.text_encoder, None)
        batches = np.split(np.random.default_rng(0).permutation(world.songs.train), READ_STEPS)
        step = our_step({**case, "stage": 1, "micro_batch_size": None}, world, model, device)
        first = loader.load(batches[0]).to(device)
        for _ in range(WARMUP_STEPS[device.type]):
            step(first)
        started = time.perf_counter()
        for numbers in batches:
            loader.load(numbers)
        reading = time.perf_counter() - started
        waited, started = 0.0, time.perf_counter()
        asked = started
        for batch in loader.stream([BatchRows(step, 0, songs[:, None]) for step, songs in enumerate(batches)], epoch=0):
            waited += time.perf_counter() - asked
            step(batch.to(device))
            _wait(device)
            asked = time.perf_counter()
        epoch = time.perf_counter() - started
    return {
        "batch": rows,
        "songs": songs,
        "reading_songs_per_second": songs / reading,
        "epoch_songs_per_second": songs / epoch,
        "share_of_epoch_waiting": waited / epoch,
    }


def compare(case: dict[str, Any], micro_batch_size: int | None, peak: float | None) -> dict[str, Any]:
    """Both sides of one size, alternating."""
    micro = micro_batch_size if micro_batch_size is not None and case["batch"] > micro_batch_size else None
    sides: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for side in ("ours", "published"):
            found = in_own_process("benchmarks.train_step", {**case, "side": side, "micro_batch_size": micro if side == "ours" else None})
            if "error" in found or "error" in sides.get(side, {}):
                sides[side] = sides[side] if "error" in sides.get(side, {}) else found
            else:
                sides[side] = {**found, "seconds": sides.get(side, {}).get("seconds", []) + found["seconds"]}
    for side, found in sides.items():
        if "error" not in found:
            sides[side] = _figures(case, found, peak if side == "ours" else None)
    both = all("error" not in found for found in sides.values())
    ratio = {name: sides["ours"][name] / sides["published"][name] for name in ("songs_per_second", "step_memory_mb")} if both else None
    return {**{name: case[name] for name in ("stage", "batch")}, "micro_batch_size": micro, **sides, "ratio": ratio}


def _figures(case: dict[str, Any], found: dict[str, Any], peak: float | None) -> dict[str, Any]:
    seconds = statistics.median(found["seconds"])
    tflops = 3 * found["forward_flops"] / seconds / 1e12
    return {
        "songs_per_second": case["batch"] * case["stage"] / seconds,
        "seconds_per_step": {
            "median": seconds,
            "least": min(found["seconds"]),
            "most": max(found["seconds"]),
            "steps": len(found["seconds"]),
        },
        "memory_before_mb": found["memory_before_mb"],
        "peak_memory_mb": found["peak_memory_mb"],
        "step_memory_mb": found["peak_memory_mb"] - found["memory_before_mb"],
        "frames": found["frames"],
        "text_tokens": found["text_tokens"],
        "tflops": tflops,
        **({"share_of_peak": tflops / peak} if peak else {}),
    }


def gpu() -> dict[str, Any] | None:
    """Name and peak of the first GPU, asked in a process of its own so that this one holds none of it."""
    found = in_own_process("benchmarks.train_step", {"ask": "gpu"})
    return None if found.get("name") is None else {**found, "peak_bf16_tflops": peak_tflops(found["name"])}


def _ask_gpu() -> dict[str, Any]:
    import torch

    if not torch.cuda.is_available():
        return {"name": None}
    return {"name": torch.cuda.get_device_name(), "memory_gb": round(torch.cuda.get_device_properties(0).total_memory / 2**30)}


def show(device: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(
        "stage",
        "batch",
        "songs/s ours",
        "published",
        "ratio",
        "step MB ours",
        "published",
        "ratio",
        "TFLOP/s ours",
        "of peak",
        title=device,
    )

    def cell(found: dict[str, Any], name: str, form: str) -> str:
        return str(found["error"]) if "error" in found else format(found[name], form)

    for row in rows:
        ours, theirs, ratio = row["ours"], row["published"], row["ratio"] or {}
        table.add_row(
            f"{row['stage']}",
            f"{row['batch']}" + (f" / {row['micro_batch_size']}" if row["micro_batch_size"] else ""),
            *(cell(found, "songs_per_second", ".1f") for found in (ours, theirs)),
            f"{ratio['songs_per_second']:.2f}" if ratio else "–",
            *(cell(found, "step_memory_mb", ".0f") for found in (ours, theirs)),
            f"{ratio['step_memory_mb']:.2f}" if ratio else "–",
            cell(ours, "tflops", ".3g"),
            f"{ours['share_of_peak']:.1%}" if "share_of_peak" in ours else "–",
        )
    return table


def run(device: str, options: argparse.Namespace, peak: float | None) -> dict[str, Any]:
    size, batches = SIZES[device]
    stages = options.stages or ([1, 2] if device == "cpu" else [1])
    common = {"device": device, "size": size, "seconds": options.seconds}
    micro = options.micro_batch_size if device == "cuda" else None
    rows = []
    for stage in stages:
        for batch in options.batches or batches:
            rows.append(compare({**common, "stage": stage, "batch": batch}, micro, peak))
            print(f"{device}  stage {stage}  batch {batch}: done", flush=True)
    reading = in_own_process("benchmarks.train_step", {**common, "ask": "reading"})
    return {"size": size, "steps": rows, "reading": reading}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", help="rows of a batch (default: 32 128 on the CPU, 32 256 2048 8192 on a GPU)")
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2], help="default: both on the CPU, 1 on a GPU")
    parser.add_argument("--seconds", type=float, default=8.0, help="timed for at least this long in each round")
    parser.add_argument("--micro-batch-size", type=int, default=256, help="of ours on a GPU, where the batch is larger")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the CPU, and a GPU when there is one")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case = json.loads(options.measure)
        asked = {"gpu": lambda: _ask_gpu(), "reading": lambda: measure_reading(case)}
        print(json.dumps(asked.get(case.get("ask"), lambda: measure(case))()))
        return
    card = gpu()
    if options.device == "cuda" and card is None:
        parser.error("--device cuda: torch finds no GPU")
    devices = {"auto": ["cpu"] + (["cuda"] if card else []), "cpu": ["cpu"], "cuda": ["cuda"]}[options.device]
    peak = card["peak_bf16_tflops"] if card else None
    result: dict[str, Any] = {"gpu": card or "none: the GPU part was not run"}
    if card and peak is None:
        result["share_of_peak"] = f"left out: the peak of '{card['name']}' is not in PEAK_TFLOPS"
    for device in devices:
        result[device] = run(device, options, peak)
        Console(width=140).print(show(device, result[device]["steps"]))
        reading = result[device]["reading"]
        if "error" not in reading:
            rates = [f"{reading[f'{what}_songs_per_second']:.0f} songs/s" for what in ("reading", "epoch")]
            print(f"reading alone {rates[0]}, an epoch {rates[1]}, of which {reading['share_of_epoch_waiting']:.1%} is waiting for batches")
    print(f"written: {write_result('train_step', result)}")


if __name__ == "__main__":
    main()
