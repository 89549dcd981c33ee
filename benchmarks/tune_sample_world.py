"""Whether a search finds something: its winner against the configuration as it is, on test songs that the search never
saw.

    python -m benchmarks.tune_sample_world [--seeds 0 1 2] [--trials 12] [--samples 4096] [--out FOLDER]

For each seed: a sample world of that seed, a search over stage 1 with the default space, and then two whole models,
trained as long as a trial and with the same seed: the demo preset as it is and the winner. Both are measured by `htcl
evaluate` on the test split. The search is judged on the validation split alone.

Prints a table and writes benchmarks/results/tune_sample_world.json. Done steps are skipped when --out is given again.
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
from htcl_ray.tuning.trials import read_trials, winners
from htcl_ray.workspace.storage import Workspace

STUDY = "runs/tune/pretrain"
FIGURES = ("recall@1", "recall@5", "recall@10", "mrr")


def main() -> None:
    parser = argparse.ArgumentParser(description="A search's winner against the configuration as it is, on test songs.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument(
        "--samples", type=int, default=4096, help="songs that a trial, and each of the two models, sees"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.out or Path(scratch)
        found = {seed: one_seed(folder / str(seed), seed, options.trials, options.samples) for seed in options.seeds}
    table = Table(title=f"Test songs, text → audio; {options.trials} trials of {options.samples} songs")
    for column in ("seed", "", *FIGURES, "winner's values"):
        table.add_column(column)
    for seed, result in found.items():
        for name in ("configured", "winner"):
            values = [f"{result[name][figure]:.3f}" for figure in FIGURES]
            table.add_row(str(seed), name, *values, json.dumps(result["parameters"]) if name == "winner" else "")
    means = {
        name: {figure: statistics.mean(result[name][figure] for result in found.values()) for figure in FIGURES}
        for name in ("configured", "winner")
    }
    for name, values in means.items():
        table.add_row("mean", name, *(f"{value:.3f}" for value in values.values()), "")
    Console().print(table)
    write_result(
        "tune_sample_world", {"trials": options.trials, "samples": options.samples, "mean": means, "seeds": found}
    )


def one_seed(folder: Path, seed: int, trials: int, samples: int) -> dict[str, Any]:
    """The search and the two models of one world."""
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
        "configured": test_figures(trial_config(config, {}, budget)),
        "winner": test_figures(trial_config(config, best.parameters, budget)),
        "parameters": best.parameters,
        "validation": {"configured": done[0].last["semantic"], "winner": best.last["semantic"]},
        "states": {state: sum(trial.state == state for trial in done) for state in ("finished", "stopped", "failed")},
        "seconds_of_search": round(took),
        "node_seconds": round(sum(trial.node_seconds for trial in done)),
    }


def test_figures(config: Config) -> dict[str, float]:
    """The model of this configuration on the test songs."""
    version = pretrain(config).location.rpartition("/")[2]
    embed(config, version)
    report = json.loads((Path(evaluate(config, version).location) / "report.json").read_text(encoding="utf-8"))
    return {figure: report["tasks"]["text_to_audio"]["methods"]["semantic"][figure]["value"] for figure in FIGURES}


if __name__ == "__main__":
    main()
