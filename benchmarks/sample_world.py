"""Evaluate the demo preset on the sample world over several seeds, with an ablation of each part of the method.

    python -m benchmarks.sample_world [--seeds 0 1 2] [--out FOLDER] [--no-ablations]

For each seed, generates a sample world, runs every step with the demo preset and that seed, collects the metrics, and
runs `htcl evaluate --ablate`: the method without each of its parts, and two controls, shuffled captions and shuffled
pairs. The table over all seeds shows means over seeds; its confidence intervals resample artists or users within each
seed's world.

Prints both tables and writes benchmarks/results/sample_world.json; with --no-ablations only the metrics of the full
method, to sample_world_full.json. Completed steps are skipped when --out is reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from htcl_ray.config import Config, resolve
from htcl_ray.demo_world import TEXT_COLUMNS, SampleTables, write_sample
from htcl_ray.evaluation.report.ablation_table import ablation_table, ablation_tree
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import MetricKey, from_table
from htcl_ray.pipelines.ablate import ablate
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.workspace.storage import Workspace


def configuration(workspace: Path, tables: SampleTables, seed: int) -> Config:
    return resolve("demo").with_overrides(
        {
            "workspace": str(workspace),
            "data.catalog": str(tables.catalog),
            "data.interactions": str(tables.interactions),
            "data.text_columns": TEXT_COLUMNS,
            "pretrain.seed": seed,
            "finetune.seed": seed,
            "evaluate.seed": seed,
        }
    )


def run(config: Config, *steps: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """Run the steps and then the evaluation; return its report and the seconds of each step."""
    seconds = {}
    for step in (*steps, evaluate):
        result = step(config)
        seconds[result.step] = round(result.seconds, 1)
    return json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8")), seconds


def value(report: dict[str, Any], task: str, method: str, metric: str) -> float:
    return report["tasks"][task]["methods"][method][metric]["value"]


def metrics(report: dict[str, Any]) -> dict[str, float]:
    """Collect the metrics of one seed for the table."""
    songs = report["data"]["songs"]
    stage_one, stage_two = (value(report, "cold", space, "ndcg@10") for space in ("semantic", "preference"))
    probe = {
        method: value(report, "probe_genre", method, "accuracy")
        for method in ("semantic", "preference", "commonest", "log_mel")
    }
    cold = ("semantic", "preference", "blend_0.5", "popularity", "random", "shuffled", "log_mel", "genre")
    return {
        "text→audio median rank / gallery, stage 1": value(report, "text_to_audio", "semantic", "median_rank") / songs,
        "text→audio median rank / gallery, stage 2": value(report, "text_to_audio", "preference", "median_rank")
        / songs,
        "text→audio recall@10, stage 1": value(report, "text_to_audio", "semantic", "recall@10"),
        "text→audio recall@10, stage 2": value(report, "text_to_audio", "preference", "recall@10"),
        "text→audio recall@10, chance": value(report, "text_to_audio", "random", "recall@10"),
        **{f"genre probe, {method}": accuracy for method, accuracy in probe.items()},
        "genre probe, stage 2 − stage 1": probe["preference"] - probe["semantic"],
        **{f"cold NDCG@10, {method}": value(report, "cold", method, "ndcg@10") for method in cold},
        "cold NDCG@10, stage 2 / stage 1": stage_two / stage_one,
        **{
            f"cold user AUC, {method}": value(report, "cold", method, "user_auc")
            for method in ("semantic", "preference", "log_mel")
        },
        **{
            f"cold item AUC, known users, {method}": value(report, "cold_known_users", method, "item_auc")
            for method in ("semantic", "preference", "popularity")
        },
        **{
            f"hot NDCG@10, {method}": value(report, "hot", method, "ndcg@10")
            for method in ("semantic", "preference", "popularity", "item_knn", "als")
        },
    }


def average(estimates: list[Estimate]) -> Estimate:
    """Average over seeds; worlds are independent, so resample r of each gives resample r of the mean."""
    resampled = [item.resampled for item in estimates]
    mean = (
        None
        if any(item is None for item in resampled)
        else np.mean(np.stack([item for item in resampled if item is not None]), axis=0)
    )
    value = statistics.mean(item.value for item in estimates)
    return Estimate(value, sum(item.n for item in estimates), mean, "all seeds")


def ablation_estimates(folder: Path, reports: dict[str, str]) -> dict[str, dict[MetricKey, Estimate]]:
    """Read the estimates of each variant from the reports below the workspace's `ablations/`."""
    places = {path.parent.name: path.parent for path in folder.glob("ablations/*/*/reports/*/figures.parquet")}
    return {
        variant: from_table(Workspace(str(places[name].parent)).read_tables(name)) for variant, name in reports.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder for worlds and workspaces (default: a temporary one)")
    parser.add_argument(
        "--no-ablations", action="store_true", help="only the full method; written to sample_world_full.json"
    )
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sample-world-"))
    results: dict[int, dict[str, float]] = {}
    sizes: dict[int, dict[str, Any]] = {}
    ablations: dict[int, dict[str, dict[MetricKey, Estimate]]] = {}
    for seed in options.seeds:
        folder = out.absolute() / f"seed-{seed}"
        started = time.monotonic()
        config = configuration(folder / "true", write_sample(folder / "sample", seed=seed), seed)
        report, seconds = run(config, preprocess, pretrain, finetune, embed, build_index)
        results[seed] = metrics(report)
        if not options.no_ablations:
            tree = json.loads((Path(ablate(config).location) / "report.json").read_text(encoding="utf-8"))
            ablations[seed] = ablation_estimates(folder / "true", tree["reports"])
        minutes = round((time.monotonic() - started) / 60, 1)
        sizes[seed] = {
            "seconds": seconds,
            "minutes" if options.no_ablations else "minutes_with_ablations": minutes,
            **report["data"],
            **report["tasks"]["cold"]["counts"],
        }
    mean = {name: statistics.mean(results[seed][name] for seed in results) for name in results[options.seeds[0]]}
    table = Table("metric", *(f"seed {seed}" for seed in results), "mean")
    for name, of_all in mean.items():
        table.add_row(name, *(f"{results[seed][name]:.3f}" for seed in results), f"{of_all:.3f}")
    Console().print(table)
    result: dict[str, Any] = {
        "config": resolve("demo").model_dump(mode="json"),
        "mean": mean,
        "seeds": results,
        "sizes": sizes,
    }
    if options.no_ablations:
        print(f"written: {write_result('sample_world_full', result)}; workspaces are in {out}")
        return
    variants = list(ablations[options.seeds[0]])
    shared = {
        variant: {
            key: average([ablations[seed][variant][key] for seed in options.seeds])
            for key in ablations[options.seeds[0]][variant]
            if all(key in ablations[seed][variant] for seed in options.seeds)
        }
        for variant in variants
    }
    over_seeds = ablation_tree(shared)
    Console(width=160).print(ablation_table(over_seeds))
    result |= {
        "ablation_over_seeds": over_seeds,
        "ablation_of_seed": {seed: ablation_tree(ablations[seed])["variants"] for seed in ablations},
    }
    print(f"written: {write_result('sample_world', result)}; workspaces are in {out}")


if __name__ == "__main__":
    main()
