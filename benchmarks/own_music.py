"""Own music in two commands: a folder of files without tags → a searchable index, with a pretrained encoder.

    make pretrained-audio
    python -m benchmarks.own_music [--data ../shared/data] [--model .models/musicnn] [--out FOLDER]

Runs `htcl import folder` and `htcl run` on the 88 pieces of real music as a user does, each in a process of its own, and
writes benchmarks/results/own_music.json with the seconds of each command and step. Most pieces belong to one of seven
series, which their file names state. Of songs that no model was trained on, the share of the five nearest songs that
are from the same series is compared with chance.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.environment import write_result
from htcl_ray.config import resolve
from htcl_ray.schemas import Split
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace

REPOSITORY = Path(__file__).resolve().parent.parent
NEIGHBORS = 5
STEP = re.compile(r"^(\w+): (?:done in (\d+) s|already done)", re.MULTILINE)


def timed(*arguments: str) -> tuple[float, str]:
    """Run `htcl` to its end; seconds and standard output. Raises CalledProcessError."""
    started = time.monotonic()
    command = [sys.executable, "-m", "htcl_ray.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY)
    print(done.stdout, done.stderr, sep="", flush=True)
    done.check_returncode()
    return round(time.monotonic() - started, 1), done.stdout


def neighbors(service: SearchService, series: dict[str, str], queries: set[str]) -> dict[str, float]:
    """Share of the nearest songs of the queries that are from the same series, and the same for random songs."""
    counts = Counter(series.values())
    queries = {song for song in queries if counts[series[song]] > 1}
    same = sum(
        series[hit.song_id] == series[song]
        for song in queries
        for hit in service.search_songs([song], k=NEIGHBORS).hits
    )
    chance = sum((counts[series[song]] - 1) / (len(series) - 1) for song in queries)
    return {
        "queries": len(queries),
        "same_series_at_5": round(same / (NEIGHBORS * len(queries)), 3),
        "chance": round(chance / len(queries), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".models" / "musicnn")
    parser.add_argument(
        "--out", type=Path, help="folder for the catalogue and the workspace (default: a temporary one)"
    )
    options = parser.parse_args()
    out = (options.out or Path(tempfile.mkdtemp(prefix="own-music-"))).absolute()
    out.mkdir(parents=True, exist_ok=True)
    catalog = out / "catalog.parquet"
    importing, _ = timed("import", "folder", str(options.data / "music"), "--out", str(catalog))
    assignments = [
        f"data.catalog={catalog}",
        "audio.extractor=pretrained",
        f"audio.name_or_path={options.model.resolve()}",
    ]
    flags = ["--preset", "demo", "--workspace", str(out / "workspace")]
    for assignment in assignments:
        flags += ["--set", assignment]
    running, shown = timed("run", *flags)
    again, _ = timed("run", *flags)
    config = resolve("demo", None, [f"workspace={out / 'workspace'}", *assignments]).with_absolute_paths()
    result: dict[str, Any] = {
        "seconds": {"import": importing, "run": running, "run_again": again},
        "seconds_of_steps": {step: int(seconds or 0) for step, seconds in STEP.findall(shown)},
        "neighbors": neighbors(SearchService.open(config), series_of(catalog), held_out(Workspace(config.workspace))),
    }
    print(result)
    print(f"written: {write_result('own_music', result)}; everything else is in {out}")


def series_of(catalog: Path) -> dict[str, str]:
    """Song id → series of the piece, which its file name states: `ninja-adventure-theme-7`, `opensurge_boss`."""
    rows = pq.read_table(catalog, columns=["song_id", "audio_path"]).to_pylist()
    stems = {row["song_id"]: Path(row["audio_path"]).stem for row in rows}
    return {song: re.split(r"-theme-|(?<=^opensurge)_", stem)[0] for song, stem in stems.items()}


def held_out(workspace: Workspace) -> set[str]:
    """Songs that no model was trained on."""
    ((version, _),) = workspace.finished("features")
    table = workspace.read_tables(f"features/{version}", ["song_id", "split"])
    return set(table.filter(pc.not_equal(table["split"], Split.TRAIN))["song_id"].to_pylist())


if __name__ == "__main__":
    main()
