"""A measurement in a process of its own, and that process's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident_mb() -> dict[str, float]:
    """Resident memory of this process in MB (10⁶ bytes), now and at its peak.

    VmHWM rather than ru_maxrss: the latter begins with the memory of the process that started this one.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {"now": _mb(fields["VmRSS"]), "peak": _mb(fields["VmHWM"])}


def _mb(field: str) -> float:
    return round(int(field.split()[0]) * 1024 / 1e6, 1)


def in_own_process(module: str, case: dict[str, Any]) -> dict[str, Any]:
    """`python -m module --measure CASE`: the JSON of its last line, or {"error": why it ended}."""
    done = subprocess.run([sys.executable, "-m", module, "--measure", json.dumps(case)], capture_output=True, text=True)
    if done.returncode < 0:
        return {
            "error": f"ended by signal {-done.returncode}"
            + (", as when memory runs out" if done.returncode == -9 else "")
        }
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])
