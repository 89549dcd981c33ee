"""Processes that the test session started, by what they are."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.conftest import REPOSITORY


def spawn(*command: str, **environment: str) -> subprocess.Popen[str]:
    """A command in the repository's folder, whose output is one stream of lines as they come."""
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def replicas() -> set[int]:
    """Process ids of the application's replicas."""
    pids = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if b"ServeReplica:htcl:" in (process / "cmdline").read_bytes() and _is_of_this_session(int(process.name)):
                pids.add(int(process.name))
        except OSError:
            continue
    return pids


def children_of(pid: int) -> list[int]:
    """Process ids of a process's children."""
    pids = []
    for task in Path(f"/proc/{pid}/task").glob("*"):
        with suppress(FileNotFoundError):  # a thread that has ended meanwhile
            pids += [int(child) for child in (task / "children").read_text().split()]
    return pids


def _is_of_this_session(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        pid = int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    return False


def descendants(pid: int) -> list[int]:
    """Process ids of a process's children, their children, and so on."""
    pids = [pid]
    for known in pids:
        with suppress(OSError):
            pids += children_of(known)
    return pids[1:]


def command_line(pid: int) -> str:
    """Of a process, or nothing when it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""
