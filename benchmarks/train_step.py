"""Our training step on the CPU next to a plain restatement of the published one (published_step.py), on the same data
and sizes.

    python -m benchmarks.train_step [--batches 32 128] [--stages 1 2] [--seconds 8]

Demo model size, both stages, fp32; `python -m benchmarks.gpu` measures a GPU. Batches are loaded before the clock runs.
Every measurement is a process of its own; the two sides alternate, and a rate is the median over the steps of all
rounds. A size that does not fit is recorded as such.

Memory: peak resident memory beyond that when model, optimizer and data were made. Reading: batches loaded
(memory-mapped log-mels, the file in the page cache; tokenisation) without training, and the share of an epoch that the
loop waits for them. TFLOP/s: `ForwardFlops` times 3 for forward and backward. Prints tables and writes
benchmarks/results/train_step.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.resident_memory import in_own_process, resident_mb

SIZE, BATCHES = "demo", (32, 128)
ROUNDS = 2
READ_BATCH, READ_STEPS = 64, 16


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """One side at one size: seconds of its steps and memory."""
    import torch

    from benchmarks import synthetic_songs
    from benchmarks.steps import our_step, published_step, timed
    from htcl_ray.models.flops import TRAINING_PASSES, ForwardFlops

    device, rows, stage = torch.device("cpu"), case["batch"], case["stage"]
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", SIZE, rows * stage)
        model = synthetic_songs.make_model(world, stage, device)
        batch = synthetic_songs.first_batch(world, model, stage, rows, device)
        if case["side"] == "ours":
            step = our_step(world, model, stage, device)
        else:
            step = published_step(world, model.text_encoder.transformer, stage, device)
        before = resident_mb()["now"]
        seconds = timed(lambda: step(batch), device, at_least=case["seconds"], warmup=1)
        frames, tokens = batch.valid_frames.tolist(), batch.tokens["attention_mask"].sum(dim=1).tolist()
        return {
            "seconds": seconds,
            "memory_before_mb": before,
            "peak_memory_mb": resident_mb()["peak"],
            "step_flops": TRAINING_PASSES * ForwardFlops(model, max(frames), max(tokens)).of(frames, tokens),
        }


def measure_reading(_: dict[str, Any]) -> dict[str, float]:
    """Songs read in a second without training, and the share of an epoch of stage 1 that the loop waits for them."""
    import numpy as np
    import torch

    from benchmarks import synthetic_songs
    from benchmarks.steps import our_step
    from htcl_ray.training.batches import BatchLoader, BatchRows

    device, songs = torch.device("cpu"), READ_STEPS * READ_BATCH
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", SIZE, songs)
        model = synthetic_songs.make_model(world, 1, device)
        loader = BatchLoader(world.songs, world.frames, model.text_encoder, None)
        batches = np.split(np.random.default_rng(0).permutation(world.songs.train), READ_STEPS)
        step = our_step(world, model, 1, device)
        step(loader.load(batches[0]))
        started = time.perf_counter()
        for numbers in batches:
            loader.load(numbers)
        reading = time.perf_counter() - started
        waited, started = 0.0, time.perf_counter()
        requested = started
        for batch in loader.stream([BatchRows(step, 0, songs[:, None]) for step, songs in enumerate(batches)], epoch=0):
            waited += time.perf_counter() - requested
            step(batch)
            requested = time.perf_counter()
        epoch = time.perf_counter() - started
    return {
        "batch": READ_BATCH,
        "songs": songs,
        "reading_songs_per_second": songs / reading,
        "epoch_songs_per_second": songs / epoch,
        "share_of_epoch_waiting": waited / epoch,
    }


def compare(case: dict[str, Any]) -> dict[str, Any]:
    """Both sides of one size, alternating."""
    sides: dict[str, Any] = {}
    for _ in range(ROUNDS):
        for side in ("ours", "published"):
            measured = in_own_process("benchmarks.train_step", {**case, "side": side})
            if "error" in measured or "error" in sides.get(side, {}):
                sides[side] = sides[side] if "error" in sides.get(side, {}) else measured
            else:
                sides[side] = {**measured, "seconds": sides.get(side, {}).get("seconds", []) + measured["seconds"]}
    for side, measured in sides.items():
        if "error" not in measured:
            sides[side] = _summary(case, measured)
    both = all("error" not in measured for measured in sides.values())
    ratio = (
        {name: sides["ours"][name] / sides["published"][name] for name in ("songs_per_second", "step_memory_mb")}
        if both
        else None
    )
    return {**{name: case[name] for name in ("stage", "batch")}, **sides, "ratio": ratio}


def _summary(case: dict[str, Any], measured: dict[str, Any]) -> dict[str, Any]:
    seconds = statistics.median(measured["seconds"])
    return {
        "songs_per_second": case["batch"] * case["stage"] / seconds,
        "seconds_per_step": {
            "median": seconds,
            "least": min(measured["seconds"]),
            "most": max(measured["seconds"]),
            "steps": len(measured["seconds"]),
        },
        "memory_before_mb": measured["memory_before_mb"],
        "peak_memory_mb": measured["peak_memory_mb"],
        "step_memory_mb": measured["peak_memory_mb"] - measured["memory_before_mb"],
        "tflops": measured["step_flops"] / seconds / 1e12,
    }


def show(rows: list[dict[str, Any]]) -> Table:
    columns = (
        "stage",
        "batch",
        "songs/s ours",
        "published",
        "ratio",
        "step MB ours",
        "published",
        "ratio",
        "TFLOP/s ours",
    )
    table = Table(*columns, title="cpu")

    def cell(side: dict[str, Any], name: str, form: str) -> str:
        return str(side["error"]) if "error" in side else format(side[name], form)

    for row in rows:
        ours, published, ratio = row["ours"], row["published"], row["ratio"] or {}
        table.add_row(
            f"{row['stage']}",
            f"{row['batch']}",
            *(cell(side, "songs_per_second", ".1f") for side in (ours, published)),
            f"{ratio['songs_per_second']:.2f}" if ratio else "–",
            *(cell(side, "step_memory_mb", ".0f") for side in (ours, published)),
            f"{ratio['step_memory_mb']:.2f}" if ratio else "–",
            cell(ours, "tflops", ".3g"),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="rows of a batch (default: 32 128)")
    parser.add_argument("--stages", type=int, nargs="+", choices=[1, 2], default=[1, 2], help="default: both")
    parser.add_argument("--seconds", type=float, default=8.0, help="timed for at least this long in each round")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case = json.loads(options.measure)
        print(json.dumps(measure_reading(case) if case.get("reading") else measure(case)))
        return
    rows = []
    for stage in options.stages:
        for batch in options.batches:
            rows.append(compare({"stage": stage, "batch": batch, "seconds": options.seconds}))
            print(f"stage {stage}  batch {batch}: done", flush=True)
    reading = in_own_process("benchmarks.train_step", {"reading": True})
    Console(width=140).print(show(rows))
    if "error" not in reading:
        rates = [f"{reading[f'{what}_songs_per_second']:.0f} songs/s" for what in ("reading", "epoch")]
        print(
            f"reading alone {rates[0]}, an epoch {rates[1]}, of which {reading['share_of_epoch_waiting']:.1%} is waiting for batches"
        )
    print(f"written: {write_result('train_step', {'cpu': {'size': SIZE, 'steps': rows, 'reading': reading}})}")


if __name__ == "__main__":
    main()
