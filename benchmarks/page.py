"""Measure the latency of the page: from loading to the first result in a browser, and searches while the dial moves.

    python -m benchmarks.page [--workspace FOLDER] [--songs 10000] [--repetitions 10]

Model and index run in this process without Ray, so that the page is measured and not the cluster, which
benchmarks/serve.py measures. Without a workspace, an index of random vectors is generated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Browser, sync_playwright

from benchmarks.environment import write_result
from benchmarks.served_world import Bare, config_of, make_world
from htcl_ray.serving.http_app import create_app

BLENDS = 51
FIRST_RESULT = "() => performance.getEntriesByName('first-result')[0]?.startTime"
MARK_FIRST_RESULT = """
addEventListener("DOMContentLoaded", () => new MutationObserver((_, watcher) => {
  if (document.querySelector("#cards .card:not(.skeleton)")) { performance.mark("first-result"); watcher.disconnect(); }
}).observe(document.getElementById("cards"), { childList: true }));
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--songs", type=int, default=10_000)
    parser.add_argument("--repetitions", type=int, default=10)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        workspace = arguments.workspace or Path(scratch) / "workspace"
        if arguments.workspace is None:
            make_world(workspace, arguments.songs)
        result = measure(workspace, arguments.repetitions)
    print(json.dumps(result, indent=2))
    print(write_result("page", result))


def measure(workspace: Path, repetitions: int) -> dict[str, Any]:
    """Return medians and maxima in milliseconds."""
    backend = Bare(config_of(workspace))
    server_times: list[float] = []
    with _serving(backend, server_times) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        first = [_load(browser, url, number) for number in range(repetitions + 1)][1:]  # the first one warms the model
        dial = _turn(browser, url, server_times)
        browser.close()
    return {
        "songs": len(backend.live.service.index),
        "page_load_to_first_result_ms": _summary(first),
        "dial_server_ms": _summary(dial),
        "repetitions": repetitions,
    }


def _load(browser: Browser, url: str, number: int) -> float:
    """Load the page in a fresh browser profile with a new query; return milliseconds to the first result."""
    context = browser.new_context()
    page = context.new_page()
    page.add_init_script(MARK_FIRST_RESULT)
    page.goto(f"{url}/#words=calm+jazz+{number}")
    page.wait_for_function(FIRST_RESULT)
    taken = float(page.evaluate(FIRST_RESULT))
    context.close()
    return taken


def _turn(browser: Browser, url: str, server_times: list[float]) -> list[float]:
    """Move the dial from end to end, one search for each position; return the server's times in milliseconds."""
    page = browser.new_page()
    page.goto(f"{url}/#words=calm+jazz")
    page.wait_for_function("() => document.querySelector('#cards .card:not(.skeleton)')")
    server_times.clear()
    for step in range(BLENDS):
        with page.expect_response("**/v1/search"):
            page.locator("#blend").fill(str(step * 2 if step != 25 else 51))
    page.close()
    return list(server_times)


@contextmanager
def _serving(backend: Bare, server_times: list[float]) -> Iterator[str]:
    """Run the application in a thread; append each search's time from request to complete response in milliseconds."""
    app = create_app(backend, config_of(Path("unused")).serve)

    async def timed(scope: Any, receive: Any, send: Any) -> None:
        begun = time.perf_counter()
        await app(scope, receive, send)
        if scope.get("path") == "/v1/search":
            server_times.append(1000 * (time.perf_counter() - begun))

    server = uvicorn.Server(uvicorn.Config(timed, port=0, log_level="error", access_log=False, lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "greatest": round(max(values), 1), "count": len(values)}


if __name__ == "__main__":
    main()
