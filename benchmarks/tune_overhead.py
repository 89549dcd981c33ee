"""Measure the overhead of a trial in a hyperparameter search, with Ray's defaults and as `htcl tune` runs it.

    python -m benchmarks.tune_overhead [--trials 6]

Runs searches with sequential trials on generated features, with a model that trains in seconds. The training time is
the loop's own: rows divided by rows per second, validation included. The remaining time between the ends of two trials
is overhead: the trial's process, Ray Train's controller, the worker processes and their imports, reading the songs, and
the end of the run. The first trial of a search starts everything and is excluded. "Ray's defaults" are a new process
for every trial, and results polled every 2 s.

Prints a table and writes benchmarks/results/tune_overhead.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result

VARIANTS = {
    "Ray's defaults": {"reuse_actors": False, "poll_seconds": "2"},
    "polled every 0.2 s": {"reuse_actors": False, "poll_seconds": "0.2"},
    "polled every 0.2 s, processes reused (htcl tune)": {"reuse_actors": True, "poll_seconds": "0.2"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the overhead of a trial in a search.")
    parser.add_argument(
        "--trials", type=int, default=6, help="trials of each search, the first of which is not counted"
    )
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.variant:
        search(options.variant, options.workspace, options.trials)
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(VARIANTS):
            workspace = Path(folder) / str(number)
            command = [sys.executable, "-m", "benchmarks.tune_overhead", "--trials", str(options.trials)]
            # Each variant needs a separate Ray.
            subprocess.run([*command, "--variant", variant, "--workspace", str(workspace)], check=True)
            results[variant] = summary(workspace)
    table = Table(title="A trial of a search, seconds (median)")
    for column in ("", "until training", "training", "after training", "not training", "share of a trial"):
        table.add_column(column, justify="left" if not column else "right")
    for variant, seconds in results.items():
        cells = [f"{seconds[name]:.1f}" for name in ("before", "training", "after", "overhead")]
        table.add_row(variant, *cells, f"{seconds['share']:.0%}")
    Console().print(table)
    write_result("tune_overhead", {"trials": options.trials, "variants": results})


def search(variant: str, workspace: Path, trials: int) -> None:
    """Run one search in this process, and write the end time of each trial to `ends` in the workspace."""
    chosen = VARIANTS[variant]
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = chosen["poll_seconds"]
    from htcl_ray.cluster import connection
    from htcl_ray.pipelines.tuning.tune import tune
    from tests.worlds.synthetic_features import tiny_config, write_features

    config = tiny_config(
        workspace,
        **{
            "tune.trials": trials,
            "tune.samples": 16 * 16 * 40,
            "tune.reports": 8,
            "tune.early_stopping": False,
            "tune.max_concurrent_trials": 1,
            "tune.space": {
                "pretrain.temperature": {"low": 0.02, "high": 0.5, "log": True},
                "pretrain.batch_size": [8, 16, 32],
            },
            "pretrain.num_workers": 1,
        },
    )
    write_features(config)
    connection.connect(config)
    from ray import tune as ray_tune

    from htcl_ray.pipelines.tuning.study import StudyCallback

    original = ray_tune.TuneConfig
    ray_tune.TuneConfig = lambda **given: original(**{**given, "reuse_actors": chosen["reuse_actors"]})
    ends: list[float] = []
    complete = StudyCallback.on_trial_complete

    def timed(self: StudyCallback, *arguments: Any, **info: Any) -> None:
        ends.append(time.time())
        complete(self, *arguments, **info)

    StudyCallback.on_trial_complete = timed  # type: ignore[method-assign]
    tune(config)
    (workspace / "ends").write_text(" ".join(map(str, ends)))


def summary(workspace: Path) -> dict[str, float]:
    """Return medians over all trials but the first."""
    from htcl_ray.tuning.study_folder import read_trials
    from htcl_ray.workspace.storage import Workspace

    ends = [float(word) for word in (workspace / "ends").read_text().split()]
    rows = []
    for trial, previous, end in zip(
        read_trials(Workspace(str(workspace)), "runs/tune/pretrain")[1:], ends, ends[1:], strict=False
    ):
        ((started, (_, seconds)),) = trial.attempts.items()
        training = trial.last["rows"] / trial.last["songs_per_second"]
        last_report = float(started) + seconds
        rows.append({"before": last_report - training - previous, "training": training, "after": end - last_report})
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    overhead = statistics.median(row["before"] + row["after"] for row in rows)
    return {**medians, "overhead": overhead, "share": overhead / (overhead + medians["training"])}


if __name__ == "__main__":
    main()
