"""Evaluation of the newest models on held-out songs and users: workspace in, reports/<run>/ out. Needs no Ray."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from rich.console import Console
from threadpoolctl import threadpool_limits

from htcl_ray.config import Config
from htcl_ray.config.sections import nearest
from htcl_ray.errors import ConfigError, MismatchError, WorkspaceError
from htcl_ray.evaluation.evaluated_songs import Songs, with_blend
from htcl_ray.evaluation.measure import measure
from htcl_ray.evaluation.report import report_tree as reports
from htcl_ray.evaluation.report.report_page import html
from htcl_ray.evaluation.report.report_schema import report_schema
from htcl_ray.evaluation.report.resamples import Key, from_table, to_table
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import Measured, Task
from htcl_ray.evaluation.vector_checks import index_task
from htcl_ray.index.vectors import concatenate, matrix_of
from htcl_ray.models.folder import write_evaluation
from htcl_ray.pipelines import inputs as step_inputs
from htcl_ray.pipelines.check_vectors import check_soundness
from htcl_ray.pipelines.embed import embed_job, embeddings, job_of, plan
from htcl_ray.pipelines.index import find_index
from htcl_ray.pipelines.log_mel_statistics import log_mel_statistics
from htcl_ray.schemas import FORMAT_VERSION, METADATA
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, Models, StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

TEXTS_AT_ONCE = 256
FIGURES = "figures.parquet"
MEASURED_AS = 3
"""Raised when the same inputs give other content of a report, so that an earlier report is not taken for a new one."""


@dataclass(frozen=True)
class Inputs:
    """What is evaluated."""

    features: Artifact
    models: Models
    embeddings: Artifact
    events: Artifact | None
    pairs: Artifact | None
    index: Artifact | None
    """The index of these embeddings with the configured settings."""

    @property
    def versions(self) -> dict[str, str | None]:
        """For the report and its fingerprint."""
        preference = self.models.preference
        return {
            "features": self.features.version,
            "semantic": self.models.semantic.version,
            "preference": preference.version if preference else None,
            "embeddings": self.embeddings.version,
            "events": self.events.version if self.events else None,
            "pairs": self.pairs.version if self.pairs else None,
            "index": self.index.version if self.index else None,
        }

    @property
    def last(self) -> Artifact:
        """The model of the last stage: the one that is judged."""
        return self.models.preference or self.models.semantic


def evaluate(config: Config, model: str | None = None, inputs: Inputs | None = None) -> StepResult:
    """Measure the models of `find_inputs`, or of `inputs` if they are known, and write reports/<run>/.

    Raises InputError when the workspace lacks what is measured, LeakageError when training saw what is evaluated.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    _check_columns(config.evaluate.probe_columns)
    inputs = inputs or find_inputs(workspace, config, model)
    path = f"reports/{_run(config, inputs)}"
    skipped = workspace.manifest(path) is not None
    if not skipped:
        _measure(workspace, config, inputs, path)
    report = workspace.read_json(f"{path}/report.json")
    Console().print(reports.table(report))
    return StepResult("evaluate", workspace.uri_of(path), reports.phrase(report), time.monotonic() - started, skipped)


