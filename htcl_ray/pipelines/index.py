"""`htcl index`: vectors and metadata → an index for serving, with its measured recall. Needs no Ray."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.config import Config
from htcl_ray.errors import InputError, MismatchError, StepError
from htcl_ray.index.recall import build_measured
from htcl_ray.pipelines.embed import EmbedJob, embeddings, plan, read_vectors
from htcl_ray.pipelines.estimate_tags import estimates_version, find_estimates, with_estimates
from htcl_ray.schemas import ESTIMATED, FORMAT_VERSION, INDEX_SONGS
from htcl_ray.search.song_map import draw_map
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import fingerprint
from htcl_ray.workspace.storage import Workspace

MORE_RECALL = {
    "flat": "which is exact, so this is a defect",
    "hnsw": "raise index.ef_search, index.hnsw_neighbors or index.ef_construction",
    "ivf": "raise index.ivf_probes",
    "ivf_pq": "raise index.ivf_probes, index.rerank or index.pq_bytes",
}
"""Kind of index → settings that raise its recall."""


def build_index(config: Config, model: str | None = None) -> StepResult:
    """Index the embeddings by the models of `inputs.models`, with the metadata of the songs and its estimates.

    Raises StepError when the recall is below `index.min_recall`.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    job = plan(workspace, config, model)
    embeddings(workspace, job)
    version = index_version(config, job)
    path = f"index/{version}"
    manifest = workspace.manifest(path)
    skipped = manifest is not None
    if manifest is None:
        workspace.check_writable()
        manifest = _build(workspace, config, job, path)
    recall = manifest["quality"]["recall_at_10"]
    summary = f"{manifest['songs']} songs, {manifest['structure']['kind']}, recall@10 {recall:.3f} of exact search"
    return StepResult("index", workspace.uri_of(path), summary, time.monotonic() - started, skipped)


def index_version(config: Config, job: EmbedJob) -> str:
    """Fingerprint of the index that a configuration builds."""
    estimates = (estimates_version(config, job.features.version),) if config.catalog.auto_tags else ()
    return fingerprint("index", FORMAT_VERSION, job.version, config.index.model_dump(mode="json"), *estimates)


def find_index(workspace: Workspace, config: Config, job: EmbedJob) -> Artifact | None:
    """The newest of the index that a configuration builds and its compacted versions; None when none exists."""
    newest, versions = None, {index_version(config, job)}
    for name, manifest in workspace.finished("index"):
        if name in versions or manifest["inputs"].get("compacted_from") in versions:
            versions.add(name)
            newest = Artifact(f"index/{name}", name, manifest)
    return newest


def determined_index(workspace: Workspace, config: Config) -> str | None:
    """Version of the index that a configuration builds.

    None without a catalogue, before the index is built, and when its gate rejects it.
    """
    if not config.data.catalog:
        return None
    try:
        built = find_index(workspace, config, plan(workspace, config))
    except InputError:  # the tables may be absent on a machine that only serves
        return None
    return built.version if built and built.refusal(config.gate.require) is None else None


def _build(workspace: Workspace, config: Config, job: EmbedJob, path: str) -> dict[str, Any]:
    song_ids, vectors = read_vectors(workspace, job.path)
    estimates = find_estimates(workspace, config, job.features.version)
    metadata = with_estimates(workspace, _metadata(workspace, job, song_ids), estimates)
    index, recall = build_measured(
        song_ids, vectors, metadata=metadata, settings=config.index, model_versions=job.model_versions
    )
    if recall.worst < config.index.min_recall:
        raise StepError(
            f"the {index.kind} index finds {recall.worst:.3f} of the 10 nearest songs at its worst blend, but "
            f"index.min_recall is {config.index.min_recall}; {MORE_RECALL[index.kind]}, or lower index.min_recall"
        )
    index.song_map = draw_map(index)
    made_from = {**job.inputs, "embeddings": job.version}
    if estimates is not None:
        made_from["estimates"] = estimates.version
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        index.save(
            folder,
            config=config.model_dump(mode="json"),
            inputs=made_from,
            quality=recall.quality(),
            auto_tags=None if estimates is None else estimates.manifest["auto_tags"],
        )
        workspace.publish(folder, path, index.manifest)
    return index.manifest


def _metadata(workspace: Workspace, job: EmbedJob, song_ids: list[str]) -> pa.Table:
    """Rows of INDEX_SONGS, but without estimates, in the order of the ids.

    Raises MismatchError when the features have other songs.
    """
    columns = [name for name in INDEX_SONGS.names if name != ESTIMATED]
    table = workspace.read_tables(job.features.path, columns)
    rows = pc.index_in(pa.array(song_ids), value_set=table["song_id"].combine_chunks())
    if rows.null_count or table.num_rows != len(song_ids):
        raise MismatchError(
            f"{workspace.uri_of(job.path)} holds {len(song_ids)} songs and {workspace.uri_of(job.features.path)} "
            f"{table.num_rows}, {len(song_ids) - rows.null_count} of them in both; run 'htcl embed' again"
        )
    return table.take(rows)
