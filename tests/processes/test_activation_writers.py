"""Processes that activate indexes at the same time."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.unit.index.live.test_activation import check_order, store, uri

pytestmark = pytest.mark.processes
__all__ = ["store", "uri"]
"""Fixtures."""

APPEND = """
import json, sys
from htcl_ray.index.live.activation import Activations
from htcl_ray.workspace.storage import Workspace
activations = Activations(Workspace(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for turn in range(5):
    before = max((pointer.order for pointer in activations.latest_first()), default="")
    print(json.dumps([before, activations.append(f"{sys.argv[2]}-{turn}").order]), flush=True)
"""


def test_concurrent_writers(uri: str):
    command = [sys.executable, "-c", APPEND, uri]
    options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    running = [subprocess.Popen([*command, str(number)], **options) for number in range(4)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0].splitlines() for process in running]
    check_order(Workspace(uri), [[tuple(json.loads(line)) for line in lines] for lines in outputs])
