"""Run a measurement in a separate process, and measure resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def resident_mb() -> dict[str, float]:
    """Measure the resident memory of this process in MB (10⁶ bytes), now and at its peak.

    Uses VmHWM, because ru_maxrss includes the memory of the parent process.
    """
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {"now": _mb(fields["VmRSS"]), "peak": _mb(fields["VmHWM"])}


def _mb(field: str) -> float:
    return round(int(field.split()[0]) * 1024 / 1e6, 1)


def in_own_process(module: str, case: dict[str, Any]) -> dict[str, Any]:
    """Run `python -m module --measure CASE`; return the JSON of its last line, or {"error": reason}."""
    done = subprocess.run([sys.executable, "-m", module, "--measure", json.dumps(case)], capture_output=True, text=True)
    if done.returncode < 0:
        return {
            "error": f"ended by signal {-done.returncode}"
            + (", as when memory runs out" if done.returncode == -9 else "")
        }
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])
