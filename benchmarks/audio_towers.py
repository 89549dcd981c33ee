"""Compare audio towers on real audio: ESC-10 (Piczak 2015; 10 classes, five folds), trained from scratch.

    python -m benchmarks.audio_towers [--rows cnn transformer …] [--folds 1 2 3 4 5] [--seeds 0 1 2] [--summary]

For each fold, stage 1 trains on the other folds with the class name as caption. Clips of the fold are then classified
as the nearest of the 10 names by cosine (zero-shot), by a linear probe on the vectors of the training clips, and by
their 10 nearest neighbours. In addition, the same probes on statistics of the log-mel frames (mean and deviation of
each band) and on given vectors without a model. Each fold and seed appends a line with its learning curve to --out, and
runs that are in it are not computed again; --summary writes benchmarks/results/audio_towers.json from it. One process,
one thread.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from htcl_ray.audio import decode, log_mel
from htcl_ray.config import Config, resolve
from htcl_ray.evaluation.tasks.probes import linear_labels
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.features import FRAMES, OFFSETS, Frames
from htcl_ray.training.loop import train
from htcl_ray.training.song_numbers import Songs
from htcl_ray.training.stage_tasks import pretrain_task

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
COMMON = {
    "audio.clip_seconds": 5.0,
    "audio.hop_length": 512,
    "audio.n_fft": 1024,
    "audio.n_mels": 64,
    "pretrain.batch_size": 32,
    "pretrain.epochs": 60,
    "pretrain.learning_rate": 1e-3,
    "pretrain.time_shift": False,
    "pretrain.health": {"action": "off"},
}
"""Changes to the demo preset of every row."""
SPEC_AUGMENT = {
    "pretrain.time_masks": 2,
    "pretrain.time_mask_frames": 20,
    "pretrain.mel_masks": 2,
    "pretrain.mel_mask_bands": 8,
}
ROWS: dict[str, dict[str, Any]] = {
    "transformer": {"audio.tower": "transformer", "audio.n_mels": 128, "pretrain.learning_rate": 5e-4},
    "transformer, augmented": {
        "audio.tower": "transformer",
        "audio.n_mels": 128,
        "pretrain.learning_rate": 5e-4,
        **SPEC_AUGMENT,
        "pretrain.time_shift": True,
    },
    "cnn": {"audio.tower": "cnn", **SPEC_AUGMENT, "pretrain.time_shift": True},
    "cnn, not augmented": {"audio.tower": "cnn"},
    "cnn, no shift": {"audio.tower": "cnn", **SPEC_AUGMENT},
    "mlp on vectors": {"audio.extractor": "vectors", "audio.tower": "mlp"},
}
"""Settings of each row; the first is the tower and the settings of benchmarks/real_audio.py."""
CURVE_EPOCHS = 10
NEIGHBORS = 10


class Clips(NamedTuple):
    """The clips of ESC-10."""

    ids: list[str]
    labels: np.ndarray
    folds: np.ndarray
    paths: list[Path]


def read_clips(data: Path) -> Clips:
    with (data / "esc10.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [data / row["audio_path"] for row in rows]
    labels = np.array([row["label"] for row in rows])
    return Clips([row["clip_id"] for row in rows], labels, np.array([int(row["fold"]) for row in rows]), paths)


def features_of(clips: Clips, config: Config, data: Path) -> list[np.ndarray]:
    """Features of each clip, float16 [frames, width]."""
    if config.audio.extractor == "vectors":
        table = pq.read_table(data / "esc10_vectors.parquet")
        vector = dict(zip(table["song_id"].to_pylist(), table["vector"].to_pylist(), strict=True))
        return [np.array([vector[clip]], dtype=np.float16) for clip in clips.ids]
    recipe = config.audio.recipe
    waveforms = (decode(path, recipe) for path in clips.paths)
    return [log_mel(wave, recipe.sample_rate, recipe)[: recipe.max_frames].astype(np.float16) for wave in waveforms]


def run(config: Config, clips: Clips, features: list[np.ndarray], fold: int, seed: int) -> dict[str, Any]:
    """Train on the other folds and classify the fold every `CURVE_EPOCHS` epochs."""
    config = config.with_overrides({"pretrain.seed": seed})
    numbers = np.arange(len(clips.ids))
    names, of_name = np.unique(clips.labels, return_inverse=True)
    known, held_out = np.flatnonzero(clips.folds != fold), np.flatnonzero(clips.folds == fold)
    songs = Songs(clips.ids, clips.labels.tolist(), np.stack([numbers, numbers, of_name], axis=1), known, held_out[:0])
    with tempfile.TemporaryDirectory() as scratch:
        ends = np.cumsum([len(clip) for clip in features])
        np.concatenate(features).tofile(Path(scratch) / FRAMES)
        np.save(Path(scratch) / OFFSETS, np.stack([np.append(0, ends[:-1]), ends], axis=1))
        frames = Frames(Path(scratch), features[0].shape[1])
        vocabulary = train_wordpiece(clips.labels[known].tolist(), config.text.vocab_size)
        model = HTCL.untrained(config, vocabulary, feature_width=frames.width)
        augmentation = Augmentation(config.pretrain, model.window_frames, model.recipe.extractor)
        loader = BatchLoader(songs, frames, model.text_encoder, augmentation)
        curve: list[dict[str, float]] = []
        started, evaluating = time.process_time(), 0.0

        def on_checkpoint(metrics: Mapping[str, Any] | None, step: int, save: object) -> None:
            nonlocal evaluating
            assert metrics is not None
            if metrics["epoch"] % CURVE_EPOCHS and metrics["epoch"] != config.pretrain.epochs:
                return
            paused = time.process_time()
            audio = embed(model, frames, numbers)
            zero_shot = (audio[held_out] @ model.embed_text(names.tolist()).numpy().T).argmax(axis=1)
            accuracy = {"zero_shot": float((zero_shot == of_name[held_out]).mean())}
            accuracy |= probes(audio, of_name, known, held_out)
            curve.append({"epoch": metrics["epoch"], "loss": metrics["loss"], **accuracy})
            evaluating += time.process_time() - paused

        task = pretrain_task(songs, config.pretrain)
        train(
            model,
            task,
            loader,
            config.pretrain,
            torch.device("cpu"),
            on_checkpoint=on_checkpoint,
            say=lambda line: None,
            show_progress=False,
        )
    return {
        "curve": curve,
        **{key: value for key, value in curve[-1].items() if key not in ("epoch", "loss")},
        "test_clips": len(held_out),
        "training_cpu_seconds": round(time.process_time() - started - evaluating, 1),
        "tower_parameters": sum(parameter.numel() for parameter in model.audio_encoder.parameters()),
    }


def embed(model: HTCL, frames: Frames, numbers: np.ndarray) -> np.ndarray:
    """Vectors of all clips, [clips, dim]."""
    parts = []
    for start in range(0, len(numbers), 64):
        features, valid = frames.batch(numbers[start : start + 64])
        parts.append(model.embed_features(torch.from_numpy(features).float(), torch.from_numpy(valid)))
    return torch.cat(parts).numpy()


def probes(vectors: np.ndarray, of_name: np.ndarray, known: np.ndarray, held_out: np.ndarray) -> dict[str, float]:
    """Accuracy of a linear probe and of the nearest neighbours by cosine."""
    linear = linear_labels(vectors[known], of_name[known], vectors[held_out])
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    nearest = np.argsort(-(unit[held_out] @ unit[known].T), axis=1, kind="stable")[:, :NEIGHBORS]
    votes = np.stack([np.bincount(row, minlength=of_name.max() + 1) for row in of_name[known][nearest]])
    return {
        "linear": float((linear == of_name[held_out]).mean()),
        "knn": float((votes.argmax(axis=1) == of_name[held_out]).mean()),
    }


def control(features: list[np.ndarray], clips: Clips, fold: int) -> dict[str, Any]:
    """Probes without a model: on the mean and deviation over frames of each number, standardised."""
    statistics = np.stack(
        [np.concatenate([clip.mean(axis=0), clip.std(axis=0)]) for clip in (x.astype(np.float64) for x in features)]
    )
    _, of_name = np.unique(clips.labels, return_inverse=True)
    known, held_out = np.flatnonzero(clips.folds != fold), np.flatnonzero(clips.folds == fold)
    used = statistics[:, statistics[known].std(axis=0) > 0]
    standardised = (used - used[known].mean(axis=0)) / used[known].std(axis=0)
    return {**probes(standardised, of_name, known, held_out), "test_clips": len(held_out)}


CONTROLS = {"log-mel statistics": "transformer", "given vectors, no model": "mlp on vectors"}
"""Controls, and the row whose features they are computed from."""


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy of each row over all clips, by seed and in the mean; and the mean learning curve."""
    result: dict[str, Any] = {}
    for name in dict.fromkeys(line["row"] for line in lines):
        of_row = [line for line in lines if line["row"] == name]
        seeds = sorted({line["seed"] for line in of_row})
        rates = [rate for rate in ("zero_shot", "linear", "knn") if rate in of_row[0]]

        def weighted(chosen: list[dict[str, Any]], rate: str) -> float:
            clips = sum(line["test_clips"] for line in chosen)
            return round(sum(line[rate] * line["test_clips"] for line in chosen) / clips, 4)

        entry: dict[str, Any] = {rate: weighted(of_row, rate) for rate in rates}
        entry["by_seed"] = {
            str(seed): {rate: weighted([line for line in of_row if line["seed"] == seed], rate) for rate in rates}
            for seed in seeds
        }
        entry["folds_and_seeds"] = sorted([line["fold"], line["seed"]] for line in of_row)
        if "curve" in of_row[0]:
            epochs = [point["epoch"] for point in of_row[0]["curve"]]
            points = [
                [
                    {**point, **{"test_clips": line["test_clips"]}}
                    for line in of_row
                    for point in line["curve"]
                    if point["epoch"] == epoch
                ]
                for epoch in epochs
            ]
            entry["curve"] = [
                {"epoch": epoch, **{rate: weighted(at, rate) for rate in ("loss", *rates)}}
                for epoch, at in zip(epochs, points, strict=True)
            ]
            entry["training_cpu_seconds_per_fold"] = round(
                float(np.mean([line["training_cpu_seconds"] for line in of_row])), 1
            )
            entry["tower_parameters"] = of_row[0]["tower_parameters"]
        result[name] = entry
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *CONTROLS], default=[*CONTROLS, *ROWS])
    parser.add_argument("--folds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=COMMON["pretrain.epochs"])
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "audio_towers.jsonl")
    parser.add_argument("--summary", action="store_true", help="write the result from the lines in --out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    if not options.summary:
        clips = read_clips(options.data)
        made: dict[str, list[np.ndarray]] = {}
        done = {(line["row"], line["fold"], line["seed"], line["epochs"]) for line in lines}
        for seed in options.seeds:
            for name in options.rows:
                config = resolve("demo").with_overrides(
                    {**COMMON, **ROWS[CONTROLS.get(name, name)], "pretrain.epochs": options.epochs}
                )
                recipe = config.audio.recipe.model_dump_json()
                for fold in options.folds:
                    if (name, fold, seed, options.epochs) in done or (name in CONTROLS and seed != options.seeds[0]):
                        continue
                    if recipe not in made:
                        made[recipe] = features_of(clips, config, options.data)
                    measured = (
                        control(made[recipe], clips, fold)
                        if name in CONTROLS
                        else run(config, clips, made[recipe], fold, seed)
                    )
                    line = {"row": name, "fold": fold, "seed": seed, "epochs": options.epochs, **measured}
                    lines.append(line)
                    with options.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
                    print(json.dumps({key: value for key, value in line.items() if key != "curve"}), flush=True)
    rows = summary(lines)
    table = Table("ESC-10", "zero-shot", "linear", "kNN", "CPU s a fold", "runs")
    for name, entry in rows.items():
        values = [f"{entry[rate]:.3f}" if rate in entry else "–" for rate in ("zero_shot", "linear", "knn")]
        seconds = str(entry.get("training_cpu_seconds_per_fold", "–"))
        table.add_row(name, *values, seconds, str(len(entry["folds_and_seeds"])))
    Console().print(table)
    if options.summary:
        result = {"rows": rows, "preset": "demo", "common": COMMON, "settings": ROWS, "epochs": options.epochs}
        print(f"written: {write_result('audio_towers', result)}")


if __name__ == "__main__":
    main()
