"""Evaluation of the newest models on held-out songs and users: workspace in, reports/<run>/ out. Needs no Ray."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from rich.console import Console

from htcl_ray import artifacts
from htcl_ray.artifacts import Artifact, Models, StepResult
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, MismatchError, WorkspaceError
from htcl_ray.evaluation import report as reports
from htcl_ray.evaluation.measure import Songs, held_out_texts, measure, with_blend
from htcl_ray.retrieval.encoder import SongEncoder
from htcl_ray.retrieval.vectors import concatenate
from htcl_ray.schemas import FORMAT_VERSION, METADATA
from htcl_ray.settings import nearest
from htcl_ray.storage import Workspace, build_manifest, fingerprint

TEXTS_AT_ONCE = 256


def evaluate(config: Config, model: str | None = None) -> StepResult:
    """Measure the newest model, or the version `model`, with its embeddings, and write report.json and report.html.

    Raises InputError when the workspace lacks what is measured.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    settings = config.evaluate
    if settings.probe_column not in METADATA.names:
        hint = nearest(settings.probe_column, METADATA.names)
        raise ConfigError(f"evaluate.probe_column is '{settings.probe_column}', which is no catalogue column; {hint}")
    features = artifacts.features(workspace, config)
    models = artifacts.models(workspace, model)
    embeddings = artifacts.embeddings(workspace, features.version, models)
    events = artifacts.events(workspace, features.version)
    inputs = {
        "features": features.version,
        "semantic": models.semantic.version,
        "preference": models.preference.version if models.preference else None,
        "embeddings": embeddings.version,
        "events": events.version if events else None,
    }
    run = fingerprint(FORMAT_VERSION, inputs, settings.model_dump(mode="json"))
    path = f"reports/{run}"
    skipped = workspace.manifest(path) is not None
    if skipped:
        report = workspace.read_json(f"{path}/report.json")
    else:
        songs = _songs(workspace, features, embeddings)
        texts = held_out_texts(songs, settings.split)
        if not texts:
            raise WorkspaceError(
                f"no song of the catalogue is in the {settings.split} split; choose the other with evaluate.split, or give this one songs "
                "with data.split_shares or data.split_column and run 'htcl preprocess' again"
            )
        queries = _encode_texts(workspace, models, texts)
        log = workspace.read_tables(events.path).to_pandas() if events else None
        manifest = build_manifest("report", config=config.model_dump(mode="json"), inputs=inputs)
        described = {key: manifest[key] for key in ("format_version", "created", "config", "inputs", "libraries")}
        report = {"run": run, **described, **measure(songs, texts, queries, log, settings)}
        manifest["quality"] = {"summary": reports.phrase(report)}
        workspace.write_json(f"{path}/report.json", report)
        workspace.write_bytes(f"{path}/report.html", reports.html(report).encode())
        workspace.finish(path, manifest)
    Console().print(reports.table(report))
    return StepResult("evaluate", workspace.uri_of(path), reports.phrase(report), time.monotonic() - started, skipped)


def _songs(workspace: Workspace, features: Artifact, embeddings: Artifact) -> Songs:
    table = workspace.read_tables(features.path, ["song_id", "text", "split", *METADATA.names]).sort_by("song_id")
    vectors = workspace.read_tables(embeddings.path).sort_by("song_id")
    ids = table["song_id"].to_pylist()
    if vectors["song_id"].to_pylist() != ids:
        raise MismatchError(
            f"the embeddings {embeddings.version} hold {len(vectors)} songs, but the features {features.version} hold {len(ids)} "
            "or others; remove the embeddings and run 'htcl embed' again"
        )
    spaces = {"semantic": _matrix(vectors["semantic"])}
    if not vectors["preference"].null_count:
        spaces["preference"] = _matrix(vectors["preference"])
    splits = np.array(table["split"].to_pylist())
    return Songs(ids, table["text"].to_pylist(), splits, table.select(METADATA.names), with_blend(spaces))


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    flat = column.combine_chunks()
    return np.asarray(flat.flatten()).reshape(len(flat), -1)


def _encode_texts(workspace: Workspace, models: Models, texts: Sequence[str]) -> dict[str, np.ndarray]:
    preference = workspace.local_copy(models.preference.path) if models.preference else None
    encoder = SongEncoder.load(workspace.local_copy(models.semantic.path), preference)
    vectors = concatenate(
        [encoder.encode_texts(list(texts[start : start + TEXTS_AT_ONCE])) for start in range(0, len(texts), TEXTS_AT_ONCE)]
    )
    spaces = {"semantic": vectors.semantic}
    return with_blend(spaces if vectors.preference is None else {**spaces, "preference": vectors.preference})
