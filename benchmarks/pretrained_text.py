"""Compare pretrained BERT weights as the text tower with a BERT trained from scratch: stage 1 on the sample world.

    make pretrained-text          # once: the weights, into .models/all-minilm-l6-v2
    python -m benchmarks.pretrained_text [--seeds 0 1 2] [--text FOLDER] [--out FOLDER]

For each seed, generates a sample world, then runs preprocess, pretrain, embed and evaluate with the demo preset, once
with `text.name_or_path` set to the folder and once without. Apart from the settings in PRETRAINED, both runs are the
same. Prints a table and writes benchmarks/results/pretrained_text.json. Completed steps are skipped when --out is
reused.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.sample_world import configuration, run, value
from htcl_ray.config import Config, resolve
from htcl_ray.demo_world import SampleTables, write_sample
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import pretrain
from htcl_ray.workspace.manifest import file_sha256

MINILM = Path(__file__).resolve().parents[1] / ".models" / "all-minilm-l6-v2"
PRETRAINED = {
    "text.pooling": "mean",
    "pretrain.text_learning_rate": 5e-5,
}
"""Changes to the demo preset. MiniLM's sentence vector is the mean over its tokens; its pooler was not trained for
sentences. The learning rate is the upper end of the usual range for fine-tuning BERT (2e-5 to 5e-5, arXiv 1810.04805):
the preset's 1e-3 suits random weights and would destroy pretrained ones, and 440 steps are too few for the lower
end."""


def one(folder: Path, features: Path | None, config: Config) -> dict[str, Any]:
    """Run the steps in a separate workspace; `features` of an earlier run with the same audio settings are copied."""
    workspace = folder / "workspace"
    if features is not None and not (workspace / "features").exists():
        workspace.mkdir(parents=True, exist_ok=True)
        shutil.copytree(features, workspace / ".features")
        (workspace / ".features").rename(workspace / "features")
    report, seconds = run(config.with_overrides({"workspace": str(workspace)}), preprocess, pretrain, embed)
    return {
        "text→audio median rank": value(report, "text_to_audio", "semantic", "median_rank"),
        "text→audio recall@10": value(report, "text_to_audio", "semantic", "recall@10"),
        "text→audio recall@10, chance": value(report, "text_to_audio", "random", "recall@10"),
        "audio→text recall@10": value(report, "audio_to_text", "semantic", "recall@10"),
        "genre probe": value(report, "probe_genre", "semantic", "accuracy"),
        "genre probe, chance": value(report, "probe_genre", "commonest", "accuracy"),
        "songs of the gallery": report["data"]["songs"],
        "seconds of pretrain": seconds["pretrain"],
    }


def both(folder: Path, text: Path, seed: int) -> dict[str, dict[str, Any]]:
    tables = write_sample(folder / "sample", seed=seed)
    config = configuration(folder, SampleTables(tables.catalog, tables.interactions), seed).with_overrides(
        {"data.interactions": []}
    )
    scratch = one(folder / "from_scratch", None, config)
    features = folder / "from_scratch" / "workspace" / "features"
    return {
        "pretrained": one(
            folder / "pretrained", features, config.with_overrides({"text.name_or_path": str(text), **PRETRAINED})
        ),
        "from scratch": scratch,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--text", type=Path, default=MINILM, help="folder of a BERT-like model (default: MiniLM, see above)"
    )
    parser.add_argument("--out", type=Path, help="folder for worlds and workspaces (default: a temporary one)")
    options = parser.parse_args()
    text = options.text.absolute()
    if not (text / "model.safetensors").is_file():
        parser.error(f"{text} holds no model.safetensors; run 'make pretrained-text' first, or give --text FOLDER")
    out = (options.out or Path(tempfile.mkdtemp(prefix="pretrained-text-"))).absolute()
    results = {seed: both(out / f"seed-{seed}", text, seed) for seed in options.seeds}
    sides = list(results[options.seeds[0]])
    names = list(results[options.seeds[0]][sides[0]])
    mean = {
        side: {name: statistics.mean(results[seed][side][name] for seed in results) for name in names} for side in sides
    }
    table = Table(
        "metric", *(f"{side}, seed {seed}" for side in sides for seed in results), *(f"{side}, mean" for side in sides)
    )
    for name in names:
        each = [results[seed][side][name] for side in sides for seed in results]
        table.add_row(name, *(f"{value:.4g}" for value in [*each, *(mean[side][name] for side in sides)]))
    Console(width=140).print(table)
    weights = {"folder": text.name, "model.safetensors": file_sha256(text / "model.safetensors")}
    result = {
        "config": resolve("demo").model_dump(mode="json"),
        "text": weights,
        "settings": PRETRAINED,
        "mean": mean,
        "seeds": results,
    }
    print(f"written: {write_result('pretrained_text', result)}; workspaces are in {out}")


if __name__ == "__main__":
    main()
