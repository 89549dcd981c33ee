"""A training step on songs of mixed lengths, encoded in groups of similar length and padded to the longest.

    python -m benchmarks.length_groups [--songs 128] [--steps 11]

The `demo` model on one thread of the CPU, both stages, the same batch; the two sides take turns, and the ratio is that of
the CPU time of neighbouring steps. Writes benchmarks/results/length_groups.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import synthetic_songs
from benchmarks.environment import write_result
from benchmarks.steps import our_step
from benchmarks.synthetic_songs import MIXED_LENGTHS
from htcl_ray.training.length_groups import GROUP_COST, length_groups, padded_share

CPU = torch.device("cpu")


def measure(stage: int, songs: int, steps: int, scratch: Path) -> dict[str, Any]:
    """Ratios of the CPU time of a step padded to the longest song to that of a step in groups."""
    world = synthetic_songs.make_world(scratch / f"stage-{stage}", "demo", songs, "mixed")
    model = synthetic_songs.make_model(world, stage, CPU)
    step = our_step(world, model, stage, CPU)
    batch = synthetic_songs.first_batch(world, model, stage, songs // stage, CPU)
    cost, ratios = GROUP_COST["cpu"], []
    for number in range(steps + 1):
        seconds = {}
        for is_grouped in (True, False) if number % 2 else (False, True):
            GROUP_COST["cpu"] = cost if is_grouped else float("inf")
            started = time.process_time()
            step(batch)
            seconds[is_grouped] = time.process_time() - started
        ratios.append(seconds[False] / seconds[True])
    GROUP_COST["cpu"] = cost
    lengths, ratios = batch.valid_frames, ratios[1:]  # the first is a warm-up
    return {
        "stage": stage,
        "songs": songs,
        "padded_share_in_one_group": padded_share(lengths, [torch.arange(len(lengths))]),
        "padded_share_in_groups": padded_share(lengths, length_groups(lengths, cost)),
        "time_ratio": {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=128)
    parser.add_argument("--steps", type=int, default=11)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        results = [measure(stage, options.songs, options.steps, Path(scratch)) for stage in (1, 2)]
    for result in results:
        ratio = result["time_ratio"]
        print(
            f"stage {result['stage']}: padding {result['padded_share_in_one_group']:.1%} → "
            f"{result['padded_share_in_groups']:.1%}, {ratio['median']:.2f} times as fast "
            f"({ratio['least']:.2f} to {ratio['most']:.2f})"
        )
    print(f"written: {write_result('length_groups', {'lengths': MIXED_LENGTHS, 'results': results})}")


if __name__ == "__main__":
    main()
