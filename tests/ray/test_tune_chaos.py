"""A node is taken away, without grace, in the middle of a search: as a spot machine goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import REPOSITORY
from tests.ray.test_tune import table, tune_config

pytestmark = pytest.mark.ray
TRIALS = 3
REPORTS = 60
"""A trial then takes longer than the difference between the starts of two, so that both are in the middle at once."""


@pytest.fixture
def cluster() -> Iterator[subprocess.Popen[str]]:
    """The program `cluster_of_nodes`; ends with its standard input."""
    command = [sys.executable, "-m", "tests.worlds.cluster_of_nodes"]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait(timeout=60)


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, "RAY_AUTH_MODE": "token"}


def reply_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError("the cluster ended")


def test_a_search_outlives_a_node(cluster: subprocess.Popen[str], tmp_path: Path):
    address = reply_of(cluster)["address"]
    settings = {
        "tune.samples": 32 * REPORTS,
        "tune.reports": REPORTS,
        "tune.trials": TRIALS,
        "tune.early_stopping": False,
    }
    config = tune_config(tmp_path, **settings, **{"ray.address": address})
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "htcl_ray.cli", "tune", "--config", str(tmp_path / "c.yaml")]
    search = subprocess.Popen(command, stdout=log, stderr=log, env=environment())
    try:
        deadline = time.monotonic() + 300
        while not _two_in_the_middle(table(config)):
            assert search.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()
            time.sleep(0.05)
        before = table(config)
        assert cluster.stdin is not None
        print("remove", file=cluster.stdin, flush=True)
        assert reply_of(cluster)["removed"]
        assert search.wait(timeout=400) == 0, (tmp_path / "log").read_text()
    finally:
        if search.poll() is None:
            search.kill()
            search.wait()
    assert "at most 2 trial(s) at a time" in (tmp_path / "log").read_text()
    after = table(config)
    assert [trial["number"] for trial in after] == list(range(TRIALS)), "none is lost, none twice"
    assert {trial["state"] for trial in after} == {"finished"}
    restarted = [trial for trial in after if len(trial["attempts"]) > 1]
    assert len(restarted) == 1, "the trial of the lost node went on elsewhere, and no other one was begun again"
    for trial in after:
        assert [item["rows"] for item in trial["history"]] == list(range(32, 32 * (REPORTS + 1), 32))
    (trial,) = restarted
    done_before = before[trial["number"]]["history"]
    kept = [item for item in trial["history"] if item in done_before]
    assert len(kept) >= len(done_before) - 2, "it went on after its last checkpoint"


def _two_in_the_middle(trials: list[dict[str, Any]]) -> bool:
    running = [trial for trial in trials if trial["state"] == "running"]
    return sum(3 <= len(trial["history"]) < REPORTS - 10 for trial in running) == 2
