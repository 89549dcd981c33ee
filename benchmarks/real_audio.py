"""Run real audio through every step that needs no log: ESC-10 zero-shot classification and a smoke test on music.

    python -m benchmarks.real_audio [--data ../shared/data] [--folds 1 2 3 4 5] [--out FOLDER]

ESC-10 (Piczak 2015; environmental audio, 10 classes, 5 folds): for each fold, stage 1 trains on the other folds with
the class name as caption; each clip of the fold is then classified as the nearest of the 10 names by cosine, without a
trained classifier. Chance is 10 %. All clips of a recording are in the same fold, so no part of a held-out recording
occurs in training. Music: 88 pieces; a search with a piece's own file must return the piece first. Writes
benchmarks/results/real_audio.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.sample_world import value
from htcl_ray.config import Config, resolve
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import pretrain
from htcl_ray.search.service import SearchService

TRANSFORMER = {"audio.tower": "transformer", "audio.n_mels": 128, "pretrain.time_shift": False}
ESC10 = {
    **TRANSFORMER,
    "audio.clip_seconds": 5.0,
    "audio.hop_length": 512,
    "audio.n_fft": 1024,
    "data.text_columns": ["genre"],
    "data.columns": {"song_id": "clip_id", "genre": "label"},
    "data.split_column": "split",
    "pretrain.epochs": 60,
    "pretrain.learning_rate": 5e-4,
    "pretrain.batch_size": 32,
}
"""Changes to the demo preset; of the convolutional tower see audio_towers.py. The class name is in the column `genre`, so that the linear probe predicts it."""
PUBLISHED = {
    "source": "Piczak 2015, ESC-10, 400 clips, five folds, MFCC and zero-crossing features",
    "knn": 0.667,
    "linear_svm": 0.675,
    "random_forest": 0.727,
    "people": 0.957,
}
MUSIC = {
    **TRANSFORMER,
    "audio.clip_seconds": 15.0,
    "pretrain.epochs": 10,
    "pretrain.learning_rate": 1e-3,
    "pretrain.batch_size": 16,
    "data.max_rejected_share": 0.0,
}


def run(config: Config) -> dict[str, Any]:
    """Run all steps and return the report, with the seconds of each step."""
    seconds = {}
    for step in (preprocess, pretrain, embed, build_index, evaluate):
        result = step(config)
        seconds[result.step] = round(result.seconds, 1)
    return {**json.loads((Path(result.location) / "report.json").read_text(encoding="utf-8")), "seconds": seconds}


def esc10(data: Path, out: Path, fold: int) -> dict[str, Any]:
    folder = out / f"esc10-fold-{fold}"
    folder.mkdir(parents=True, exist_ok=True)
    with (data / "esc10.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (folder / "catalog.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["clip_id", "audio_path", "label", "split"])
        writer.writeheader()
        for row in rows:
            split = "test" if int(row["fold"]) == fold else "train"
            audio = str((data / row["audio_path"]).resolve())
            writer.writerow({"clip_id": row["clip_id"], "audio_path": audio, "label": row["label"], "split": split})
    catalog = {"workspace": str(folder / "workspace"), "data.catalog": str(folder / "catalog.csv")}
    report = run(resolve("demo").with_overrides({**ESC10, **catalog}))
    probe = report["tasks"]["probe_genre"]["methods"]
    return {
        "zero_shot_accuracy": value(report, "audio_to_text", "semantic", "recall@1"),
        "zero_shot_chance": value(report, "audio_to_text", "random", "recall@1"),
        "linear_probe_accuracy": probe["semantic"]["accuracy"]["value"],
        "knn_probe_accuracy": probe["semantic"]["knn_accuracy"]["value"],
        "log_mel_linear_probe_accuracy": probe["log_mel"]["accuracy"]["value"],
        "log_mel_knn_probe_accuracy": probe["log_mel"]["knn_accuracy"]["value"],
        "test_clips": report["data"]["songs"],
        "training_clips": report["data"]["training_songs"],
        "captions": report["data"]["unique_texts"],
        "seconds": report["seconds"],
    }


def music(data: Path, out: Path) -> dict[str, Any]:
    catalog = {"workspace": str(out / "music"), "data.catalog": str((data / "music.csv").resolve())}
    config = resolve("demo").with_overrides({**MUSIC, **catalog})
    report = run(config)
    service = SearchService.open(config)
    with (data / "music.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    own = sum(
        service.search_audio(str(data / row["audio_path"]), k=1).hits[0].song_id == row["song_id"] for row in rows
    )
    return {"songs": len(rows), "found_by_their_own_file": own, "data": report["data"], "seconds": report["seconds"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).resolve().parents[2] / "shared" / "data")
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--out", type=Path, help="folder for workspaces (default: a temporary one)")
    options = parser.parse_args()
    out = (options.out or Path(tempfile.mkdtemp(prefix="real-audio-"))).absolute()
    folds = {fold: esc10(options.data, out, fold) for fold in options.folds}
    songs = music(options.data, out)
    rates = [name for name in folds[options.folds[0]] if name.endswith(("accuracy", "chance"))]
    clips = {fold: result["test_clips"] for fold, result in folds.items()}
    mean = {
        name: sum(result[name] * clips[fold] for fold, result in folds.items()) / sum(clips.values()) for name in rates
    }
    table = Table("ESC-10", *(f"fold {fold}" for fold in folds), "all clips")
    for name in rates:
        values = [f"{result[name]:.3f}" for result in folds.values()]
        table.add_row(name.replace("_", " "), *values, f"{mean[name]:.3f}")
    Console().print(table)
    print(
        f"music: a search with its own file returns {songs['found_by_their_own_file']} of {songs['songs']} songs first"
    )
    result = {
        "esc10": {"over_all_clips": mean, "published": PUBLISHED, "folds": folds, "preset": "demo", "settings": ESC10},
        "music": {**songs, "preset": "demo", "settings": MUSIC},
    }
    print(f"written: {write_result('real_audio', result)}; workspaces are in {out}")


if __name__ == "__main__":
    main()
