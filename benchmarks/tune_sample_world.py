"""Compare the winner of a hyperparameter search with the unchanged configuration, on test songs.

    python -m benchmarks.tune_sample_world [--seeds 0 1 2] [--trials 12] [--samples 4096] [--out FOLDER]

For each seed, generates a sample world, runs a search over stage 1 with the default space, and trains two models as
long as a trial and with the same seed: the unchanged demo preset and the winner. Both are evaluated on the test split
by `htcl evaluate`; the search itself uses only the validation split.

Prints a table and writes benchmarks/results/tune_sample_world.json. Completed steps are skipped when --out is reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.sample_world import configuration
from htcl_ray.config import Config
from htcl_ray.demo_world import write_sample
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import pretrain
from htcl_ray.pipelines.tuning.tune import tune
from htcl_ray.tuning.budget import Budget, trial_config
from htcl_ray.tuning.study_folder import read_trials
from htcl_ray.tuning.trials import winners
from htcl_ray.workspace.storage import Workspace

STUDY = "runs/tune/pretrain"
METRICS = ("recall@1", "recall@5", "recall@10", "mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare a search's winner with the unchanged configuration.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument(
        "--samples", type=int, default=4096, help="training samples of a trial and of each of the two models"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        results = {seed: one_seed(folder / str(seed), seed, options.trials, options.samples) for seed in options.seeds}
    table = Table(title=f"Test songs, text → audio; {options.trials} trials of {options.samples} songs")
    for column in ("seed", "", *METRICS, "winner's values"):
        table.add_column(column)
    for seed, result in results.items():
        for name in ("configured", "winner"):
            values = [f"{result[name][metric]:.3f}" for metric in METRICS]
            table.add_row(str(seed), name, *values, json.dumps(result["parameters"]) if name == "winner" else "")
    means = {
        name: {metric: statistics.mean(result[name][metric] for result in results.values()) for metric in METRICS}
        for name in ("configured", "winner")
    }
    for name, values in means.items():
        table.add_row("mean", name, *(f"{value:.3f}" for value in values.values()), "")
    Console().print(table)
    write_result(
        "tune_sample_world", {"trials": options.trials, "samples": options.samples, "mean": means, "seeds": results}
    )


def one_seed(folder: Path, seed: int, trials: int, samples: int) -> dict[str, Any]:
    """Run the search and train the two models of one world."""
    tables = write_sample(folder / "sample", seed=seed)
    config = configuration(folder / "workspace", tables, seed).with_overrides(
        {"tune.trials": trials, "tune.samples": samples, "tune.seed": seed, "pretrain.num_workers": 1}
    )
    preprocess(config)
    took = tune(config).seconds
    workspace = Workspace(config.workspace)
    done = read_trials(workspace, STUDY)
    best = winners(done, ["semantic"])[0]
    per_report, reports = workspace.read_json(f"{STUDY}/study.json")["rows"]["pretrain"]
    budget = {"pretrain": Budget(per_report, reports)}
    return {
        "configured": test_metrics(trial_config(config, {}, budget)),
        "winner": test_metrics(trial_config(config, best.parameters, budget)),
        "parameters": best.parameters,
        "validation": {"configured": done[0].last["semantic"], "winner": best.last["semantic"]},
        "states": {state: sum(trial.state == state for trial in done) for state in ("finished", "stopped", "failed")},
        "seconds_of_search": round(took),
        "node_seconds": round(sum(trial.node_seconds for trial in done)),
    }


def test_metrics(config: Config) -> dict[str, float]:
    """Train a model with this configuration and evaluate it on the test songs."""
    version = pretrain(config).location.rpartition("/")[2]
    embed(config, version)
    report = json.loads((Path(evaluate(config, version).location) / "report.json").read_text(encoding="utf-8"))
    return {metric: report["tasks"]["text_to_audio"]["methods"]["semantic"][metric]["value"] for metric in METRICS}


if __name__ == "__main__":
    main()
