"""Estimated genre, mood and tags (`catalog.auto_tags`), from the stored vectors of a pretrained encoder.

The tagger is the last layer of the encoder, so its scores come from the features, without decoding any audio. Estimates
are an artifact of their own: features, texts, models, embeddings and labels of an evaluation do not depend on them, and
only the index takes them up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from htcl_ray.catalog.auto_tags import VALUES, completed, estimated_values, known_tags
from htcl_ray.cluster.connection import connect
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, WorkspaceError
from htcl_ray.extractors.families import ExtractorRecord, find_extractor, tags_of_encoder
from htcl_ray.progress import Progress
from htcl_ray.schemas import ESTIMATES, FORMAT_VERSION, TAG_COLUMNS
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.extractors.base import PretrainedExtractor

SHARDS_AT_ONCE = 16
"""Files of features of one Ray task, which loads the encoder once."""


def check_auto_tags(config: Config) -> tuple[ExtractorRecord, list[str]] | None:
    """The encoder and its tags; None when `catalog.auto_tags` is off.

    Raises ConfigError when the encoder has no tag that is a value of a metadata column.
    """
    if not config.catalog.auto_tags:
        return None
    folder, record = find_extractor(config.audio.recipe)
    tags = tags_of_encoder(folder, record)
    if not known_tags(tags):
        raise ConfigError(
            f"catalog.auto_tags needs an encoder that gives tags of music, but the audio model {record.name_or_path} "
            f"is of the kind '{record.family}', which gives none; choose a music tagger ('make pretrained-audio' makes "
            "one), or set catalog.auto_tags=false"
        )
    return record, tags


def estimates_version(config: Config, features_version: str) -> str:
    """Fingerprint of the estimates for these features."""
    return fingerprint("estimates", FORMAT_VERSION, features_version, config.catalog.auto_tags_min_score, VALUES)


def find_estimates(workspace: Workspace, config: Config, features_version: str) -> Artifact | None:
    """The finished estimates for these features; None when `catalog.auto_tags` is off.

    Raises WorkspaceError when they do not exist.
    """
    if not config.catalog.auto_tags:
        return None
    version = estimates_version(config, features_version)
    manifest = workspace.manifest(f"estimates/{version}")
    if manifest is None:
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no estimated tags (catalog.auto_tags) for the features "
            f"{features_version}; run 'htcl preprocess' with this configuration first"
        )
    return Artifact(f"estimates/{version}", version, manifest)


def make_estimates(workspace: Workspace, config: Config, features_version: str) -> None:
    """Write the missing files of the estimates, one for each file of features, and finish the artifact."""
    import ray.data

    encoder = check_auto_tags(config)
    assert encoder is not None
    record, tags = encoder
    features, estimates = f"features/{features_version}", f"estimates/{estimates_version(config, features_version)}"
    shards = [name for name in workspace.children(features) if name.endswith(".parquet")]
    missing = sorted(set(shards) - set(workspace.children(estimates)))
    if missing:
        connect(config)
        writer = EstimateWriter(workspace, config, features, estimates, record, tags)
        tasks = -(-len(missing) // SHARDS_AT_ONCE)
        dataset = ray.data.from_items([{"shard": name} for name in missing], override_num_blocks=tasks)
        written = dataset.map_batches(writer, batch_size=SHARDS_AT_ONCE)
        with Progress("auto_tags", len(shards), "files", done=len(shards) - len(missing)) as progress:
            for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
                progress.advance(len(batch["shard"]))
    table = workspace.read_tables(estimates)
    counts = {name: len(table) - table[name].null_count for name in TAG_COLUMNS}
    print(f"preprocess  auto_tags: {described(counts)} of {len(table):,} songs estimated", flush=True)
    workspace.finish(
        estimates,
        build_manifest(
            "estimates",
            config=config.model_dump(mode="json"),
            inputs={"features": features_version},
            quality={"songs": len(table)},
            auto_tags={
                "tagger": record.model_dump(mode="json", include={"name_or_path", "family", "fingerprint", "licence"}),
                "min_score": config.catalog.auto_tags_min_score,
                "songs": counts,
            },
        ),
    )


def described(counts: dict[str, int]) -> str:
    """The number of songs with estimated values by column, as text."""
    return ", ".join(f"{name} of {count:,}" for name, count in counts.items())


class EstimateWriter:
    """Writes the estimates of the files of features that are named in a batch of Ray Data."""

    def __init__(
        self,
        workspace: Workspace,
        config: Config,
        features: str,
        estimates: str,
        record: ExtractorRecord,
        tags: list[str],
    ) -> None:
        self._workspace, self._config = workspace, config
        self._features, self._estimates, self._record, self._tags = features, estimates, record, tags

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Write the files; return their names."""
        from htcl_ray.extractors.base import load_extractor  # imports torch

        extractor = load_extractor(self._config.audio.recipe, self._record)
        for shard in batch["shard"].tolist():
            features = pq.read_table(
                self._workspace.full(f"{self._features}/{shard}"),
                columns=["song_id", "features", "valid_frames", *TAG_COLUMNS],
                filesystem=self._workspace.fs,
            )
            scores = song_scores(features, extractor)
            estimates = estimated_values(features, scores, self._tags, self._config.catalog.auto_tags_min_score)
            self._workspace.write_table(f"{self._estimates}/{shard}", estimates)
        return batch


def song_scores(features: pa.Table, extractor: PretrainedExtractor) -> np.ndarray:
    """Scores of the encoder's tags for rows of `features_schema`: float32 [songs, tags], means over the windows."""
    vectors = features["features"].combine_chunks().to_numpy_ndarray()
    return np.stack(
        [
            extractor.tag_scores(windows[:valid].astype(np.float32)).mean(axis=0)
            for windows, valid in zip(vectors, features["valid_frames"].to_pylist(), strict=True)
        ]
    )


def with_estimates(workspace: Workspace, songs: pa.Table, estimates: Artifact | None) -> pa.Table:
    """Complete songs from estimates (see `catalog.auto_tags.completed`); without estimates they stay as they are."""
    if estimates is None:
        return songs
    table = workspace.read_tables(estimates.path, ESTIMATES.names)
    rows = pc.index_in(songs["song_id"].combine_chunks(), value_set=table["song_id"].combine_chunks())
    return completed(songs, table.take(rows))
