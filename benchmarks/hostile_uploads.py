"""Send mutated and hostile requests to a running application, and check responses, latencies and processes.

    python -m benchmarks.hostile_uploads --url http://127.0.0.1:8000 [--files FOLDER] [--count 1000] [--seed 0]

Sends the requests of `benchmarks/hostile_requests.py`, several at a time. Fails when a status is not documented in
`/openapi.json` (404 for unknown routes), a response is missing or an error has an unexpected shape, or a replica's
process was replaced. Reports the resident memory of every replica before the run, at each quarter and after it.
Replicas and decoders are identified by their process names, below --parent or on the whole machine. Writes
benchmarks/results/hostile_uploads.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from benchmarks.environment import write_result
from benchmarks.hostile_requests import Request, read_files, requests

REPLICA, DECODER = b"ServeReplica:htcl:", b"htcl_ray.audio.sandbox_worker"
QUARTERS = 4
TIMEOUT_SECONDS = 120.0


class Exchange(NamedTuple):
    """One request and its response; status 0 without a response."""

    kind: str
    route: str
    method: str
    status: int
    seconds: float
    problem: str | None


def send(client: httpx.Client, request: Request) -> Exchange:
    """Send one request and check the shape of the response."""
    started, status = time.perf_counter(), 0
    try:
        headers = {"content-type": request.content_type}
        response = client.request(
            request.method, request.path or request.route, content=request.content, headers=headers
        )
        status, problem = response.status_code, shape_problem(response)
    except httpx.HTTPError as error:
        problem = f"no response: {type(error).__name__}: {error}"
    return Exchange(request.kind, request.route, request.method, status, time.perf_counter() - started, problem)


def shape_problem(response: httpx.Response) -> str | None:
    """Describe the defect in the shape of a response; None for a valid one."""
    try:
        body = response.json()
    except ValueError:
        return "the response is not JSON"
    if response.status_code < 400 or (
        isinstance(body, dict) and set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    ):
        return None
    return "the error does not have the shape of errors"


def undocumented(exchanges: Sequence[Exchange], openapi: dict[str, Any]) -> Counter[str]:
    """Count statuses that `/openapi.json` does not document, by route and status."""
    counts: Counter[str] = Counter()
    for exchange in exchanges:
        methods = openapi["paths"].get(exchange.route, {})
        documented = methods.get(exchange.method.lower(), {}).get("responses", {"404": {}, "405": {}})
        if exchange.status and str(exchange.status) not in documented:
            counts[f"{exchange.method} {exchange.route} {exchange.status}"] += 1
    return counts


def processes(name: bytes, parent: int | None) -> dict[int, int]:
    """Map the ids of processes of this name, below `parent` or on the whole machine, to their resident bytes."""
    resident = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(process.name)
            if name in (process / "cmdline").read_bytes() and (parent is None or _is_below(pid, parent)):
                resident[pid] = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # ended meanwhile
            continue
    return resident


def _is_below(pid: int, parent: int) -> bool:
    while pid > 1:
        if pid == parent:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def summary(
    exchanges: Sequence[Exchange],
    openapi: dict[str, Any],
    memory: Sequence[dict[int, int]],
    decoders: Sequence[set[int]],
) -> dict[str, Any]:
    """Summarise a run for the report."""
    slowest = sorted(exchanges, key=lambda exchange: -exchange.seconds)[:5]
    problems = [f"{exchange.kind}: {exchange.problem}" for exchange in exchanges if exchange.problem]
    replaced = sum(len(later - earlier) for earlier, later in itertools.pairwise(decoders))
    return {
        "requests": len(exchanges),
        "statuses": dict(sorted(Counter(str(exchange.status) for exchange in exchanges).items())),
        "undocumented": dict(undocumented(exchanges, openapi)),
        "problems": problems[:20],
        "slowest": [
            {"kind": exchange.kind, "status": exchange.status, "seconds": round(exchange.seconds, 3)}
            for exchange in slowest
        ],
        "replicas_restarted": len({frozenset(moment) for moment in memory}) > 1,
        "replica_megabytes": {
            str(pid): [round(moment.get(pid, 0) / 1e6) for moment in memory] for pid in sorted(memory[0])
        },
        "decoders_replaced_at_least": replaced,
    }


def run(url: str, sent: Sequence[Request], *, parallel: int, parent: int | None, key: str | None) -> dict[str, Any]:
    """Send all requests and return the report."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with (
        httpx.Client(base_url=url, timeout=TIMEOUT_SECONDS, headers=headers) as client,
        ThreadPoolExecutor(parallel) as threads,
    ):
        openapi = client.get("/openapi.json").raise_for_status().json()
        exchanges: list[Exchange] = []
        memory, decoders = [processes(REPLICA, parent)], [set(processes(DECODER, parent))]
        size = -(-len(sent) // QUARTERS)
        for start in range(0, len(sent), size):
            exchanges += threads.map(lambda request: send(client, request), sent[start : start + size])
            memory.append(processes(REPLICA, parent))
            decoders.append(set(processes(DECODER, parent)))
        client.get("/readyz").raise_for_status()
    return summary(exchanges, openapi, memory, decoders)


def main() -> None:
    """Run the benchmark from the command line; exit status 1 when a check fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--files", type=Path, default=Path("../shared/data/oddaudio"))
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--parent", type=int, help="count only processes below this one")
    parser.add_argument("--key", help="API key, if reading requires one")
    arguments = parser.parse_args()
    sent = list(requests(read_files(arguments.files), arguments.count, arguments.seed))
    result = run(arguments.url, sent, parallel=arguments.parallel, parent=arguments.parent, key=arguments.key)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    print(write_result("hostile_uploads", {"seed": arguments.seed, "parallel": arguments.parallel, **result}))
    if result["undocumented"] or result["problems"] or result["replicas_restarted"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
