"""Evaluation of the newest models on held-out songs and users, written to reports/<run>/. Needs no Ray."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from rich.console import Console
from threadpoolctl import threadpool_limits

from htcl_ray.config import Config
from htcl_ray.config.sections import EvaluateSettings, nearest
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs, with_blend
from htcl_ray.evaluation.leakage import leakage, without_copies
from htcl_ray.evaluation.report import report_tree as reports
from htcl_ray.evaluation.report.plot_data import plot_data
from htcl_ray.evaluation.report.report_page import html
from htcl_ray.evaluation.report.report_schema import report_schema
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import EvaluationResult, MetricKey, TaskResult, from_table, to_table
from htcl_ray.evaluation.tasks.recommendation import blend_curve, recommendation_tasks
from htcl_ray.evaluation.tasks.semantic import Encode, semantic_tasks
from htcl_ray.evaluation.vector_checks import index_task
from htcl_ray.index.vectors import concatenate
from htcl_ray.models.folder import write_evaluation
from htcl_ray.pipelines.embed import embed_job, embeddings, job_of
from htcl_ray.pipelines.evaluation_inputs import EvaluationInputs, check_vectors, find_inputs, read_songs
from htcl_ray.pipelines.index import find_index
from htcl_ray.schemas import FORMAT_VERSION, METADATA, Split
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace.artifacts import Models, StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

TEXTS_AT_ONCE = 256
METRICS_TABLE = "figures.parquet"
MEASURED_AS = 4
"""Increased when the same inputs give a different report, so that an earlier report is not taken for a new one."""


def evaluate(config: Config, model: str | None = None, inputs: EvaluationInputs | None = None) -> StepResult:
    """Evaluate the models of `find_inputs`, or of `inputs` if they are known, and write reports/<run>/.

    Raises InputError when the workspace lacks an input, LeakageError when training used what is evaluated.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    check_columns(config.evaluate.probe_columns)
    inputs = inputs or find_inputs(workspace, config, model)
    path = f"reports/{_run(config, inputs)}"
    skipped = workspace.manifest(path) is not None
    if not skipped:
        _evaluate(workspace, config, inputs, path)
    report = workspace.read_json(f"{path}/report.json")
    Console().print(reports.table(report))
    return StepResult("evaluate", workspace.uri_of(path), reports.phrase(report), time.monotonic() - started, skipped)


def evaluate_reference(config: Config, models: Models, inputs: EvaluationInputs) -> str:
    """Evaluate reference models, such as those being served, on the test set of `inputs`; return the report's name.

    The test set is the same songs, users and candidates, so that differences are paired. Songs that these models have
    not embedded yet are embedded first, which starts Ray. The metrics in the folders of the models stay as they are.
    Raises InputError when the models cannot embed these songs.
    """
    workspace = Workspace(config.workspace)
    if _versions(models) != _versions(inputs.models):
        job = job_of(workspace, inputs.features, models)
        embed_job(workspace, config, job)
        inputs = replace(
            inputs, models=models, embeddings=embeddings(workspace, job), index=find_index(workspace, config, job)
        )
    run = _run(config, inputs)
    if workspace.manifest(f"reports/{run}") is None:
        _evaluate(workspace, config, inputs, f"reports/{run}", into_models=False)
    return run


def read_metrics(workspace: Workspace, run: str) -> dict[MetricKey, Estimate]:
    """All metrics of a finished report. Raises WorkspaceError when the report does not exist."""
    if workspace.manifest(f"reports/{run}") is None:
        known = ", ".join(name for name, _ in workspace.finished("reports")) or "none"
        raise WorkspaceError(f"report '{run}' does not exist in {workspace.uri}/reports; expected one of {known}")
    return from_table(workspace.read_tables(f"reports/{run}"))


def _versions(models: Models) -> tuple[str, str | None]:
    return models.semantic.version, models.preference.version if models.preference else None


def _run(config: Config, inputs: EvaluationInputs) -> str:
    return fingerprint(FORMAT_VERSION, MEASURED_AS, inputs.versions, config.evaluate.model_dump(mode="json"))


def check_columns(columns: Sequence[str]) -> None:
    """Raise ConfigError for a name in `evaluate.probe_columns` that is no catalogue column."""
    for column in columns:
        if column not in METADATA.names:
            hint = nearest(column, METADATA.names)
            raise ConfigError(f"evaluate.probe_columns names '{column}', which is no catalogue column; {hint}")


