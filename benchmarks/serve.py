"""Measure throughput and latency of the running application, of the same service without Ray, and without HTTP.

    python -m benchmarks.serve [--songs 20000] [--seconds 10] [--only haproxy,ray,bare]

Serves an index of random unit vectors and an untrained model of the demo preset's size (training does not change the
speed) in three ways, one after the other: `htcl serve` behind Ray's HAProxy, the same behind Ray's own proxy, and a
bare FastAPI + uvicorn process with model and index. An open-loop generator (benchmarks/load.py) in this process shares
the machine with them. Reports for each kind of query the highest sustained rate (saturation), the latency at half of
it, and, for queries by song, throughput and latency at three times of it.

Prints a table and writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.load import Outcome, drive, request_bytes
from benchmarks.served_world import config_of, make_world, recording, song_id
from htcl_ray.cluster.ray_internals import HAPROXY_SWITCH, SINGLE_EVENT_LOOP

FRONTS = ("haproxy", "ray", "bare")
MIN_ACCEPTED_SHARE = 0.95
"""Smallest share of requests with status 200 at a sustained rate."""
SLOW_SECONDS = 1.0
"""Largest latency at the end of a run at a sustained rate; a larger one means that the queue is still filling."""
STEP = 1.2
FIRST_RATE = {"by song": 150.0, "by text": 40.0, "by remembered text": 150.0, "by recording": 8.0}


def main() -> None:
    parser = argparse.ArgumentParser(description="Throughput and latency of the application.")
    parser.add_argument("--songs", type=int, default=20_000)
    parser.add_argument("--seconds", type=float, default=10.0, help="duration of each measurement")
    parser.add_argument("--only", default=",".join(FRONTS), help="fronts to measure")
    parser.add_argument(
        "--queries",
        default=",".join(FIRST_RATE),
        help="kinds of query to measure; the result of a subset is written to serve_part.json",
    )
    parser.add_argument("--serve", choices=FRONTS, help=argparse.SUPPRESS)
    parser.add_argument("--workspace", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        from benchmarks.served_world import serve_here

        serve_here(options.serve, options.workspace)
        return
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        workspace = Path(folder) / "workspace"
        make_world(workspace, options.songs)
        results["in process"] = in_process(workspace, options.songs)
        for front in options.only.split(","):
            with running(front, workspace) as urls:
                results[front] = measure(urls["url"], options.songs, options.seconds, options.queries.split(","))
                results[front]["stages"] = stages(urls.get("metrics"))
    show(results)
    whole = options.queries == parser.get_default("queries")
    name = "serve" if whole else "serve_part"
    write_result(name, {"songs": options.songs, "seconds": options.seconds, "fronts": results})


@contextmanager
def running(front: str, workspace: Path) -> Iterator[dict[str, str]]:
    """Run the application in a separate process; yields its URLs `url` and, with Ray, `metrics`."""
    environment = {**os.environ, **({**SINGLE_EVENT_LOOP, HAPROXY_SWITCH: "0"} if front == "ray" else {})}
    command = [sys.executable, "-m", "benchmarks.serve", "--serve", front, "--workspace", str(workspace)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                yield json.loads(line)
                break
        else:
            raise SystemExit(f"the application behind {front} did not start")
    finally:
        process.communicate("stop\n", timeout=120)


def measure(url: str, songs: int, seconds: float, kinds: Sequence[str]) -> dict[str, Any]:
    """Measure saturation and latencies of the given kinds of query."""
    rng = np.random.default_rng(0)
    chosen = [song_id(int(row)) for row in rng.integers(songs, size=2000)]
    queries = {
        "by song": [request_bytes(url, "GET", f"/v1/songs/{name}/similar") for name in chosen],
        "by text": [search(url, {"text": f"calm piano number {number}"}) for number in range(20_000)],
        "by remembered text": [search(url, {"text": "calm piano"})],
        "by recording": [upload(url, number) for number in range(4_000)],
    }
    results: dict[str, Any] = {}
    for kind in kinds:
        requests = cycle(queries[kind])  # shared by all runs, so that a run does not repeat cached requests
        saturation = saturate(url, requests, FIRST_RATE[kind], seconds / 2)
        half = uvloop.run(drive(url, requests, saturation / 2, seconds))
        results[kind] = {"saturation_per_second": round(saturation, 1), "at_half": half.as_json()}
        if kind == "by song":
            results[kind]["at_saturation"] = uvloop.run(drive(url, requests, saturation, seconds)).as_json()
            results[kind]["at_three_times"] = uvloop.run(drive(url, requests, 3 * saturation, seconds)).as_json()
        print(kind, json.dumps(results[kind]), flush=True)
    return results


def saturate(url: str, requests: Iterator[bytes], first: float, seconds: float) -> float:
    """Raise the rate until the application no longer keeps up; return the highest throughput per second."""
    rate, best = first, 0.0
    while True:
        outcome: Outcome = uvloop.run(drive(url, requests, rate, seconds))
        best = max(best, outcome.throughput)
        if (
            len(outcome.accepted) < MIN_ACCEPTED_SHARE * len(outcome.late)
            or max(outcome.accepted[-20:], default=1.0) > SLOW_SECONDS
        ):
            return best
        rate *= STEP


def search(url: str, query: dict[str, Any]) -> bytes:
    return request_bytes(url, "POST", "/v1/search", json.dumps(query).encode())


@cache
def clip(seed: int) -> bytes:
    return recording(seed)


def upload(url: str, number: int) -> bytes:
    """Build an upload of one of twenty clips, with unique last samples, so that no response is cached."""
    part = (
        b'--edge\r\nContent-Disposition: form-data; name="file"; filename="clip.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    )
    return request_bytes(
        url,
        "POST",
        "/v1/search/audio",
        part + clip(number % 20)[:-4] + number.to_bytes(4, "little") + b"\r\n--edge--\r\n",
        "multipart/form-data; boundary=edge",
    )


def in_process(workspace: Path, songs: int) -> dict[str, Any]:
    """Measure queries per second of the service itself, sequentially in one thread."""
    from htcl_ray.search.service import SearchService

    service = SearchService.open(config_of(workspace))
    rows = np.random.default_rng(0).integers(songs, size=2000)
    clips = [recording(seed) for seed in range(20)]
    return {
        "by song": per_second(lambda i: service.search_songs([song_id(int(rows[i % len(rows)]))])),
        "by text": per_second(lambda i: service.search_text(f"calm piano number {i}")),
        "by recording": per_second(lambda i: service.search_audio(clips[i % len(clips)])),
    }


def per_second(query: Callable[[int], Any], seconds: float = 3.0) -> float:
    query(0)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        query(count)
        count += 1
    return round(count / (time.perf_counter() - started), 1)


def stages(metrics: str | None) -> dict[str, Any]:
    """Read the milliseconds of each stage from the Prometheus metrics: mean and percentiles; empty without Ray."""
    if metrics is None:
        return {}
    sums: Counter[tuple[str, str]] = Counter()
    buckets: dict[str, Counter[float]] = defaultdict(Counter)
    for line in httpx.get(metrics, timeout=10).text.splitlines():
        name, _, rest = line.partition("{")
        stage = rest.partition('stage="')[2].partition('"')[0]
        if name == "ray_htcl_stage_seconds_bucket":
            buckets[stage][float(rest.partition('le="')[2].partition('"')[0])] += float(line.rsplit(" ", 1)[1])
        elif name in ("ray_htcl_stage_seconds_sum", "ray_htcl_stage_seconds_count"):
            sums[stage, name.rpartition("_")[2]] += float(line.rsplit(" ", 1)[1])
    return {
        stage: {
            "mean_ms": round(1000 * sums[stage, "sum"] / sums[stage, "count"], 3),
            **{f"p{percent}_ms": round(1000 * percentile(cumulative, percent / 100), 2) for percent in (50, 95, 99)},
            "count": int(sums[stage, "count"]),
        }
        for stage, cumulative in sorted(buckets.items())
    }


def percentile(cumulative: Counter[float], share: float) -> float:
    """Estimate a quantile in seconds from a histogram, by linear interpolation within a bucket.

    `cumulative` maps the upper bound of each bucket to the number of entries up to it.
    """
    wanted, lower, below = share * cumulative[math.inf], 0.0, 0.0
    for bound, count in sorted(cumulative.items()):
        if count >= wanted:
            return lower if math.isinf(bound) else lower + (bound - lower) * (wanted - below) / max(count - below, 1e-9)
        lower, below = bound, count
    return lower


def show(results: dict[str, Any]) -> None:
    """Print the results as tables."""
    table = Table(title="Responses per second, and latency in milliseconds at half of saturation")
    for column in ("", "query", "saturation", "of bare", "p50", "p95", "p99", "3×: accepted", "3×: p99", "3×: 429"):
        table.add_column(column, justify="left" if column in ("", "query") else "right")
    for kind, rate in results["in process"].items():
        table.add_row("in process", kind, f"{rate:.0f}")
    for front, kinds in results.items():
        for kind, metrics in kinds.items() if front in FRONTS else ():
            if kind == "stages":
                continue
            bare = results.get("bare", {}).get(kind, {}).get("saturation_per_second")
            half, flood = metrics["at_half"], metrics.get("at_three_times")
            row = [
                front,
                kind,
                f"{metrics['saturation_per_second']:.0f}",
                f"{metrics['saturation_per_second'] / bare:.0%}" if bare else "",
            ]
            row += [f"{half[name]:.1f}" if half[name] is not None else "–" for name in ("p50_ms", "p95_ms", "p99_ms")]
            if flood:
                row += [
                    f"{flood['answered_per_second']:.0f}",
                    f"{flood['p99_ms']:.0f}",
                    str(flood["statuses"].get("429", 0)),
                ]
            table.add_row(*row)
    Console().print(table)
    parts = Table("", "stage", "mean", "p50", "p95", "p99", title="Milliseconds of each stage, over the whole run")
    for front in results:
        for stage, times in (results[front].get("stages") or {}).items():
            parts.add_row(front, stage, *(f"{times[f'{name}_ms']:.1f}" for name in ("mean", "p50", "p95", "p99")))
    Console().print(parts)


if __name__ == "__main__":
    main()
