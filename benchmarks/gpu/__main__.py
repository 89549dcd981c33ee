"""Training and embedding on a GPU: correctness against the CPU, a table of training steps, embedding rates and a
profile.

    python -m benchmarks.gpu [--minutes 8] [--parts correctness,step,embed,profile] [--device auto] [--out benchmarks/results]

Runs from the source tree with torch, transformers, pyarrow, pandas, pydantic and rich alone: no Ray, FAISS or audio
library. On a GPU at the paper's size; without one at toy size on the CPU, which rehearses the same code.

Each part is a process of its own. Every line is printed as soon as it is measured and the JSON (gpu.json, on the CPU
gpu_rehearsal.json) is written after each part. A part that dies is started again behind the measurement that killed it;
one that is not done when its time is up is ended, and what it had measured stays. Exits 0 when every correctness check
held, 1 when one failed or is missing, 2 on wrong usage.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.environment import RESULTS, write_result
from benchmarks.gpu.units import Part, read_records

PARTS = ("correctness", "step", "embed", "profile")
SHARES = {"cuda": (0.25, 0.57, 0.09, 0.09), "cpu": (0.70, 0.20, 0.05, 0.05)}
"""Of the time, and of what the parts before have left over too. On a CPU compiling takes longer than everything
else."""
RESERVE_SECONDS = 5.0
"""Kept back for writing the result."""
MAX_STARTS = 6
"""Of one part: a GPU that fails at everything must not use up the time."""


def supervise(name: str, device: str, until: float, scratch: Path) -> dict[str, Any]:
    """Run one part in processes of its own until it is done or the clock (seconds since the epoch) says `until`; return
    its record.
    """
    records, started = scratch / f"{name}.jsonl", time.time()
    ended = "not started: no time was left"
    for _ in range(MAX_STARTS):
        if time.time() >= until:
            break
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--run",
            name,
            "--device",
            device,
            "--until",
            str(until),
            "--records",
            str(records),
        ]
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(timeout=max(0.0, until - time.time()))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(
                ProcessLookupError
            ):  # the compiler's workers too, which belong to the session of the part
                os.killpg(process.pid, signal.SIGKILL)
            with contextlib.suppress(
                subprocess.TimeoutExpired
            ):  # a process that hangs in the driver ends when the driver lets it
                process.wait(timeout=RESERVE_SECONDS / 2)
        ended = "done" if code == 0 else "cut off at its time limit" if code is None else f"ended with exit code {code}"
        if code in (0, None):
            break
        print(f"{name}: {ended}; the measurement in progress is marked as failed", flush=True)
    return {"ended": ended, "seconds": round(time.time() - started, 1), "units": read_records(records, ended)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="the whole run ends within this time")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated, in this order")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: the GPU if the machine has one"
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--records", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        importlib.import_module(f"benchmarks.gpu.{options.run}").run(
            Part(options.run, options.device, options.until, options.records)
        )
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the process of the part is ended too
    chosen = options.parts.split(",")
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"--parts: unknown part '{min(unknown)}'; expected some of {','.join(PARTS)}")
    chosen = [name for name in PARTS if name in chosen]
    end = time.time() + 60 * options.minutes - RESERVE_SECONDS
    device = _device(options.device, parser)
    result: dict[str, Any] = {**device, "minutes": options.minutes, "parts": {}}
    name = "gpu" if device["device"] == "cuda" else "gpu_rehearsal"
    options.out.mkdir(parents=True, exist_ok=True)
    print(f"device: {device}", flush=True)
    shares = dict(zip(PARTS, SHARES[device["device"]], strict=True))
    with tempfile.TemporaryDirectory() as scratch:
        for position, part in enumerate(chosen):
            share = shares[part] / sum(shares[later] for later in chosen[position:])
            until = time.time() + share * (end - time.time())
            result["parts"][part] = supervise(part, device["device"], until, Path(scratch))
            path = write_result(name, result, options.out)
            print(
                f"{part}: {result['parts'][part]['ended']}, {result['parts'][part]['seconds']} s; written: {path}",
                flush=True,
            )
    return _verdict(result["parts"].get("correctness"))


def _device(wanted: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """Describe the device, in a process of its own so that this one holds no memory of the GPU."""
    code = (
        "import json, torch; cuda = torch.cuda.is_available(); p = torch.cuda.get_device_properties(0) if cuda else None;"
        "print(json.dumps({'device': 'cuda', 'name': p.name, 'memory_gb': round(p.total_memory / 2**30), 'torch': torch.__version__,"
        "'cuda': torch.version.cuda, 'capability': [p.major, p.minor]} if cuda else {'device': 'cpu', 'torch': torch.__version__}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        parser.error(f"torch does not work here: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    environment = json.loads(done.stdout)
    if wanted == "cuda" and environment["device"] != "cuda":
        parser.error("--device cuda: torch finds no GPU")
    return (
        environment
        if wanted == "auto" or environment["device"] == wanted
        else {"device": wanted, "torch": environment["torch"]}
    )


def _verdict(correctness: dict[str, Any] | None) -> int:
    """Exit code, and one line that says why."""
    if correctness is None:
        return 0
    failed = [name for name, unit in correctness["units"].items() if not unit.get("passed")]
    if not failed and correctness["ended"] == "done":
        print("correctness: every check held", flush=True)
        return 0
    print(f"correctness: {', '.join(failed) or 'nothing'} failed; the part {correctness['ended']}", flush=True)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