def _evaluate(
    workspace: Workspace, config: Config, inputs: EvaluationInputs, path: str, *, into_models: bool = True
) -> None:
    """Evaluate and write the report; `into_models`: also write the metrics into the folders of the models."""
    songs = read_songs(workspace, inputs, config.evaluate)
    settings = config.evaluate
    if not (songs.splits == settings.split).any():
        raise WorkspaceError(
            f"no song of the catalogue is in the {settings.split} split; choose the other with evaluate.split, or give "
            "this one songs with data.split_shares or data.split_column and run 'htcl preprocess' again"
        )
    encoder = SongEncoder.from_workspace(workspace, *inputs.models.paths)
    log = workspace.read_tables(inputs.events.path).to_pandas() if inputs.events else None
    pairs = workspace.read_tables(inputs.pairs.path).to_pandas() if inputs.pairs else None
    with threadpool_limits(1, "blas"):  # small matrices: threads cost more than they save
        result = run_tasks(songs, _CachedEncoder(encoder), log, pairs, settings)
        more = check_vectors(workspace, inputs.features, encoder, songs, settings)
    if inputs.index is not None:
        more.append(index_task(inputs.index.manifest))
    _write_report(workspace, config, inputs, path, result, more)
    if into_models:
        for artifact in (inputs.models.semantic, inputs.models.preference):
            if artifact is not None:
                write_evaluation(workspace, artifact.path, [*result.tasks, *more], path.rpartition("/")[2], result.data)


def run_tasks(
    songs: EvaluatedSongs,
    encode: Encode,
    log: pd.DataFrame | None,
    pairs: pd.DataFrame | None,
    settings: EvaluateSettings,
) -> EvaluationResult:
    """Semantic and recommendation tasks of every space of `songs`, with controls and baselines.

    `log`: columns of schemas.EVENTS, `pairs`: columns of schemas.PAIRS; None without an interaction log. Raises
    LeakageError when training used what is evaluated.
    """
    overlap = leakage(songs, log, pairs, settings)
    copies = ~without_copies(songs, settings.split) & (songs.splits == settings.split)
    evaluated = songs.without(copies)
    held_out = np.flatnonzero(evaluated.splits == settings.split)
    tasks = semantic_tasks(evaluated, encode, settings)
    curve = None
    if log is not None:
        tasks += recommendation_tasks(evaluated, log, settings)
        curve = blend_curve(evaluated, log, settings) or None
    data = {
        "split": settings.split,
        "songs": len(held_out),
        "copies_left_out": len(songs.ids) - len(evaluated.ids),
        "unique_texts": len({evaluated.texts[row] for row in held_out}),
        "artists": len({evaluated.artists[row] for row in held_out}),
        "training_songs": int((evaluated.splits == Split.TRAIN).sum()),
        "spaces": list(evaluated.spaces),
    }
    return EvaluationResult(data, overlap, tasks, {**plot_data(evaluated, encode, settings), "blend_curve": curve})


def _write_report(
    workspace: Workspace,
    config: Config,
    inputs: EvaluationInputs,
    path: str,
    result: EvaluationResult,
    more: Sequence[TaskResult],
) -> None:
    run = path.rpartition("/")[2]
    manifest = build_manifest("report", config=config.model_dump(mode="json"), inputs=inputs.versions)
    described = {key: manifest[key] for key in ("format_version", "created", "config", "inputs", "libraries")}
    described["encoder"] = inputs.features.manifest.get("extractor")
    described["auto_tags"] = None if inputs.index is None else inputs.index.manifest.get("auto_tags")
    command = ["htcl", "evaluate", "--config", workspace.uri_of(f"{path}/config.yaml"), "--model", inputs.last.version]
    report, metrics = reports.report_tree({"run": run, "command": shlex.join(command), **described}, result, more)
    manifest["quality"] = {"summary": reports.phrase(report)}
    workspace.write_json(f"{path}/report.json", report)
    workspace.write_json(f"{path}/report.schema.json", report_schema())
    workspace.write_bytes(f"{path}/report.html", html(report).encode())
    workspace.write_bytes(f"{path}/config.yaml", config.as_yaml().encode())
    workspace.write_table(f"{path}/{METRICS_TABLE}", to_table(metrics))
    workspace.finish(path, manifest)


class _CachedEncoder:
    """Encode texts in every space, each list of texts once."""

    def __init__(self, encoder: SongEncoder) -> None:
        self._encoder = encoder
        self._known: dict[tuple[str, ...], dict[str, np.ndarray]] = {}

    def __call__(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        key = tuple(texts)
        if key not in self._known:
            parts = [list(texts[start : start + TEXTS_AT_ONCE]) for start in range(0, len(texts), TEXTS_AT_ONCE)]
            vectors = concatenate([self._encoder.encode_texts(part) for part in parts])
            spaces = {"semantic": vectors.semantic}
            self._known[key] = with_blend(
                spaces if vectors.preference is None else {**spaces, "preference": vectors.preference}
            )
        return self._known[key]
