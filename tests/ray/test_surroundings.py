"""Commands where the surroundings are hostile: a terminal without UTF-8, a long TMPDIR, a full disk."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from tests.conftest import REPOSITORY

pytestmark = pytest.mark.ray

SONGS = 30


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("songs")
    for i in range(SONGS):
        soundfile.write(folder / f"{i}.wav", np.random.default_rng(i).uniform(-0.4, 0.4, 8 * 16000), 16000)
    with open(folder / "songs.csv", "w", encoding="utf-8", newline="") as file:
        rows = [[f"s{i}", (folder / f"{i}.wav").as_uri(), f"título {i}"] for i in range(SONGS)]
        csv.writer(file).writerows([["song_id", "audio_path", "title"], *rows])
    return folder / "songs.csv"


def preprocess(catalog: Path, workspace: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    keys = [f"data.catalog={catalog}", "data.songs_per_shard=2"]
    arguments = ["--preset", "demo", "--workspace", str(workspace), *(word for key in keys for word in ("--set", key))]
    return subprocess.run(
        [sys.executable, "-m", "htcl_ray.cli", "preprocess", *arguments],
        capture_output=True,
        cwd=REPOSITORY,
        env={**{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}, **environment},
        timeout=600,
    )


def test_an_ascii_terminal_and_a_long_tmpdir(catalog: Path, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    done = preprocess(catalog, tmp_path / "ws", PYTHONIOENCODING="ascii", TMPDIR=str(long))
    assert done.returncode == 0, done.stderr.decode()
    last = done.stdout.decode("ascii").splitlines()[-1]
    assert f"{SONGS} songs, 0 rejected -> {tmp_path}/ws/features/" in last
    assert len(list((tmp_path / "ws" / "features").glob("*/manifest.json"))) == 1


def test_a_full_disk_under_the_tasks(catalog: Path, small_disk: Path) -> None:
    """30 songs take about 500 kB of 200 kB of space, so it is a Ray task that cannot write."""
    done = preprocess(catalog, small_disk / "ws")
    assert done.returncode == 1
    said = done.stderr.decode()
    assert said.startswith(f"htcl: failed: no space left on the device of {small_disk}/ws")
    assert said.count("\n") == 1
    assert not list((small_disk / "ws").glob("features/*/manifest.json"))