def evaluate_reference(config: Config, models: Models, inputs: Inputs) -> str:
    """Evaluate a reference, such as the models being served, on the test set of `inputs`. Returns the name of its
    report.

    The test set is the same songs, users and candidates, so that differences are paired. Songs that these models have
    not embedded yet are embedded first, which starts Ray. The figures in the models' own folders stay as they are.
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
        _measure(workspace, config, inputs, f"reports/{run}", into_models=False)
    return run


def _versions(models: Models) -> tuple[str, str | None]:
    return models.semantic.version, models.preference.version if models.preference else None


def find_inputs(workspace: Workspace, config: Config, model: str | None = None) -> Inputs:
    """The artifacts that the configuration determines, or the models `model` and what they made, whatever gates say.
    Raises InputError.
    """
    job = plan(workspace, config, model, require="off")
    features = job.features.version
    return Inputs(
        job.features,
        job.models,
        embeddings(workspace, job),
        step_inputs.events(workspace, config, features),
        step_inputs.pairs(workspace, config, features),
        find_index(workspace, config, job),
    )


def inputs_of(workspace: Workspace, run: str) -> Inputs:
    """What a finished report evaluated. Raises WorkspaceError when an artifact is missing by now."""
    versions = workspace.read_json(f"reports/{run}/manifest.json")["inputs"]

    def artifact(kind: str) -> Artifact:
        path = f"{kind}/{versions[kind]}"
        manifest = workspace.manifest(path)
        if manifest is None:
            raise WorkspaceError(f"{workspace.uri_of(path)}, which report {run} evaluated, does not exist any more")
        return Artifact(path, versions[kind], manifest)

    models = artifacts.named_models(workspace, versions["preference"] or versions["semantic"])
    events, pairs, index = (artifact(kind) if versions[kind] else None for kind in ("events", "pairs", "index"))
    return Inputs(artifact("features"), models, artifact("embeddings"), events, pairs, index)


def read_figures(workspace: Workspace, run: str) -> dict[Key, Estimate]:
    """Every figure of a finished report. Raises WorkspaceError when there is none."""
    if workspace.manifest(f"reports/{run}") is None:
        known = ", ".join(name for name, _ in workspace.finished("reports")) or "none"
        raise WorkspaceError(f"there is no report '{run}' in {workspace.uri}/reports; expected one of {known}")
    return from_table(workspace.read_tables(f"reports/{run}"))


def _run(config: Config, inputs: Inputs) -> str:
    return fingerprint(FORMAT_VERSION, MEASURED_AS, inputs.versions, config.evaluate.model_dump(mode="json"))


def _check_columns(columns: Sequence[str]) -> None:
    for column in columns:
        if column not in METADATA.names:
            hint = nearest(column, METADATA.names)
            raise ConfigError(f"evaluate.probe_columns names '{column}', which is no catalogue column; {hint}")


def _measure(workspace: Workspace, config: Config, inputs: Inputs, path: str, *, into_models: bool = True) -> None:
    """Evaluate and write the report; `into_models`: also write the figures into the folders of the models."""
    songs = _songs(workspace, inputs)
    settings = config.evaluate
    if not (songs.splits == settings.split).any():
        raise WorkspaceError(
            f"no song of the catalogue is in the {settings.split} split; choose the other with evaluate.split, or give this one songs "
            "with data.split_shares or data.split_column and run 'htcl preprocess' again"
        )
    encoder = SongEncoder.from_workspace(workspace, *inputs.models.paths)
    log = workspace.read_tables(inputs.events.path).to_pandas() if inputs.events else None
    pairs = workspace.read_tables(inputs.pairs.path).to_pandas() if inputs.pairs else None
    encode = _Encode(encoder)
    with threadpool_limits(1, "blas"):  # small matrices: threads cost more than they save
        measured = measure(songs, encode, log, pairs, settings)
        more = check_soundness(workspace, inputs.features, encoder, songs, settings)
    if inputs.index is not None:
        more.append(index_task(inputs.index.manifest))
    _write(workspace, config, inputs, path, measured, more)
    if into_models:
        for artifact in (inputs.models.semantic, inputs.models.preference):
            if artifact is not None:
                write_evaluation(
                    workspace, artifact.path, [*measured.tasks, *more], path.rpartition("/")[2], measured.data
                )


def _write(
    workspace: Workspace, config: Config, inputs: Inputs, path: str, measured: Measured, more: Sequence[Task]
) -> None:
    run = path.rpartition("/")[2]
    manifest = build_manifest("report", config=config.model_dump(mode="json"), inputs=inputs.versions)
    described = {key: manifest[key] for key in ("format_version", "created", "config", "inputs", "libraries")}
    command = ["htcl", "evaluate", "--config", workspace.uri_of(f"{path}/config.yaml"), "--model", inputs.last.version]
    report, figures = reports.report_tree({"run": run, "command": shlex.join(command), **described}, measured, more)
    manifest["quality"] = {"summary": reports.phrase(report)}
    workspace.write_json(f"{path}/report.json", report)
    workspace.write_json(f"{path}/report.schema.json", report_schema())
    workspace.write_bytes(f"{path}/report.html", html(report).encode())
    workspace.write_bytes(f"{path}/config.yaml", config.as_yaml().encode())
    workspace.write_table(f"{path}/{FIGURES}", to_table(figures))
    workspace.finish(path, manifest)


class _Encode:
    """Texts → vectors in every space; what was encoded once is remembered."""

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


def _songs(workspace: Workspace, inputs: Inputs) -> Songs:
    columns = ["song_id", "text", "split", "duplicate_group", *METADATA.names]
    table = workspace.read_tables(inputs.features.path, columns).sort_by("song_id")
    vectors = workspace.read_tables(inputs.embeddings.path).sort_by("song_id")
    ids = table["song_id"].to_pylist()
    if vectors["song_id"].to_pylist() != ids:
        raise MismatchError(
            f"the embeddings {inputs.embeddings.version} hold {len(vectors)} songs, but the features {inputs.features.version} hold "
            f"{len(ids)} or others; remove the embeddings and run 'htcl embed' again"
        )
    spaces = {"semantic": matrix_of(vectors["semantic"])}
    if not vectors["preference"].null_count:
        spaces["preference"] = matrix_of(vectors["preference"])
    return Songs(
        ids,
        table["text"].to_pylist(),
        np.array(table["split"].to_pylist()),
        table["duplicate_group"].to_pylist(),
        table.select(METADATA.names),
        with_blend(spaces),
        log_mel_statistics(workspace, inputs.features),
    )
