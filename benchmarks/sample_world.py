"""Evaluate the demo preset on the sample world over several seeds, with an ablation of each part of the method.

    python -m benchmarks.sample_world [--seeds 0 1 2] [--out FOLDER] [--no-ablations] [--set KEY=VALUE ...] [--name NAME]

For each seed, generates a sample world, runs every step with the demo preset and that seed, collects the metrics, and
runs `htcl evaluate --ablate`: the method without each of its parts, and two controls, shuffled captions and shuffled
pairs. The table over all seeds shows means over seeds; its confidence intervals resample artists or users within each
seed's world.

Stage 2 is compared with every baseline on cold-start songs, and with an oracle, the true traits as vectors: the share of
the oracle is (stage 2 − chance) / (oracle − chance).

Prints the tables and writes benchmarks/results/sample_world.json; with --no-ablations only the metrics of the full
method, to sample_world_full.json, or to NAME.json. Completed steps are skipped when --out is reused.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from htcl_ray.config import Config, resolve
from htcl_ray.demo_world import (
    ARTISTS,
    SONGS,
    TEXT_COLUMNS,
    SampleTables,
    make_world,
    write_sample,
    write_true_vectors,
)
from htcl_ray.evaluation.report.ablation_table import ablation_table, ablation_tree
from htcl_ray.evaluation.stats.bootstrap import Estimate, difference
from htcl_ray.evaluation.task_result import MetricKey, from_table
from htcl_ray.pipelines.ablate import ablate
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate, read_metrics
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.workspace.storage import Workspace

COLD_BASELINES = ("semantic", "log_mel", "genre", "artist_mean", "popularity", "random", "oracle")


def configuration(workspace: Path, tables: SampleTables, seed: int, overrides: Sequence[str] = ()) -> Config:
    truth = workspace / "truth.parquet"
    write_true_vectors(make_world(songs=SONGS, artists=ARTISTS, seed=seed), truth)
    return resolve("demo").with_overrides(
        {
            "workspace": str(workspace),
            "data.catalog": str(tables.catalog),
            "data.interactions": str(tables.interactions),
            "data.text_columns": TEXT_COLUMNS,
            "pretrain.seed": seed,
            "finetune.seed": seed,
            "evaluate.seed": seed,
            "evaluate.oracle_vectors": str(truth),
            **dict(override.split("=", 1) for override in overrides),
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
    model = ("semantic", "preference", "blend_0.5")
    cold = (*model, "popularity", "random", "shuffled", "log_mel", "genre", "artist_mean", "oracle")
    chance, oracle = (value(report, "cold", method, "ndcg@10") for method in ("random", "oracle"))
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
        "cold NDCG@10, share of the oracle": (stage_two - chance) / (oracle - chance),
        **{
            f"queries of {count} tag(s), precision@10, {method}": value(
                report, f"tag_queries_{count}", method, "precision@10"
            )
            for count in (1, 2, 3)
            for method in ("semantic", "preference", "random", "best")
        },
        **{
            f"zero-shot {column} {metric}, {method}": value(report, f"zero_shot_{column}", method, metric)
            for column, metric in (("genre", "accuracy"), ("mood", "accuracy"), ("tags", "map"))
            for method in ("semantic", "preference")
        },
        **{
            f"cold user AUC, {method}": value(report, "cold", method, "user_auc")
            for method in ("semantic", "preference", "log_mel", "oracle")
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


def cold_differences(estimates: list[dict[MetricKey, Estimate]]) -> list[dict[str, Any]]:
    """NDCG@10 of cold-start songs by stage 2 minus that of each baseline, over all seeds, with 95 % intervals."""
    rows = []
    for baseline in COLD_BASELINES:
        own, other = (
            average([of_seed["cold", method, "ndcg@10"] for of_seed in estimates])
            for method in ("preference", baseline)
        )
        gain = difference(own, other)
        low, high = gain.interval or (None, None)
        rows.append({"against": baseline, "value": gain.value, "low": low, "high": high})
    return rows


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
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of the configuration")
    parser.add_argument("--name", default="sample_world_full", help="name of the result with --no-ablations")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sample-world-"))
    results: dict[int, dict[str, float]] = {}
    sizes: dict[int, dict[str, Any]] = {}
    estimates: list[dict[MetricKey, Estimate]] = []
    ablations: dict[int, dict[str, dict[MetricKey, Estimate]]] = {}
    for seed in options.seeds:
        folder = out.absolute() / f"seed-{seed}"
        started = time.monotonic()
        config = configuration(folder / "true", write_sample(folder / "sample", seed=seed), seed, options.set)
        report, seconds = run(config, preprocess, pretrain, finetune, embed, build_index)
        results[seed] = metrics(report)
        estimates.append(read_metrics(Workspace(config.workspace), report["run"]))
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
    compared = cold_differences(estimates)
    for row in compared:
        print(f"cold NDCG@10, stage 2 − {row['against']}: {row['value']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]")
    result: dict[str, Any] = {
        "config": resolve("demo").model_dump(mode="json"),
        "overrides": options.set,
        "mean": mean,
        "cold_differences": compared,
        "seeds": results,
        "sizes": sizes,
    }
    if options.no_ablations:
        print(f"written: {write_result(options.name, result)}; workspaces are in {out}")
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
