"""Inputs of an evaluation, read from the workspace: versions of the artifacts, the catalogue, and clips to check."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.errors import AudioError, MismatchError, TableError, WorkspaceError
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs, with_blend
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.vector_checks import vector_check_tasks
from htcl_ray.index.vectors import matrix_of
from htcl_ray.pipelines import inputs as step_inputs
from htcl_ray.pipelines.embed import embeddings, plan
from htcl_ray.pipelines.index import find_index
from htcl_ray.progress import Progress
from htcl_ray.schemas import FORMAT_VERSION, METADATA, Split
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, Models
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace

CHECKED_SONGS = 16
"""Limit of the held-out songs whose determinism is checked."""
SONGS_AT_ONCE = 64


@dataclass(frozen=True)
class EvaluationInputs:
    """The artifacts that are evaluated."""

    features: Artifact
    models: Models
    embeddings: Artifact
    events: Artifact | None
    pairs: Artifact | None
    index: Artifact | None
    """The index of these embeddings with the configured settings."""

    @property
    def versions(self) -> dict[str, str | None]:
        """Versions for the report and its fingerprint."""
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
        """The model of the last stage, to which the verdict of a gate belongs."""
        return self.models.preference or self.models.semantic


def find_inputs(workspace: Workspace, config: Config, model: str | None = None) -> EvaluationInputs:
    """The artifacts that the configuration determines, or the model `model` and its artifacts; gates are ignored.

    Raises InputError.
    """
    job = plan(workspace, config, model, require="off")
    features = job.features.version
    return EvaluationInputs(
        job.features,
        job.models,
        embeddings(workspace, job),
        step_inputs.events(workspace, config, features),
        step_inputs.pairs(workspace, config, features),
        find_index(workspace, config, job),
    )


def inputs_of_report(workspace: Workspace, run: str) -> EvaluationInputs:
    """The artifacts that a finished report evaluated. Raises WorkspaceError when one of them no longer exists."""
    versions = workspace.read_json(f"reports/{run}/manifest.json")["inputs"]

    def artifact(kind: str) -> Artifact:
        path = f"{kind}/{versions[kind]}"
        manifest = workspace.manifest(path)
        if manifest is None:
            raise WorkspaceError(f"{workspace.uri_of(path)}, which report {run} evaluated, does not exist any more")
        return Artifact(path, versions[kind], manifest)

    models = artifacts.named_models(workspace, versions["preference"] or versions["semantic"])
    events, pairs, index = (artifact(kind) if versions[kind] else None for kind in ("events", "pairs", "index"))
    return EvaluationInputs(artifact("features"), models, artifact("embeddings"), events, pairs, index)


def read_songs(workspace: Workspace, inputs: EvaluationInputs, settings: EvaluateSettings) -> EvaluatedSongs:
    """The catalogue with its vectors.

    Raises MismatchError when the embeddings are not of these songs, TableError when the oracle's are not.
    """
    columns = ["song_id", "text", "split", "duplicate_group", *METADATA.names]
    table = workspace.read_tables(inputs.features.path, columns).sort_by("song_id")
    vectors = workspace.read_tables(inputs.embeddings.path).sort_by("song_id")
    ids = table["song_id"].to_pylist()
    if vectors["song_id"].to_pylist() != ids:
        raise MismatchError(
            f"the embeddings {inputs.embeddings.version} hold {len(vectors)} songs, but the features "
            f"{inputs.features.version} hold {len(ids)} or others; remove the embeddings and run 'htcl embed' again"
        )
    spaces = {"semantic": matrix_of(vectors["semantic"])}
    if not vectors["preference"].null_count:
        spaces["preference"] = matrix_of(vectors["preference"])
    return EvaluatedSongs(
        ids,
        table["text"].to_pylist(),
        np.array(table["split"].to_pylist()),
        table["duplicate_group"].to_pylist(),
        table.select(METADATA.names),
        with_blend(spaces),
        log_mel_statistics(workspace, inputs.features),
        None if settings.oracle_vectors is None else _oracle(settings.oracle_vectors, ids),
    )


def _oracle(path: str, song_ids: list[str]) -> np.ndarray:
    """The vectors of `evaluate.oracle_vectors` in the order of these songs; float32 [songs, traits]."""
    try:
        table = pq.read_table(path, columns=["song_id", "vector"])
    except (OSError, pa.ArrowException) as error:
        raise TableError(
            f"evaluate.oracle_vectors: {path} cannot be read ({error}); expected a Parquet table "
            "with song_id and vector"
        ) from None
    place = {song: row for row, song in enumerate(table["song_id"].to_pylist())}
    missing = [song for song in song_ids if song not in place]
    if missing:
        raise TableError(
            f"evaluate.oracle_vectors: {path} has no vector of {len(missing)} songs of the catalogue, for instance "
            f"'{missing[0]}'; expected one for each song"
        )
    vectors = matrix_of(table["vector"].take(pa.array([place[song] for song in song_ids], pa.int64())))
    return np.asarray(vectors, dtype=np.float32)


def log_mel_statistics(workspace: Workspace, features: Artifact) -> np.ndarray:
    """Mean and standard deviation of each mel band over the valid frames of a song; float32 [songs, 2·mels].

    In the order of song ids, standardised over the training songs, then scaled to unit norm. They need no model and
    serve as a baseline. Computed from the features once and kept in `statistics/<features>`.
    """
    path = f"statistics/{features.version}"
    if workspace.manifest(path) is None:
        workspace.write_table(f"{path}/log_mel.parquet", _band_statistics(workspace, features))
        workspace.finish(
            path, build_manifest("statistics", config={}, inputs={"features": features.version}, format=FORMAT_VERSION)
        )
    table = workspace.read_tables(path).sort_by("song_id")
    statistics = np.asarray(matrix_of(table["statistics"]), dtype=np.float32)
    training = statistics[np.array(table["split"].to_pylist()) == Split.TRAIN]
    if len(training):
        deviation = training.std(axis=0)
        statistics = (statistics - training.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    norms = np.linalg.norm(statistics, axis=1, keepdims=True)
    scaled: np.ndarray = (statistics / np.where(norms > 0, norms, 1)).astype(np.float32)
    return scaled


def _band_statistics(workspace: Workspace, features: Artifact) -> pa.Table:
    dataset = _feature_dataset(workspace, features)
    columns, parts = ["song_id", "split", "features", "valid_frames"], []
    with Progress("evaluate", dataset.count_rows(), "log-mels") as progress:
        for batch in dataset.to_batches(columns=columns, batch_size=SONGS_AT_ONCE):
            mels = batch["features"].to_numpy_ndarray()
            rows = [
                np.concatenate(
                    [mel[:frames].mean(axis=0, dtype=np.float32), mel[:frames].astype(np.float32).std(axis=0)]
                )
                for mel, frames in zip(mels, batch["valid_frames"].to_pylist(), strict=True)
            ]
            statistics = [row.tolist() for row in rows]
            parts.append(pa.table({"song_id": batch["song_id"], "split": batch["split"], "statistics": statistics}))
            progress.advance(len(rows))
    return pa.concat_tables(parts)


def check_vectors(
    workspace: Workspace, features: Artifact, encoder: SongEncoder, songs: EvaluatedSongs, settings: EvaluateSettings
) -> list[TaskResult]:
    """Collapse and determinism of the models, on up to CHECKED_SONGS held-out songs sampled by `evaluate.seed`."""
    held_out = np.flatnonzero(songs.splits == settings.split)
    rows = np.sort(np.random.default_rng(settings.seed).permutation(held_out)[:CHECKED_SONGS])
    table = _feature_dataset(workspace, features).to_table(
        columns=["song_id", "features", "valid_frames", "audio_path"],
        filter=pc.field("song_id").isin([songs.ids[row] for row in rows]),
    )
    table = table.sort_by("song_id")
    mels = [
        mel[:frames].astype(np.float32)
        for mel, frames in zip(
            table["features"].combine_chunks().to_numpy_ndarray(), table["valid_frames"].to_pylist(), strict=True
        )
    ]
    waveforms = [_waveform(path, encoder) for path in table["audio_path"].to_pylist()]
    texts = sorted({songs.texts[row] for row in held_out})
    return vector_check_tasks(encoder, songs, mels, rows, texts, waveforms, settings.seed)


def _waveform(path: str | None, encoder: SongEncoder) -> np.ndarray | None:
    """Decode a file; None when it can no longer be read, because features may outlive their audio, or is not used."""
    if path is None or not encoder.takes_audio:
        return None
    try:
        return decode(path, encoder.audio_features.decoding)
    except AudioError:
        return None


def _feature_dataset(workspace: Workspace, features: Artifact) -> pads.Dataset:
    files = [
        workspace.full(f"{features.path}/{name}")
        for name in workspace.children(features.path)
        if name.endswith(".parquet")
    ]
    return pads.dataset(files, filesystem=workspace.fs, format="parquet")
