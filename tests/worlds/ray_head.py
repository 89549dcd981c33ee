"""A head node of its own for a test, started as a user starts one, and jobs submitted to it. It ends with the process
that was started."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import REPOSITORY
from tests.worlds.processes import descendants

BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Head:
    """Where a running head node is reached."""

    address: str
    dashboard: str


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
    kept = {
        name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR")
    }
    return {**kept, "RAY_AUTH_MODE": "token", "PATH": f"{BIN}:{os.environ['PATH']}"}


@contextlib.contextmanager
def head_node(*flags: str, variables: Mapping[str, str] | None = None, port: int | None = None) -> Iterator[Head]:
    """`ray start --head` with these flags and environment variables, on `port` and other ports of its own."""
    subprocess.run([BIN / "ray", "get-auth-token", "--generate"], env=environment(), check=True, capture_output=True)
    free, dashboard, agent, client = free_ports(4)
    gcs = port or free
    folder = Path(tempfile.mkdtemp(prefix="htcl-head-"))  # short: Ray puts sockets below it
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        f"--port={gcs}",
        f"--dashboard-port={dashboard}",
        f"--temp-dir={folder}",
    ]
    command += [
        f"--dashboard-agent-listen-port={agent}",
        f"--ray-client-server-port={client}",
        "--min-worker-port=0",
        "--max-worker-port=0",
    ]
    command += ["--object-store-memory=200000000", "--disable-usage-stats", *flags]
    log = folder / "start.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            env={**environment(), "PYTHONPATH": str(REPOSITORY), **(variables or {})},
            stdout=output,
            stderr=output,
            cwd=REPOSITORY,
        )
    try:
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.5)
        yield Head(f"127.0.0.1:{gcs}", f"http://127.0.0.1:{dashboard}")
    finally:
        # Ray ends its processes one after the other, each with time to finish work that the tests do not need.
        started = [*descendants(process.pid), process.pid]
        for pid in started:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def submit(head: Head, *entrypoint: str, upload: bool = True, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`ray job submit`, waiting for the job's end; with the working directory unless not `upload`."""
    working_dir = ("--working-dir", ".") if upload else ()
    command = [BIN / "ray", "job", "submit", "--address", head.dashboard, *working_dir, "--", *entrypoint]
    return subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=timeout)
