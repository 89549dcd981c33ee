"""Write results of benchmarks with the machine, the code and the versions that produced them."""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from htcl_ray.workspace.manifest import build_manifest

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write NAME.json, with `environment` and then the result, to benchmarks/results/ or another folder."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({**environment(), **result}, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def environment() -> dict[str, Any]:
    """Collect command, date, commit, hardware and library versions."""
    return {
        "command": shlex.join(["python", "-m", _module(), *map(_without_folders, sys.argv[1:])]),
        "date": datetime.now(UTC).date().isoformat(),
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "hardware": {"cpu": _cpu(), "cores": len(os.sched_getaffinity(0)), "memory_gb": _memory_gb()},
        "python": platform.python_version(),
        "libraries": build_manifest("benchmark", config={}, inputs={})["libraries"],
    }


def _without_folders(argument: str) -> str:
    """The argument, but of an absolute path the last part only: its folders exist on this machine alone."""
    option, equals, value = argument.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if Path(value).is_absolute() else argument


def _module() -> str:
    """Name of the module that was started with python -m."""
    spec = sys.modules["__main__"].__spec__
    return spec.name.removesuffix(".__main__") if spec is not None else f"benchmarks.{Path(sys.argv[0]).stem}"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=RESULTS.parent)
    except FileNotFoundError:  # a source tree on a machine without git
        return None
    return done.stdout.strip() or None


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _memory_gb() -> int:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
