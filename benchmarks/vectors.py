"""Train both stages on given vectors, from the tables to the index, and state the minutes of each step.

    python -m benchmarks.vectors --songs 100000 --pairs 1000000 --write

The world is simulated: songs of clusters whose vectors lie around a centre, and feedback of users who like some clusters; the texts name the cluster. No audio file exists.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.environment import write_result
from htcl_ray.config import Config, resolve
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.workspace.storage import Workspace

WIDTH, CLUSTERS, TASTES = 200, 400, 20
LIKES = 40
"""Songs that a user likes, on average."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--songs", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=1_000_000, help="pairs to mine, about")
    parser.add_argument("--pretrain-epochs", type=int, default=3)
    parser.add_argument(
        "--pairs-per-epoch", type=int, default=250_000, help="pairs drawn by weight in an epoch of stage 2"
    )
    parser.add_argument("--finetune-epochs", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/vectors.json")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="vectors-"))
    write_world(folder, options.songs, options.pairs, np.random.default_rng(0))
    config = configuration(folder, options)
    minutes: dict[str, float] = {}
    for step in (preprocess, pretrain, finetune, embed, build_index):
        began = time.monotonic()
        step(config)
        minutes[step.__name__] = (time.monotonic() - began) / 60
        print(f"{step.__name__}: {minutes[step.__name__]:.2f} minutes", flush=True)
    workspace = Workspace(config.workspace)
    quality = {
        kind: workspace.finished(kind)[-1][1]["quality"]
        for kind in ("features", "pairs", "models/semantic", "models/preference")
    }
    result: dict[str, Any] = {
        "songs": options.songs,
        "pairs": quality["pairs"],
        "epochs": {"pretrain": options.pretrain_epochs, "finetune": options.finetune_epochs},
        "pairs_per_epoch": options.pairs_per_epoch,
        "minutes": {**minutes, "total": sum(minutes.values())},
        "quality": quality,
    }
    print(result)
    if options.write:
        write_result("vectors", result)
    shutil.rmtree(folder)


def write_world(folder: Path, songs: int, pairs: int, random: np.random.Generator) -> None:
    """Write songs.parquet, vectors.parquet and log.parquet."""
    cluster = random.integers(CLUSTERS, size=songs)
    centres = random.normal(size=(CLUSTERS, WIDTH))
    vectors = (centres[cluster] + random.normal(size=(songs, WIDTH))).astype(np.float32)
    ids = np.array([f"song-{song:07d}" for song in range(songs)])
    table = {
        "song_id": ids,
        "title": [f"piece {song % 977}" for song in range(songs)],
        "artist": [f"artist {song // 8}" for song in range(songs)],
        "genre": [f"genre{number}" for number in cluster],
    }
    pq.write_table(pa.table(table), folder / "songs.parquet")
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), WIDTH)
    pq.write_table(pa.table({"song_id": ids, "vector": column}), folder / "vectors.parquet")
    by_cluster = [np.flatnonzero(cluster == number) for number in range(CLUSTERS)]
    rows = round(pairs * 1.5)  # the log keeps some users and the last of the time for evaluation
    users = rows // LIKES
    liked = random.integers(CLUSTERS, size=(users, TASTES))
    user = np.repeat(np.arange(users), LIKES)
    taste = liked[user, random.integers(TASTES // 10, size=user.size)]
    trigger, song = (np.array([random.choice(by_cluster[number]) for number in taste]) for _ in range(2))
    log = {
        "user_id": [f"user-{number}" for number in user],
        "trigger_song_id": ids[trigger],
        "song_id": ids[song],
        "feedback": ["like"] * user.size,
        "timestamp": 1_700_000_000 + random.integers(10_000_000, size=user.size),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")


def configuration(folder: Path, options: argparse.Namespace) -> Config:
    return resolve("demo").with_overrides(
        {
            "workspace": str(folder / "workspace"),
            "audio.extractor": "vectors",
            "data.catalog": [str(folder / "songs.parquet")],
            "data.vectors": [str(folder / "vectors.parquet")],
            "data.interactions": [str(folder / "log.parquet")],
            "data.split_shares": [0.9, 0.05, 0.05],
            "data.held_out_user_share": 0.1,
            "pretrain.batch_size": 512,
            "pretrain.epochs": options.pretrain_epochs,
            "pretrain.num_workers": 2,
            "finetune.batch_size": 512,
            "finetune.pairs_per_epoch": options.pairs_per_epoch,
            "finetune.freeze_text": True,
            "finetune.epochs": options.finetune_epochs,
            "finetune.num_workers": 2,
        }
    )


if __name__ == "__main__":
    main()
