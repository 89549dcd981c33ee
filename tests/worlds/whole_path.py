"""Run every step on a small world, and search it."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from htcl_ray.config import Config, resolve
from htcl_ray.demo_world import TEXT_COLUMNS, SampleTables
from htcl_ray.evaluation.gate import judge, read_gate
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import evaluate, read_metrics
from htcl_ray.pipelines.index import build_index, determined_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import finetune, pretrain
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace

QUERIES = ("calm piano", "energetic rock guitar", "baroque organ", "dark synthesizer")
SMALL = {
    "data.text_columns": TEXT_COLUMNS,
    "audio.clip_seconds": 4.0,
    "audio.tower": "transformer",  # a third of the time of a step, and it learns more in few epochs
    "pretrain.learning_rate": 1e-3,
    "data.max_rejected_share": 0.5,
    "data.split_shares": [0.6, 0.1, 0.3],
    "data.songs_per_shard": 32,
    "ray.num_cpus": 4,
}


@dataclass(frozen=True)
class Outcome:
    """What a run measured, and what its application returned: song ids in order, for each query."""

    report: dict[str, Any]
    results: dict[str, list[str]]
    failed_bounds: list[str]
    """Of the shipped gate: TASK.METHOD.METRIC."""

    def median_rank_share(self) -> float:
        """Median rank of text → audio in the semantic space, as a share of the gallery; 0.5 is chance."""
        return self.metric("text_to_audio", "semantic", "median_rank") / self.report["data"]["songs"]

    def probe(self, space: str = "semantic") -> float:
        return self.metric("probe_genre", space, "accuracy")

    def user_auc(self, method: str) -> float:
        """Mean over held-out users of the AUC of cold songs; 0.5 is chance, and its standard error here about 0.03."""
        return self.metric("cold", method, "user_auc")

    def metric(self, task: str, method: str, metric: str) -> float:
        return self.report["tasks"][task]["methods"][method][metric]["value"]


def configuration(workspace: Path, tables: SampleTables, **overrides: Any) -> Config:
    named = {key.replace("__", "."): value for key, value in overrides.items()}
    data = {
        "data.catalog": str(tables.catalog),
        "data.interactions": str(tables.interactions),
        "workspace": str(workspace),
    }
    return resolve("demo").with_overrides({**SMALL, **data, **named})


def run_every_step(
    config: Config, upload: bytes, song_id: str, after_training: Callable[[Config], None] | None = None
) -> Outcome:
    """Preprocess to evaluate, then three kinds of queries."""
    for step in (preprocess, pretrain, finetune):
        step(config)
    if after_training:
        after_training(config)
    for step in (embed, build_index):
        step(config)
    report = evaluate(config)
    return Outcome(
        read_report(config, report.location), ask(config, upload, song_id), failed_bounds(config, report.location)
    )


def failed_bounds(config: Config, location: str) -> list[str]:
    metrics = read_metrics(Workspace(config.workspace), location.rsplit("/", 1)[1])
    return [result.bound.figure for result in judge(read_gate("default"), metrics).failed]


def read_report(config: Config, location: str) -> dict[str, Any]:
    return Workspace(config.workspace).read_json(f"reports/{location.rsplit('/', 1)[1]}/report.json")


def ask(config: Config, upload: bytes, song_id: str) -> dict[str, list[str]]:
    """Song ids in order for three kinds of queries, by the service that `htcl search` and the application share."""
    service = SearchService.open(config, determined_index(Workspace(config.workspace), config))
    responses = {text: service.search_text(text, k=10) for text in QUERIES}
    responses["upload"] = service.search_audio(upload, k=10)
    responses["similar"] = service.search_songs([song_id], k=10)
    return {query: [hit.song_id for hit in response.hits] for query, response in responses.items()}


def rewrite(path: Path, target: Path, change: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> Path:
    """Copy a CSV table with its rows changed."""
    with path.open(newline="", encoding="utf-8") as source:
        rows = list(csv.DictReader(source))
    changed = change(rows)
    with target.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.DictWriter(sink, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(changed)
    return target
