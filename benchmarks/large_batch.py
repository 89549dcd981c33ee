"""A batch of 4,096 songs on the CPU in micro-batches of 16: what it takes in memory, and that its gradients are the
one-pass ones.

    python -m benchmarks.large_batch [--batches 256 1024 4096] [--micro-batch-size 16]

Demo model size, stage 1; every size is a process of its own.

* Step: one training step (two-pass gradients, clipping, optimizer), with the peak resident memory of the whole process, libraries, data
  and model included. Memory that grows with B costs the same for every further song, memory that grows with B² costs more for each.
* Loss: the contrastive loss and its gradient alone, on random embeddings, where a full matrix of logits would be the largest thing.
* Gradients: both stages at batch 256, dropout 0, in micro-batches and in one pass; the largest difference of any entry of any parameter,
  temperatures included, as a share of the largest entry.

Prints tables and writes benchmarks/results/large_batch.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.resident_memory import in_own_process, resident_mb

LOSS_BATCHES = (1024, 4096, 16384)
EQUAL_AT = 256


def measure_step(case: dict[str, Any]) -> dict[str, float]:
    import torch

    from benchmarks import synthetic_songs
    from benchmarks.steps import our_step

    device = torch.device("cpu")
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", "demo", case["batch"])
        model = synthetic_songs.make_model(world, 1, device)
        before = resident_mb()["now"]
        batch = synthetic_songs.first_batch(world, model, 1, case["batch"], device)
        step = our_step(world, model, 1, device, case["micro_batch_size"])
        started = time.perf_counter()
        step(batch)
        return {
            "seconds": time.perf_counter() - started,
            "memory_before_mb": before,
            "peak_memory_mb": resident_mb()["peak"],
        }


def measure_loss(case: dict[str, Any]) -> dict[str, float]:
    import torch

    from benchmarks import synthetic_songs
    from htcl_ray.losses.stages import pretrain_terms

    rows = case["batch"]
    with tempfile.TemporaryDirectory() as scratch:
        model = synthetic_songs.make_model(
            synthetic_songs.make_world(Path(scratch) / "frames", "demo", 64), 1, torch.device("cpu")
        )
    ids = torch.arange(3 * rows).reshape(3, rows).T.contiguous()
    torch.manual_seed(0)
    audio, text = (torch.randn(rows, model.dim).requires_grad_() for _ in range(2))
    pretrain_terms(model, audio[:64], text[:64], ids[:64])["text"].backward()
    before = resident_mb()["now"]
    pretrain_terms(model, audio, text, ids)["text"].backward()
    peak = resident_mb()["peak"]
    return {
        "memory_before_mb": before,
        "loss_memory_mb": peak - before,
        "one_matrix_of_logits_mb": rows * rows * 4 / 1e6,
    }


def measure_equality(case: dict[str, Any]) -> dict[str, float]:
    import torch

    from benchmarks import synthetic_songs
    from htcl_ray.training.micro_batch import compute_gradients

    device, stage, dtype = torch.device("cpu"), case["stage"], getattr(torch, case["dtype"])
    with tempfile.TemporaryDirectory() as scratch:
        world = synthetic_songs.make_world(Path(scratch) / "frames", "demo", EQUAL_AT * stage)
        model = synthetic_songs.make_model(world, stage, device).to(dtype).eval()  # evaluation mode: dropout is 0
        batch = synthetic_songs.first_batch(world, model, stage, EQUAL_AT, device)
        task = synthetic_songs.make_task(world, stage, device)
        steps = []
        for micro in (None, case["micro_batch_size"]):
            model.zero_grad()
            compute_gradients(model, batch, task, micro)
            steps.append(
                {
                    name: parameter.grad.clone()
                    for name, parameter in model.named_parameters()
                    if parameter.grad is not None
                }
            )
    once, twice = steps
    assert set(once) == set(twice)
    largest = max(float(gradient.abs().max()) for gradient in once.values())
    difference = max(float((once[name] - twice[name]).abs().max()) for name in once)
    return {
        "parameters": len(once),
        "largest_entry": largest,
        "largest_difference": difference,
        "relative": difference / largest,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--micro-batch-size", type=int, default=16)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        case = json.loads(options.measure)
        print(
            json.dumps({"step": measure_step, "loss": measure_loss, "equality": measure_equality}[case["what"]](case))
        )
        return

    def own(what: str, **case: Any) -> dict[str, Any]:
        return {**case, **in_own_process("benchmarks.large_batch", {"what": what, **case})}

    micro = options.micro_batch_size
    steps = [own("step", batch=batch, micro_batch_size=micro) for batch in options.batches]
    for smaller, larger in pairwise(steps):
        if "error" not in smaller and "error" not in larger:
            further = larger["batch"] - smaller["batch"]
            larger["kb_per_further_song"] = 1000 * (larger["peak_memory_mb"] - smaller["peak_memory_mb"]) / further
    losses = [own("loss", batch=batch) for batch in LOSS_BATCHES]
    equal = [
        own("equality", stage=stage, dtype=dtype, micro_batch_size=micro)
        for stage in (1, 2)
        for dtype in ("float32", "float64")
    ]
    for title, rows in (
        ("step", steps),
        ("loss alone", losses),
        (f"gradients at batch {EQUAL_AT}, against one pass", equal),
    ):
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = Table(*(name.replace("_", " ") for name in columns), title=title)
        for row in rows:
            table.add_row(
                *(
                    f"{row[name]:.4g}" if isinstance(row.get(name), float) else str(row.get(name, "–"))
                    for name in columns
                )
            )
        Console(width=140).print(table)
    print(f"written: {write_result('large_batch', {'steps': steps, 'loss_alone': losses, 'gradients': equal})}")


if __name__ == "__main__":
    main()
