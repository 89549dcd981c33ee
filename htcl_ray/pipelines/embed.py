"""`htcl embed`: features → semantic and preference vectors of every song, by Ray Data actors that hold the models."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from htcl_ray.cluster.connection import address_of, connect
from htcl_ray.config import Config
from htcl_ray.config.sections import AudioRecipe, Require
from htcl_ray.config.sections.model import UNUSED
from htcl_ray.errors import InputError, MismatchError, WorkspaceError
from htcl_ray.extractors.families import check_encoder, feature_width, recorded_extractor
from htcl_ray.index.vectors import ModelVersions, Vectors, check_unit_norm, concatenate, matrix_of
from htcl_ray.pipelines import inputs
from htcl_ray.progress import Progress
from htcl_ray.schemas import FORMAT_VERSION, embeddings_schema
from htcl_ray.workspace.artifacts import Artifact, Models, StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.search.encoder import SongEncoder


@dataclass(frozen=True)
class EmbedJob:
    """Features and models of one set of embeddings, and the location of the result."""

    features: Artifact
    models: Models
    model_versions: ModelVersions
    version: str

    @property
    def path(self) -> str:
        """Folder of the embeddings, below the workspace's root."""
        return f"embeddings/{self.version}"

    @property
    def inputs(self) -> dict[str, str | None]:
        """Versions of the inputs, for the manifest."""
        preference = self.models.preference
        return {
            "features": self.features.version,
            "semantic": self.models.semantic.version,
            "preference": preference.version if preference else None,
        }


def plan(workspace: Workspace, config: Config, model: str | None = None, *, require: Require | None = None) -> EmbedJob:
    """The embeddings that a configuration determines, whether or not they exist; see `inputs.models`.

    Raises InputError.
    """
    features = inputs.features(workspace, config)
    return job_of(workspace, features, inputs.models(workspace, config, features.version, model, require=require))


def job_of(workspace: Workspace, features: Artifact, models: Models) -> EmbedJob:
    """The embeddings of these features by these models, whether or not they exist.

    Raises MismatchError when the models were trained with other audio settings.
    """
    from htcl_ray.search.encoder import model_versions  # loads torch

    for artifact in (models.semantic, models.preference):
        if artifact is not None:
            _check_recipe(workspace, features, artifact)
    versions = model_versions(workspace, *models.paths)
    version = fingerprint("embeddings", FORMAT_VERSION, features.version, versions)
    return EmbedJob(features, models, versions, version)


def embeddings(workspace: Workspace, job: EmbedJob) -> Artifact:
    """The finished embeddings of a job. Raises WorkspaceError when they do not exist."""
    manifest = workspace.manifest(job.path)
    if manifest is None:
        by = " and ".join(
            f"{space} model {name}" for space in ("semantic", "preference") if (name := job.inputs[space])
        )
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no embeddings of the features {job.features.version} by {by}; "
            "run 'htcl embed' first"
        )
    return Artifact(job.path, job.version, manifest)


def embed(config: Config, model: str | None = None) -> StepResult:
    """Embed every song of the features with the models of `inputs.models`.

    Writes one file of vectors for each file of features. An interrupted run resumes with the missing files.
    """
    workspace = Workspace(config.workspace)
    return embed_job(workspace, config, plan(workspace, config, model))


def embed_job(workspace: Workspace, config: Config, job: EmbedJob) -> StepResult:
    """Make the embeddings of a job unless they exist."""
    started = time.monotonic()
    manifest = workspace.manifest(job.path)
    if manifest is not None:
        return _result(workspace, job, manifest, started, skipped=True)
    workspace.check_writable()
    shards = [name for name in workspace.children(job.features.path) if name.endswith(".parquet")]
    if not shards:
        raise WorkspaceError(f"{workspace.uri_of(job.features.path)} holds no songs; run 'htcl preprocess' again")
    songs = {
        name: pq.read_metadata(workspace.full(f"{job.features.path}/{name}"), filesystem=workspace.fs).num_rows
        for name in shards
    }
    missing = [name for name in shards if not workspace.exists(f"{job.path}/{name}")]
    if missing:
        connect(config)
        embed_shards(workspace, config, job, missing, songs)
    manifest = build_manifest(
        "embeddings",
        config=config.model_dump(mode="json"),
        inputs=job.inputs,
        quality={"songs": sum(songs.values())},
        model_versions=job.model_versions,
        dim=_dim(workspace, f"{job.path}/{shards[0]}"),
    )
    workspace.finish(job.path, manifest)
    return _result(workspace, job, manifest, started, skipped=False)


