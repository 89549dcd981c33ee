"""Files of a workspace whose writer is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.processes


def test_a_killed_writer_leaves_no_file(tmp_path: Path):
    """A process killed while it writes leaves the old content, never half of the new."""
    workspace = Workspace(str(tmp_path))
    workspace.write_bytes("big.bin", b"old")
    code = (
        "import sys; from htcl_ray.workspace.storage import Workspace; w = Workspace(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True: w.write_bytes('big.bin', b'n' * 200_000_000)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    deadline = time.monotonic() + 20
    while not any(name.startswith(".big.bin") for name in os.listdir(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(workspace.read_bytes("big.bin")) in (3, 200_000_000)
    assert workspace.children("") == ["big.bin"]
