"""What the demo preset learns on the sample world, over seeds, beside two negative controls.

    python -m benchmarks.sample_world [--seeds 0 1 2] [--out FOLDER]

For each seed: a sample world of that seed, every step with the demo preset and that seed, and the evaluation's figures. Then

* shuffled captions: the song texts dealt out to the wrong songs before preprocess; stage 1 alone. Genres stay true, so that the probe
  asks what the sound itself gives away.
* shuffled pairs: stage 2 from the same stage-1 model, but the recalled songs of the training pairs dealt out to the wrong triggers;
  the log that it is evaluated on stays true.

Prints one table and writes benchmarks/results/sample_world.json. Done steps are skipped when --out is given again.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from htcl_ray.config import Config, resolve
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.sample import TEXT_COLUMNS, SampleTables, write_sample
from htcl_ray.storage import Workspace


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
    """The steps in order, the evaluation last: its report, and the seconds of each step."""
    seconds = {}
    for step in (*steps, evaluate):
        result = step(config)
        seconds[result.step] = round(result.seconds, 1)
    return json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8")), seconds


def true_world(folder: Path, tables: SampleTables, seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    return run(configuration(folder / "true", tables, seed), preprocess, pretrain, finetune, embed, build_index)


def shuffled_captions(folder: Path, tables: SampleTables, seed: int) -> dict[str, Any]:
    with tables.catalog.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [" ".join(row[name] for name in TEXT_COLUMNS) for row in rows]
    random.Random(seed).shuffle(texts)
    catalog = folder / "shuffled_captions.csv"
    with catalog.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], "caption"])
        writer.writeheader()
        for row, text in zip(rows, texts, strict=True):
            audio = row["audio_path"] and str(tables.catalog.parent / row["audio_path"])
            writer.writerow({**row, "audio_path": audio, "caption": text})
    config = configuration(folder / "shuffled_captions", SampleTables(catalog, tables.interactions), seed)
    return run(config.with_overrides({"data.interactions": [], "data.text_columns": ["caption"]}), preprocess, pretrain, embed)[0]


def shuffled_pairs(folder: Path, tables: SampleTables, seed: int) -> dict[str, Any]:
    """The true workspace without its stage 2, and with another song as the recalled one of every training pair."""
    target = folder / "shuffled_pairs"
    if not target.exists():
        unfinished = folder / "shuffled_pairs.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        for name in ("features", "events", "pairs", "models/semantic"):
            shutil.copytree(folder / "true" / name, unfinished / name)
        workspace = Workspace(str(unfinished))
        for version in workspace.children("pairs"):
            for name in workspace.children(f"pairs/{version}"):
                if name.endswith(".parquet"):
                    workspace.write_table(f"pairs/{version}/{name}", _permute(workspace, f"pairs/{version}/{name}", seed))
        unfinished.rename(target)
    return run(configuration(target, tables, seed), finetune, embed)[0]


def _permute(workspace: Workspace, path: str, seed: int) -> pa.Table:
    """Training pairs with their recalled songs exchanged by one permutation of songs, so that each song's weight stays as skewed."""
    table = pq.read_table(workspace.full(path))
    training = np.array(table["split"].to_pylist()) == "train"
    recalled = np.array(table["song_id"].to_pylist(), dtype=object)
    songs = np.unique(recalled[training].astype(str))
    other = dict(zip(songs, np.random.default_rng(seed).permutation(songs), strict=True))
    recalled[training] = [other[song] for song in recalled[training]]
    return table.set_column(table.schema.get_field_index("song_id"), table.schema.field("song_id"), pa.array(recalled, pa.string()))


def figures(true: dict[str, Any], captions: dict[str, Any], pairs: dict[str, Any]) -> dict[str, float]:
    """The figures that the table shows, of one seed."""
    semantic, methods = true["semantic"], true["recommendation"]["methods"]

    def rank_share(report: dict[str, Any], space: str) -> float:
        return report["semantic"][space]["text_to_audio"]["median_rank"] / report["data"]["songs"]

    stage_one, stage_two = methods["semantic"]["ndcg@10"], methods["preference"]["ndcg@10"]
    return {
        "text→audio median rank / gallery, stage 1": rank_share(true, "semantic"),
        "text→audio median rank / gallery, stage 2": rank_share(true, "preference"),
        "text→audio recall@10, stage 1": semantic["semantic"]["text_to_audio"]["recall@10"],
        "text→audio recall@10, chance": semantic["semantic"]["text_to_audio"]["chance"]["recall@10"],
        "genre probe, stage 1": semantic["semantic"]["probe"]["accuracy"],
        "genre probe, stage 2": semantic["preference"]["probe"]["accuracy"],
        "genre probe, chance": semantic["semantic"]["probe"]["chance"],
        "genre probe, stage 2 − stage 1": semantic["preference"]["probe"]["accuracy"] - semantic["semantic"]["probe"]["accuracy"],
        "cold NDCG@10, stage 1": stage_one,
        "cold NDCG@10, stage 2": stage_two,
        "cold NDCG@10, blend 0.5": methods["blend_0.5"]["ndcg@10"],
        "cold NDCG@10, popularity": methods["popularity"]["ndcg@10"],
        "cold NDCG@10, random": methods["random"]["ndcg@10"],
        "cold NDCG@10, shuffled vectors": methods["shuffled"]["ndcg@10"],
        "cold NDCG@10, stage 2 / stage 1": stage_two / stage_one,
        "cold user AUC, stage 1": methods["semantic"]["auc"],
        "cold user AUC, stage 2": methods["preference"]["auc"],
        "shuffled captions: text→audio median rank / gallery": rank_share(captions, "semantic"),
        "shuffled captions: genre probe, stage 1": captions["semantic"]["semantic"]["probe"]["accuracy"],
        "shuffled pairs: cold NDCG@10, stage 2": pairs["recommendation"]["methods"]["preference"]["ndcg@10"],
        "shuffled pairs: stage 2 / stage 1": pairs["recommendation"]["methods"]["preference"]["ndcg@10"] / stage_one,
        "shuffled pairs: genre probe, stage 2": pairs["semantic"]["preference"]["probe"]["accuracy"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="folder for worlds and workspaces (default: a temporary one)")
    options = parser.parse_args()
    out = options.out or Path(tempfile.mkdtemp(prefix="sample-world-"))
    found: dict[int, dict[str, float]] = {}
    sizes: dict[int, dict[str, Any]] = {}
    for seed in options.seeds:
        folder = out.absolute() / f"seed-{seed}"
        started = time.monotonic()
        tables = write_sample(folder / "sample", seed=seed)
        true, seconds = true_world(folder, tables, seed)
        found[seed] = figures(true, shuffled_captions(folder, tables, seed), shuffled_pairs(folder, tables, seed))
        sizes[seed] = {"seconds": seconds, "minutes_with_controls": round((time.monotonic() - started) / 60, 1), **_sizes(true)}
    mean = {name: statistics.mean(found[seed][name] for seed in found) for name in found[options.seeds[0]]}
    show = Table("figure", *(f"seed {seed}" for seed in found), "mean")
    for name, value in mean.items():
        show.add_row(name, *(f"{found[seed][name]:.3f}" for seed in found), f"{value:.3f}")
    Console().print(show)
    result = {"config": resolve("demo").model_dump(mode="json"), "mean": mean, "seeds": found, "sizes": sizes}
    print(f"written: {write_result('sample_world', result)}; workspaces are in {out}")


def _sizes(report: dict[str, Any]) -> dict[str, Any]:
    return {**report["data"], **report["recommendation"]["task"]}


if __name__ == "__main__":
    main()