class ShardEmbedder:
    """Ray Data actor that holds the models and embeds files of features."""

    def __init__(self, workspace: Workspace, job: EmbedJob, batch_size: int, device: str) -> None:
        from htcl_ray.search.encoder import SongEncoder

        self._workspace, self._job, self._batch_size = workspace, job, batch_size
        self._encoder = SongEncoder.from_workspace(workspace, *job.models.paths, device=device)
        self._encoder.check_versions(job.model_versions)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the vectors of the shards that are named in a batch."""
        for shard in batch["shard"]:
            features = pq.read_table(
                self._workspace.full(f"{self._job.features.path}/{shard}"),
                columns=["song_id", "features", "valid_frames"],
                filesystem=self._workspace.fs,
            )
            self._workspace.write_table(
                f"{self._job.path}/{shard}", embed_table(features, self._encoder, self._batch_size)
            )
        return batch


def embed_table(features: pa.Table, encoder: SongEncoder, batch_size: int) -> pa.Table:
    """Embed rows of `features_schema`; returns rows of `embeddings_schema` in the same order.

    Raises InputError with the song id when a song cannot be embedded, or its vector is not finite or not of unit norm.
    """
    frames = features["features"].combine_chunks().to_numpy_ndarray()
    valid, song_ids = features["valid_frames"].to_numpy(), features["song_id"].to_pylist()
    parts = []
    for start in range(0, len(valid), batch_size):
        rows = slice(start, start + batch_size)
        parts.append(_encode(encoder, frames[rows], valid[rows], song_ids[rows]))
    vectors = concatenate(parts)
    check_unit_norm(
        vectors, lambda row: f"song '{song_ids[row]}'", "the model is damaged or diverged, so choose another one"
    )
    schema = embeddings_schema(vectors.dim)
    absent = pa.nulls(len(valid), schema.field("preference").type)
    preference = absent if vectors.preference is None else _rows(vectors.preference)
    return pa.table([features["song_id"], _rows(vectors.semantic), preference], schema=schema)


def _encode(encoder: SongEncoder, frames: np.ndarray, valid: np.ndarray, song_ids: list[str]) -> Vectors:
    """Embed a batch. If it fails, its songs are embedded one by one, to name the song that causes the error."""
    try:
        return encoder.encode_features(frames[:, : valid.max()], valid, len(valid))
    except InputError:
        for row, song_id in enumerate(song_ids):
            try:
                encoder.encode_features(frames[row : row + 1, : valid[row]], valid[row : row + 1])
            except InputError as error:
                raise InputError(f"song '{song_id}' cannot be embedded: {error}") from None
        raise


def read_vectors(workspace: Workspace, path: str) -> tuple[list[str], Vectors]:
    """Song ids and vectors of an embeddings artifact, in the order of its files.

    Raises InputError for vectors that are not of unit norm.
    """
    table = workspace.read_tables(path, columns=["song_id", "semantic", "preference"])
    halves = [None if column.null_count else matrix_of(column) for column in (table["semantic"], table["preference"])]
    if halves[0] is None:
        raise MismatchError(f"{workspace.uri_of(path)} has songs without a semantic vector; run 'htcl embed' again")
    song_ids, vectors = table["song_id"].to_pylist(), Vectors(halves[0], halves[1])
    advice = f"{workspace.uri_of(path)} was damaged, so remove it and run 'htcl embed' again"
    check_unit_norm(vectors, lambda row: f"song '{song_ids[row]}'", advice)
    return song_ids, vectors


def embed_shards(
    workspace: Workspace, config: Config, job: EmbedJob, missing: list[str], songs: dict[str, int]
) -> None:
    """Embed the missing shards with Ray Data actors that hold the models, each shard written when it is done."""
    import ray

    settings = config.embed
    use_gpu = settings.accelerator == "gpu" or (
        settings.accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0
    )
    # On one machine a restarted actor would fail for the same reason, and Ray prints a warning for each actor that may
    # restart.
    restarts = {"max_restarts": 0, "max_task_retries": 0} if address_of(config) == "local" else {}
    names = ray.data.from_items([{"shard": name} for name in missing], override_num_blocks=len(missing))
    with warnings.catch_warnings(action="ignore"):  # max_restarts is deprecated, without a replacement so far
        rows = names.map_batches(
            ShardEmbedder,
            fn_constructor_args=(workspace, job, settings.batch_size, "cuda" if use_gpu else "cpu"),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(settings.num_workers, len(missing))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
            **restarts,
        )
    total = sum(songs.values())
    with Progress("embed", total, "songs", done=total - sum(songs[name] for name in missing)) as progress:
        for row in rows.iter_rows():
            progress.advance(songs[row["shard"]])


def _check_recipe(workspace: Workspace, features: Artifact, model: Artifact) -> None:
    """Check that the model was trained on features of the same kind. Raises MismatchError."""
    of_model, of_features = model.manifest["config"]["audio"], features.manifest["config"]["audio"]
    unused = UNUSED[of_features.get("extractor", "log_mel")]
    for key in AudioRecipe.model_fields:
        if key not in unused and of_model.get(key) != of_features.get(key):
            raise MismatchError(
                f"model {model.version} was trained with audio.{key}={of_model.get(key)}, but the features "
                f"{features.version} were made with {of_features.get(key)}; run 'htcl preprocess' with the model's "
                "configuration, or choose another model"
            )
    if of_features.get("extractor", "log_mel") == "log_mel":
        return
    from htcl_ray.models.folder import read_record  # loads torch

    record = read_record(workspace.local_copy(model.path))
    width, extractor = feature_width(features.manifest), recorded_extractor(features.manifest)
    if record.input_width != width:
        raise MismatchError(
            f"model {model.version} was trained on vectors of {record.input_width} numbers, but those of the features "
            f"{features.version} have {width}; give the vectors that it was trained on, or train a model on these"
        )
    check_encoder(record.extractor, extractor, f"model {model.version}")


def _rows(vectors: np.ndarray) -> pa.FixedSizeListArray:
    """Convert [songs, dim] to a list column."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), vectors.shape[1])


def _dim(workspace: Workspace, shard: str) -> int:
    """Dimension of the semantic vectors in a shard."""
    return int(pq.read_schema(workspace.full(shard), filesystem=workspace.fs).field("semantic").type.list_size)


def _result(
    workspace: Workspace, job: EmbedJob, manifest: dict[str, Any], started: float, *, skipped: bool
) -> StepResult:
    spaces = "semantic and preference" if job.models.preference else "semantic"
    by = " and ".join(item.version for item in (job.models.semantic, job.models.preference) if item is not None)
    summary = f"{manifest['quality']['songs']} songs, {spaces} vectors of {manifest['dim']} by {by}"
    return StepResult("embed", workspace.uri_of(job.path), summary, time.monotonic() - started, skipped)
