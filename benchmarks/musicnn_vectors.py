"""Compare our vectors of real audio with those that the package musicnn 0.1.0 computed itself.

    make pretrained-audio         # once: the weights, into .models/musicnn
    python -m benchmarks.musicnn_vectors ../shared/data --write

The reference vectors are means over windows of 3 s of at most 30 s.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.environment import write_result
from htcl_ray.audio import decode
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.extractors.base import load_extractor

AT_ONCE = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder with music.csv, esc10.csv and their *_vectors.parquet")
    parser.add_argument("--model", default=".models/musicnn")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/musicnn_vectors.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    recipe = AudioRecipe(name_or_path=options.model, clip_seconds=30)
    extractor = load_extractor(recipe)
    decoding = recipe.model_copy(update={"sample_rate": extractor.record.sample_rate})
    result: dict[str, object] = {"encoder": extractor.record.model_dump(mode="json")}
    for name in ("music", "esc10"):
        expected = pq.read_table(options.data / f"{name}_vectors.parquet").to_pydict()
        with open(options.data / f"{name}.csv", encoding="utf-8", newline="") as file:
            paths = {row.get("song_id") or row["clip_id"]: row["audio_path"] for row in csv.DictReader(file)}
        cosines, seconds, windows = [], 0.0, 0
        pairs = list(zip(expected["song_id"], expected["vector"], strict=True))
        for start in range(0, len(pairs), AT_ONCE):
            part = pairs[start : start + AT_ONCE]
            waveforms = [decode(str(options.data / paths[song_id]), decoding) for song_id, _ in part]
            began = time.process_time()
            vectors = extractor.embed(waveforms)
            seconds += time.process_time() - began
            for rows, (_, given) in zip(vectors, part, strict=True):
                mean, other = rows.mean(axis=0), np.array(given)
                cosines.append(float(mean @ other / np.linalg.norm(mean) / np.linalg.norm(other)))
                windows += len(rows)
        result[name] = {
            "clips": len(cosines),
            "lowest_cosine": min(cosines),
            "mean_cosine": float(np.mean(cosines)),
            "windows": windows,
            "cpu_seconds_per_window": seconds / windows,
        }
        print(name, result[name], flush=True)
    if options.write:
        write_result("musicnn_vectors", result)


if __name__ == "__main__":
    main()
