"""Vectors and metadata → an index that the application serves, with its measured recall."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.artifacts import StepResult
from htcl_ray.config import Config
from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.pipelines.embed import EmbedJob, plan, read_vectors
from htcl_ray.retrieval import SongIndex, Vectors
from htcl_ray.schemas import FORMAT_VERSION, INDEX_SONGS
from htcl_ray.storage import Workspace, fingerprint

RECALL_AT = 10
RECALL_QUERIES = 256
SAME_SCORE = 1e-6


def build_index(config: Config, model: str | None = None) -> StepResult:
    """Index the embeddings of the newest models, or of `model`, with the songs' metadata. Needs no Ray."""
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    job = plan(workspace, config, model)
    if workspace.manifest(job.path) is None:
        by = " and ".join(name for name in (job.inputs["semantic"], job.inputs["preference"]) if name)
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no embeddings of features {job.features.version} by {by}; run 'htcl embed' first"
        )
    version = fingerprint("index", FORMAT_VERSION, job.version, config.index.model_dump(mode="json"))
    path = f"index/{version}"
    manifest = workspace.manifest(path)
    skipped = manifest is not None
    if manifest is None:
        workspace.check_writable()
        manifest = _build(workspace, config, job, path)
    recall = manifest["quality"]["recall_at_10"]
    summary = f"{manifest['songs']} songs, {config.index.kind}, recall@{RECALL_AT} {recall:.3f} of exact search"
    return StepResult("index", workspace.uri_of(path), summary, time.monotonic() - started, skipped)


def recall_by_blend(index: SongIndex, song_ids: list[str], vectors: Vectors) -> dict[str, float]:
    """Share of the 10 best songs of exact search that the index finds, at each end and in the middle of the blend.

    Queries are up to 256 of its own songs, each left out of its own answer. A song that scores like the 10th counts as one of the 10.
    """
    chosen = np.unique(np.linspace(0, len(song_ids) - 1, min(RECALL_QUERIES, len(song_ids)), dtype=np.int64))
    queries, excluded = vectors.rows(chosen), [[song_ids[row]] for row in chosen]
    recalls = {}
    for blend in (0.0, 0.5, 1.0) if index.has_preference else (0.0,):
        scores = (1 - blend) * queries.semantic @ vectors.semantic.T
        if vectors.preference is not None and queries.preference is not None:
            scores += blend * queries.preference @ vectors.preference.T
        scores[np.arange(len(chosen)), chosen] = -np.inf
        k = min(RECALL_AT, len(song_ids) - 1)
        if k < 1:
            return {str(blend): 1.0}
        tenth = np.partition(scores, -k, axis=1)[:, -k]
        answers = index.search(queries, k, blend=blend, exclude=excluded)
        right = sum(hit.score >= bound - SAME_SCORE for hits, bound in zip(answers, tenth, strict=True) for hit in hits)
        recalls[str(blend)] = right / (k * len(chosen))
    return recalls


def _build(workspace: Workspace, config: Config, job: EmbedJob, path: str) -> dict[str, Any]:
    song_ids, vectors = read_vectors(workspace, job.path)
    metadata = _metadata(workspace, job, song_ids)
    index = SongIndex.build(song_ids, vectors, metadata=metadata, settings=config.index, model_versions=job.model_versions)
    recalls = recall_by_blend(index, song_ids, vectors)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        index.save(
            folder,
            config=config.model_dump(mode="json"),
            inputs={**job.inputs, "embeddings": job.version},
            quality={"recall_at_10": min(recalls.values()), "recall_at_10_by_blend": recalls},
        )
        workspace.publish(folder, path, index.manifest)
    return index.manifest


def _metadata(workspace: Workspace, job: EmbedJob, song_ids: list[str]) -> pa.Table:
    """Rows of INDEX_SONGS in the order of the ids."""
    table = workspace.read_tables(job.features.path, columns=INDEX_SONGS.names)
    rows = pc.index_in(pa.array(song_ids), value_set=table["song_id"].combine_chunks())
    if rows.null_count or table.num_rows != len(song_ids):
        raise MismatchError(
            f"{workspace.uri_of(job.path)} holds {len(song_ids)} songs and {workspace.uri_of(job.features.path)} {table.num_rows}, "
            f"{len(song_ids) - rows.null_count} of them in both; run 'htcl embed' again"
        )
    return table.take(rows)
