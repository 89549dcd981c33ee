"""A running application under mutated and hostile requests: what it answers, how slowly, and what becomes of its
processes.

    python -m benchmarks.hostile_uploads --url http://127.0.0.1:8000 [--files ../shared/data/oddaudio] [--count 1000] [--seed 0]

Sends requests of `benchmarks/hostile_requests.py`, several at a time, and fails when an answer's status is not
documented in `/openapi.json` (404 for routes that it does not have), an answer is missing or not in the one shape of
failures, or a replica's process is another one afterwards. Memory: resident bytes of every replica before, at each
quarter, and after; replicas and decoders are found by the name of their process, below --parent or on the whole
machine. Writes benchmarks/results/hostile_uploads.json.
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
ANSWER_SECONDS = 120.0


class Answer(NamedTuple):
    """What came back; status 0 when nothing did."""

    kind: str
    route: str
    method: str
    status: int
    seconds: float
    problem: str | None


def ask(client: httpx.Client, request: Request) -> Answer:
    """Send one request."""
    started, status = time.perf_counter(), 0
    try:
        headers = {"content-type": request.content_type}
        response = client.request(
            request.method, request.path or request.route, content=request.content, headers=headers
        )
        status, problem = response.status_code, misshapen(response)
    except httpx.HTTPError as error:
        problem = f"no answer: {type(error).__name__}: {error}"
    return Answer(request.kind, request.route, request.method, status, time.perf_counter() - started, problem)


def misshapen(response: httpx.Response) -> str | None:
    """What is wrong with the shape of an answer."""
    try:
        body = response.json()
    except ValueError:
        return "the answer is not JSON"
    if response.status_code < 400 or (
        isinstance(body, dict) and set(body) == {"error"} and set(body["error"]) == {"code", "message"}
    ):
        return None
    return "the failure is not in the one shape"


def undocumented(answers: Sequence[Answer], openapi: dict[str, Any]) -> Counter[str]:
    """Statuses that `/openapi.json` does not tell of, by route and status."""
    found: Counter[str] = Counter()
    for answer in answers:
        methods = openapi["paths"].get(answer.route, {})
        told = methods.get(answer.method.lower(), {}).get("responses", {"404": {}, "405": {}})
        if answer.status and str(answer.status) not in told:
            found[f"{answer.method} {answer.route} {answer.status}"] += 1
    return found


def processes(name: bytes, parent: int | None) -> dict[int, int]:
    """Resident bytes of the processes of this name, by id: those below `parent`, or all."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            pid = int(process.name)
            if name in (process / "cmdline").read_bytes() and (parent is None or _is_below(pid, parent)):
                found[pid] = int((process / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:  # ended meanwhile
            continue
    return found


def _is_below(pid: int, parent: int) -> bool:
    while pid > 1:
        if pid == parent:
            return True
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return False


def summary(
    answers: Sequence[Answer], openapi: dict[str, Any], memory: Sequence[dict[int, int]], decoders: Sequence[set[int]]
) -> dict[str, Any]:
    """What the run showed."""
    slowest = sorted(answers, key=lambda answer: -answer.seconds)[:5]
    problems = [f"{answer.kind}: {answer.problem}" for answer in answers if answer.problem]
    replaced = sum(len(later - earlier) for earlier, later in itertools.pairwise(decoders))
    return {
        "requests": len(answers),
        "statuses": dict(sorted(Counter(str(answer.status) for answer in answers).items())),
        "undocumented": dict(undocumented(answers, openapi)),
        "problems": problems[:20],
        "slowest": [
            {"kind": answer.kind, "status": answer.status, "seconds": round(answer.seconds, 3)} for answer in slowest
        ],
        "replicas_restarted": len({frozenset(moment) for moment in memory}) > 1,
        "replica_megabytes": {
            str(pid): [round(moment.get(pid, 0) / 1e6) for moment in memory] for pid in sorted(memory[0])
        },
        "decoders_replaced_at_least": replaced,
    }


def run(url: str, sent: Sequence[Request], *, parallel: int, parent: int | None, key: str | None) -> dict[str, Any]:
    """Send everything and say what happened."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    with (
        httpx.Client(base_url=url, timeout=ANSWER_SECONDS, headers=headers) as client,
        ThreadPoolExecutor(parallel) as threads,
    ):
        openapi = client.get("/openapi.json").raise_for_status().json()
        answers: list[Answer] = []
        memory, decoders = [processes(REPLICA, parent)], [set(processes(DECODER, parent))]
        size = -(-len(sent) // QUARTERS)
        for start in range(0, len(sent), size):
            answers += threads.map(lambda request: ask(client, request), sent[start : start + size])
            memory.append(processes(REPLICA, parent))
            decoders.append(set(processes(DECODER, parent)))
        client.get("/readyz").raise_for_status()
    return summary(answers, openapi, memory, decoders)


def main() -> None:
    """Read the arguments, run, write, print, and exit 1 when something is not as it must be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True)
    parser.add_argument("--files", type=Path, default=Path("../shared/data/oddaudio"))
    parser.add_argument("--count", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=4)
    parser.add_argument("--parent", type=int, help="count only processes below this one")
    parser.add_argument("--key", help="API key, where reading needs one")
    arguments = parser.parse_args()
    sent = list(requests(read_files(arguments.files), arguments.count, arguments.seed))
    result = run(arguments.url, sent, parallel=arguments.parallel, parent=arguments.parent, key=arguments.key)
    print(json.dumps(result, indent=2, ensure_ascii=False))
    print(write_result("hostile_uploads", {"seed": arguments.seed, "parallel": arguments.parallel, **result}))
    if result["undocumented"] or result["problems"] or result["replicas_restarted"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
