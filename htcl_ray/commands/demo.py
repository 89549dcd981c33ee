"""`htcl demo`: every step on a sample catalogue, from audio files and logs to search results over HTTP."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from htcl_ray.config import Config
from htcl_ray.demo_world import ARTISTS, SEED, SONGS, TEXT_COLUMNS, make_world, write_sample, write_true_vectors
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.evaluation.metrics import metric_label
from htcl_ray.schemas import TAG_COLUMNS
from htcl_ray.search.results import printed
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.storage import Workspace

MADE_BY_DEMO = (
    "sample",
    "truth",
    "features",
    "statistics",
    "events",
    "pairs",
    "negatives",
    "quarantine",
    "runs",
    "models",
    "embeddings",
    "index",
    "reports",
    "ablations",
)
"""Folders of a workspace that the demo writes, and that `--fresh` removes."""
TEXT_QUERY = "calm ambient piano"


def demo(config: Config, *, fresh: bool = False) -> None:
    """Run every step on the sample catalogue, start the service, send it three queries, and print a summary.

    `fresh`: remove the files of an earlier demo first. Raises ConfigError for a workspace that is not a local folder.
    """
    workspace = Workspace(config.workspace)
    if not workspace.is_local:
        raise ConfigError(
            f"the demo writes its sample catalogue to a local disk, and the workspace is {workspace.uri}; "
            "give a local folder"
        )
    workspace.check_writable()
    if fresh:
        _remove_earlier_demo(workspace)
    from htcl_ray.evaluation.gate import DEFAULT
    from htcl_ray.pipelines.apply_gate import judged_evaluation
    from htcl_ray.pipelines.run import build, headed

    sampled = headed("sample", lambda: _sample(workspace))
    sample = _sample_folder(workspace)
    tables = {
        "data.catalog": str(sample / "catalog.csv"),
        "data.interactions": str(sample / "interactions.csv"),
        "data.text_columns": TEXT_COLUMNS,
        "evaluate.oracle_vectors": str(_truth(workspace)),
    }
    config = config.with_overrides(tables)
    steps = config.with_overrides({"gate.require": "off"})  # verdicts of an earlier demo are not used
    made = build(steps, until="index", report=lambda result: None)
    judged, verdict = headed("evaluate", lambda: judged_evaluation(steps, made["finetune"].version, DEFAULT))
    if not verdict.passed:
        print(f"{judged.summary}; the demo serves this model all the same, with gate.require=off", flush=True)
    served = config if verdict.passed else steps
    queried = headed("serve", lambda: _serve_and_query(served, workspace, made["index"].version))
    _print_summary([sampled, *made.values(), judged, queried], workspace, judged.location, verdict.passed)


def _sample_folder(workspace: Workspace) -> Path:
    return Path(workspace.full("sample"))


def _truth(workspace: Workspace) -> Path:
    """Table of the true traits: an upper bound for the evaluation, which no other step reads."""
    return Path(workspace.full("truth/traits.parquet"))


def _remove_earlier_demo(workspace: Workspace) -> None:
    present = workspace.children("")
    if present and not workspace.exists("sample"):
        raise ConfigError(
            f"the workspace {workspace.uri} holds {', '.join(present)} and no demo; "
            "--fresh removes only what a demo made"
        )
    for name in MADE_BY_DEMO:
        workspace.remove(name)


def _sample(workspace: Workspace) -> StepResult:
    started = time.monotonic()
    folder = _sample_folder(workspace)
    known = (folder / "catalog.csv").exists()
    tables = write_sample(folder)
    write_true_vectors(make_world(songs=SONGS, artists=ARTISTS, seed=SEED), _truth(workspace))
    songs, rows = (sum(1 for _ in path.open(encoding="utf-8")) - 1 for path in (tables.catalog, tables.interactions))
    summary = f"{songs} songs, {rows} interactions"
    return StepResult("sample", str(folder), summary, time.monotonic() - started, skipped=known)


def _serve_and_query(config: Config, workspace: Workspace, index: str) -> StepResult:
    """Start the service on a free port, search by text, by audio and by song, and stop it."""
    from htcl_ray.serving.application import serving

    started = time.monotonic()
    upload = max((_sample_folder(workspace) / "audio").glob("*.wav"), key=lambda path: path.stat().st_size)
    with (
        serving(config.with_overrides({"serve.port": 0}), index) as url,
        httpx.Client(base_url=url, timeout=60, trust_env=False) as client,
    ):
        print(f"the service listens at {url}", flush=True)
        by_text = _results(client.post("/v1/search", json={"text": TEXT_QUERY, "k": 3}))
        _print_results(f'POST /v1/search "{TEXT_QUERY}"', by_text)
        by_audio = _results(
            client.post("/v1/search/audio", files={"file": (upload.name, upload.read_bytes())}, data={"k": "3"})
        )
        _print_results(f"POST /v1/search/audio {upload.name}", by_audio)
        song = by_text[0]["song_id"]
        similar = _results(client.get(f"/v1/songs/{song}/similar", params={"k": 3}))
        _print_results(f"GET /v1/songs/{song}/similar", similar)
    return StepResult("serve", url, "3 queries over HTTP, then stopped", time.monotonic() - started)


def _results(response: httpx.Response) -> list[dict[str, Any]]:
    if response.status_code != 200:
        request = f"{response.request.method} {response.request.url}"
        raise StepError(f"{request} returned status {response.status_code}: {response.text[:300]}")
    results: list[dict[str, Any]] = response.json()["results"]
    return results


def _print_results(query: str, results: list[dict[str, Any]]) -> None:
    table = Table("song", "score", "semantic", "preference", *TAG_COLUMNS, title=query, title_justify="left")
    for hit in results:
        scores = [hit["score"], hit["semantic_score"], hit["preference_score"]]
        labels = [printed(hit, name) for name in TAG_COLUMNS]
        table.add_row(hit["song_id"], *("–" if score is None else f"{score:.3f}" for score in scores), *labels)
    Console().print(table)


def against_oracle(report: str) -> str:
    """NDCG of cold songs by the model, by simple baselines and by an oracle that knows the true traits."""
    methods = json.loads((Path(report) / "report.json").read_text(encoding="utf-8"))["tasks"]["cold"]["methods"]
    metric = max((name for name in methods["oracle"] if name.startswith("ndcg@")), key=lambda name: int(name[5:]))
    named = {
        "stage 2": "preference",
        "stage 1": "semantic",
        "raw log-mel statistics": "log_mel",
        "genre labels": "genre",
        "artist mean": "artist_mean",
        "chance": "random",
        "an oracle that knows the true traits": "oracle",
    }
    parts = (f"{name} {methods[method][metric]['value']:.3f}" for name, method in named.items() if method in methods)
    return f"{metric_label(metric)} of cold-start songs for new users: {', '.join(parts)}"


def _print_summary(results: list[StepResult], workspace: Workspace, report: str, accepted: bool) -> None:
    table = Table("step", "time", "result", "location", title=f"workspace {workspace.uri}", title_justify="left")
    for result in results:
        took = "already done" if result.skipped else f"{result.seconds:.1f} s"
        table.add_row(
            result.step,
            took,
            result.summary,
            result.location.removeprefix(f"{workspace.uri}/"),
            end_section=result.step == "gate",
        )
    table.add_row("all", f"{sum(result.seconds for result in results):.1f} s", "", "")
    console = Console()
    console.print()
    console.print(table)
    option = f"--workspace {workspace.uri}" + ("" if accepted else " --set gate.require=off")
    console.print(f"\n{against_oracle(report)}", highlight=False)
    console.print("\nTry next:", highlight=False)
    for line in (
        f'.venv/bin/htcl search --preset demo {option} --text "{TEXT_QUERY}"',
        f"open {report}/report.html",
        f"tensorboard --logdir {workspace.uri}/runs",
        f".venv/bin/htcl serve --preset demo {option}     # then: curl localhost:8000/openapi.json",
        ".venv/bin/htcl config show --preset demo",
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True)
