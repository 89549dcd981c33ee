"""Measure failed requests while parts of the running application are killed.

    python -m benchmarks.chaos [--replicas 1,2] [--kill encoder,ingress,…] [--repeats 1]

Starts `htcl serve` for each combination of part and number of replicas (of encoder and ingress) and sends 900 requests
at 20 per second without retries, alternating between song, similar songs, text and upload. After 15 s the part is
killed with SIGKILL; for SIGTERM of the whole application, 400 requests are sent, 100 of them before the signal. Every
text and every clip is sent once, so that no response is cached. Each run reports the requests by outcome, the responses
other than 200, how many of those need no encoder, and the time between the first and the last of them.

Prints a table and writes benchmarks/results/chaos.json.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.hostile_uploads import DECODER, processes
from benchmarks.served_world import make_world, recording, song_id

PARTS = ("encoder", "ingress", "haproxy", "controller", "decoder", "sigterm")
RATE = 20.0
REQUESTS = 900
KILL_AFTER = 300
SIGTERM_REQUESTS, SIGTERM_AFTER = 400, 100
SONGS = 2_000
NAMES = {
    "encoder": b"ServeReplica:htcl:Encoder",
    "ingress": b"ServeReplica:htcl:Ingress",
    "controller": b"ServeController",
    "haproxy": b"haproxy.cfg",
    "decoder": DECODER,
}
"""Part of the command line of each part's processes."""


@dataclass
class Sent:
    """One request and its outcome."""

    at: float
    """Seconds since the first request."""
    kind: str
    outcome: str
    """HTTP status, or the name of the exception."""
    took: float


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill parts of the running application and count failed requests.")
    parser.add_argument("--replicas", default="1,2")
    parser.add_argument("--kill", default=",".join(PARTS), help="parts to kill (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=1)
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        make_world(workspace, SONGS)
        for replicas in (int(text) for text in options.replicas.split(",")):
            for part in options.kill.split(","):
                for _ in range(options.repeats):
                    rows.append(run(workspace, part, replicas))
                    print(rows[-1], file=sys.stderr, flush=True)
    show(rows)
    print(write_result("chaos", {"rate": RATE, "requests": REQUESTS, "songs": SONGS, "runs": rows}))


def run(workspace: Path, part: str, replicas: int) -> dict[str, Any]:
    """Start the application, send requests, kill the part, stop, and return the metrics of one row."""
    settings = {
        "workspace": str(workspace),
        "serve.port": 0,
        "serve.metrics_port": 0,
        "serve.encoder_replicas": replicas,
        "serve.ingress_replicas": replicas,
        "serve.encoder_cpus": 0.5,
        "ray.num_cpus": 8,
    }
    command = [str(Path(sys.executable).with_name("htcl")), "serve", "--preset", "demo"]
    command += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        url = next(match[1] for line in process.stdout if (match := re.search(r"at (http://\S+);", line)))
        whole = part == "sigterm"
        sent = asyncio.run(
            send(url, process, part, SIGTERM_REQUESTS if whole else REQUESTS, SIGTERM_AFTER if whole else KILL_AFTER)
        )
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=90)
        except subprocess.TimeoutExpired:
            process.kill()
    failed = [one for one in sent if one.outcome != "200"]
    return {
        "killed": part,
        "replicas": replicas,
        "requests": len(sent),
        "failed": len(failed),
        "failed_without_encoder": sum(one.kind in ("song", "similar") for one in failed),
        "outcomes": dict(Counter(one.outcome for one in sent)),
        "seconds_without_service": round(failed[-1].at - failed[0].at, 1) if failed else 0.0,
        "slowest_answer_s": round(max((one.took for one in sent if one.outcome == "200"), default=0.0), 1),
    }


async def send(url: str, process: subprocess.Popen[str], part: str, requests: int, kill_after: int) -> list[Sent]:
    """Send requests at fixed times, independently of earlier responses (open loop)."""
    sent: list[Sent] = []
    begun = time.perf_counter()
    limits = httpx.Limits(max_connections=500, max_keepalive_connections=50)
    async with httpx.AsyncClient(base_url=url, timeout=40, limits=limits, trust_env=False) as client:

        async def one(number: int) -> None:
            at = number / RATE
            await asyncio.sleep(max(0.0, begun + at - time.perf_counter()))
            kind = ("song", "similar", "text", "upload")[number % 4]
            started = time.perf_counter()
            try:
                outcome = str((await request(client, kind, number)).status_code)
            except httpx.HTTPError as error:
                outcome = type(error).__name__
            sent.append(Sent(at, kind, outcome, time.perf_counter() - started))

        running = [asyncio.create_task(one(number)) for number in range(requests)]
        await asyncio.sleep(max(0.0, begun + kill_after / RATE - time.perf_counter()))
        for pid in [process.pid] if part == "sigterm" else sorted(processes(NAMES[part], process.pid))[:1]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM if part == "sigterm" else signal.SIGKILL)
        await asyncio.gather(*running)
    return sorted(sent, key=lambda one: one.at)


async def request(client: httpx.AsyncClient, kind: str, number: int) -> httpx.Response:
    """Send request `number`."""
    if kind == "song":
        return await client.get(f"/v1/songs/{song_id(number)}")
    if kind == "similar":
        return await client.get(f"/v1/songs/{song_id(number)}/similar", params={"k": 10})
    if kind == "text":
        return await client.post("/v1/search", json={"text": f"calm rock number {number}"})
    return await client.post("/v1/search/audio", files={"file": ("clip.wav", recording(number))})


def show(rows: list[dict[str, Any]]) -> None:
    """Print the results as a table."""
    table = Table(
        "killed", "replicas", "failed", "failed, no encoder needed", "s without service", "slowest, s", "outcomes"
    )
    for row in rows:
        cells = (
            "killed",
            "replicas",
            "failed",
            "failed_without_encoder",
            "seconds_without_service",
            "slowest_answer_s",
            "outcomes",
        )
        table.add_row(*(str(row[name]) for name in cells))
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
