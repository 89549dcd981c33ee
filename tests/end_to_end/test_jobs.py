"""Jobs, as on a cluster: `ray start --head`, then `ray job submit` with the working directory."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from htcl_ray.sample import write_sample
from htcl_ray.storage import Workspace
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.end_to_end
BIN = Path(sys.executable).parent


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def environment() -> dict[str, str]:
    """As a user's shell: the virtual environment active, token authentication on, no cluster address."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")}
    return {**kept, "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """A cluster of one head node of its own; its dashboard's address. It ends with the process that this fixture started."""
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment(), check=True, capture_output=True)
    gcs, dashboard, agent, client = free_ports(4)
    folder = Path(tempfile.mkdtemp(prefix="htcl-head-"))  # short: Ray puts sockets below it
    command = [BIN / "ray", "start", "--head", "--block", f"--port={gcs}", f"--dashboard-port={dashboard}", f"--temp-dir={folder}"]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    command += ["--num-cpus=4", "--object-store-memory=200000000", "--disable-usage-stats"]
    log = folder / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment(), stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.terminate()
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit(address: str, *entrypoint: str) -> subprocess.CompletedProcess[str]:
    command = [BIN / "ray", "job", "submit", "--address", address, "--working-dir", ".", "--", *entrypoint]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)


def test_preprocess_as_a_job(head: str, tmp_path: Path):
    tables = write_sample(tmp_path / "sample", songs=40, artists=8, users=20, seed=3, seconds=4.0)
    workspace = tmp_path / "workspace"
    flags = ["--preset", "demo", "--workspace", str(workspace), "--set", f"data.catalog={tables.catalog}"]
    flags += ["--set", f"data.interactions={tables.interactions}", "--set", "data.max_rejected_share=0.5"]
    done = submit(head, "python", "jobs/preprocess.py", *flags)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "preprocess: done" in done.stdout
    assert len(Workspace(str(workspace)).finished("features")) == 1
    assert len(Workspace(str(workspace)).finished("pairs")) == 1


def test_bad_input_fails_the_job_with_its_sentence(head: str, tmp_path: Path):
    flags = ["--preset", "demo", "--workspace", str(tmp_path), "--set", f"data.catalog={tmp_path}/absent.csv"]
    done = submit(head, "python", "jobs/preprocess.py", *flags)
    assert done.returncode != 0
    assert "failed with exit code 2" in done.stdout + done.stderr
    assert "htcl: error: " in done.stdout + done.stderr
    assert "absent.csv" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout


def test_a_relative_workspace_is_refused(head: str):
    done = submit(head, "python", "jobs/pretrain.py", "--preset", "demo")
    assert done.returncode != 0
    assert "is relative, and on a remote cluster" in done.stdout + done.stderr
