"""Processes that the benchmark of hostile uploads watches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from benchmarks.hostile_uploads import processes

pytestmark = pytest.mark.processes


def test_processes_are_listed_by_name_and_parent():
    name = "a-process-to-be-listed"
    command = [sys.executable, "-c", "print('started', flush=True); input()", name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        try:
            assert child.stdout.readline() == b"started\n"
            assert (
                set(processes(name.encode(), os.getpid()))
                == {child.pid}
                == set(processes(name.encode(), None)) - {os.getpid()}
            )
            assert processes(name.encode(), child.pid)[child.pid] > 0
            assert not processes(name.encode(), 2**30)
        finally:
            child.kill()
