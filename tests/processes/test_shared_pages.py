"""Processes that load the same index share its memory-mapped pages."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from htcl_ray.index.folder import EXACT_FILE, VECTORS_FILE
from tests.unit.index.test_index_files import DIM, KINDS, SONGS, saved

pytestmark = pytest.mark.processes

READER = """
import sys
import numpy as np
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors

indexes = [SongIndex.load(folder) for folder in sys.argv[1:]]
for index in indexes:
    stored = index.vectors_of(index.songs["song_id"].to_pylist())
    index.search(stored.rows(slice(0, 64)), 10)
print("loaded", flush=True)
sys.stdin.readline()
"""


def mapped_kb(process: int, file: Path) -> dict[str, int]:
    """Resident, shared and private kB of a file's mappings in a process."""
    sizes = {"Rss": 0, "Shared": 0, "Anonymous": 0}
    inside = False
    for line in Path(f"/proc/{process}/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(file))
        elif inside:
            field, value = line.split(":", 1)
            if field.startswith("Shared_"):
                sizes["Shared"] += int(value.split()[0])
            elif field in sizes:
                sizes[field] += int(value.split()[0])
    return sizes


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/smaps exists on Linux only")
def test_two_processes_share_mapped_pages(tmp_path: Path):
    folders = {kind: saved(tmp_path / kind, kind, SONGS, DIM) for kind in KINDS}
    command = [sys.executable, "-c", READER, *map(str, folders.values())]
    readers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        assert [reader.stdout.readline() for reader in readers] == ["loaded\n"] * 2
        size = SONGS * 2 * DIM * 4 // 1024
        for reader, (kind, folder) in itertools.product(readers, folders.items()):
            exact = folder / (VECTORS_FILE if kind == "flat" else EXACT_FILE)
            vectors, structure = mapped_kb(reader.pid, exact), mapped_kb(reader.pid, folder / VECTORS_FILE)
            assert vectors["Rss"] >= size
            assert vectors["Shared"] >= 0.95 * size
            assert vectors["Anonymous"] == 0
            assert structure["Shared"] > 0.5 * (folder / VECTORS_FILE).stat().st_size / 1024
            assert structure["Anonymous"] == 0
    finally:
        for reader in readers:
            reader.communicate("\n")
