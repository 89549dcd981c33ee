"""A search on Ray's real autoscaler, submitted as a job: nodes come when trials need them, and go when there are
none."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from ray.util import get_node_ip_address

from tests.conftest import REPOSITORY
from tests.ray.test_tune import table, tune_config
from tests.worlds.ray_head import environment, free_ports, head_node, submit

pytestmark = pytest.mark.ray
HEAD_ID = "f" * 51 + "00000"
VARIABLES = {
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
}


def test_the_cluster_grows_for_a_search_and_shrinks_after_it(tmp_path: Path):
    config = tune_config(
        tmp_path,
        **{
            "tune.trials": 2,
            "tune.samples": 160,
            "tune.early_stopping": False,
            "pretrain.cpus_per_worker": 2.0,
        },  # a node for each trial
    )
    (tmp_path / "c.yaml").write_text(config.as_yaml())
    (port,) = free_ports(1)
    shipped = yaml.safe_load((REPOSITORY / "deploy" / "autoscaling-local.yaml").read_text())
    shipped["provider"]["gcs_address"] = (
        f"{get_node_ip_address()}:{port}"  # else its nodes look for a head on Ray's usual port
    )
    (tmp_path / "autoscaling.yaml").write_text(yaml.safe_dump(shipped))
    with head_node(
        f"--autoscaling-config={tmp_path}/autoscaling.yaml", "--num-cpus=1", variables=VARIABLES, port=port
    ) as head:
        seen = (tmp_path / "nodes").open("w")
        watch = subprocess.Popen(
            [sys.executable, "-m", "tests.ray.watch_nodes", head.address],
            cwd=REPOSITORY,
            env=environment(),
            stdout=seen,
        )
        try:
            # No upload: these nodes share one session folder, and each one that starts would replace the folder that
            # the others work in.
            done = submit(
                head, "python", f"{REPOSITORY}/jobs/tune.py", "--config", str(tmp_path / "c.yaml"), upload=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            deadline = time.monotonic() + 120
            while counts(tmp_path)[-1:] != [1] or len(counts(tmp_path)) < 3:
                assert watch.poll() is None
                assert time.monotonic() < deadline, f"nodes do not go: {counts(tmp_path)}"
                time.sleep(0.5)
        finally:
            watch.terminate()
            watch.wait()
    assert counts(tmp_path)[0] == 1
    assert max(counts(tmp_path)) >= 3
    assert "at most 3 trial(s) at a time; the cluster is at most 4 node(s): 1 × 1 CPU, 3 × 2 CPU" in done.stdout
    assert [trial["state"] for trial in table(config)] == ["finished"] * 2
    assert all(len(trial["attempts"]) == 1 for trial in table(config)), "waiting for a node is not a failure"


def counts(folder: Path) -> list[int]:
    return [int(line) for line in (folder / "nodes").read_text().splitlines() if line.isdigit()]
