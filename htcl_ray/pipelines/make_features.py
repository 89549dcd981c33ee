"""Catalogue → features of every song, in shards.

The unit of work is the shard: `data.songs_per_shard` songs in the order of their ids. The file of a shard appears whole
or not at all, so an interrupted run continues with the missing shards.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.catalog.artists import artist_groups
from htcl_ray.catalog.audio_files import UNUSABLE, sizes_and_times
from htcl_ray.catalog.given_vectors import check_vectors
from htcl_ray.catalog.quarantine import check_share, count_reasons, describe, examples
from htcl_ray.catalog.songs import SONGS, Catalog, read_catalog
from htcl_ray.cluster import connection
from htcl_ray.config import Config
from htcl_ray.errors import TableError
from htcl_ray.extractors.families import ExtractorRecord, find_extractor
from htcl_ray.interactions.splits import group_splits
from htcl_ray.pipelines.feature_shards import ShardWriter, shard_name
from htcl_ray.progress import Progress
from htcl_ray.schemas import FORMAT_VERSION, QUARANTINE, Reason
from htcl_ray.workspace.filesystem import storage_errors
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

VECTOR_SHARDS = 64
"""A shard of given vectors holds this many times `data.songs_per_shard` songs."""
MAX_TASKS = 4096
"""Ray tasks of one pass; with more shards a task processes several."""


@dataclass(frozen=True)
class FeaturesPlan:
    """Inputs and settings that determine the features, known before any audio is decoded."""

    versions: tuple[str, str]
    """Fingerprint on this machine, and on a machine that differs in whether FFmpeg (`av`) is installed."""
    catalog: Catalog
    songs: pa.Table
    """Songs whose audio file can be opened and is not empty, or whose given vector is usable; shards are slices of this
    table. `split` is null for songs without an artist."""
    rejected: pa.Table
    """Rows of QUARANTINE: songs rejected before decoding."""
    inputs: dict[str, str]
    width: int
    """Size of the vector of a frame."""
    extractor: ExtractorRecord | None = None
    """The pretrained encoder that makes the features."""

    def shard_size(self, config: Config) -> int:
        """Number of songs of a shard; given vectors need no decoding, so their shards hold more."""
        given = config.audio.extractor == "vectors"
        return config.data.songs_per_shard * (VECTOR_SHARDS if given else 1)

    @property
    def version(self) -> str:
        """Fingerprint of the features that `htcl preprocess` makes on this machine."""
        return self.versions[0]


def plan_features(config: Config) -> FeaturesPlan:
    """Read and check the catalogue, and the sizes and times of its audio files. Raises InputError."""
    recipe = config.audio.recipe
    given_vectors = recipe.extractor == "vectors"
    extractor = find_extractor(recipe)[1] if recipe.extractor == "pretrained" else None
    catalog = read_catalog(config.data, given_vectors=given_vectors)
    songs = catalog.songs
    inputs = {"catalog": _identity(catalog)}
    if given_vectors:
        usable, unusable = check_vectors(songs)
        width = usable.schema.field("vector").type.list_size
        rejected = pa.concat_tables([catalog.rejected, unusable])
    else:
        stats = sizes_and_times(songs["audio_path"].to_pylist())
        rejects = [_reject(songs.filter(stats[:, 0] == size), *why) for size, why in UNUSABLE.items()]
        rejected = pa.concat_tables([catalog.rejected, *rejects])
        usable = songs.filter(stats[:, 0] > 0)
        inputs["audio"] = hashlib.sha256(stats.tobytes()).hexdigest()[:16]
        width = recipe.n_mels if extractor is None else extractor.width
    settings = config.data.model_dump(mode="json", include={"split_shares", "songs_per_shard"})
    # Part of the fingerprint, so that songs that need FFmpeg are decoded when it is installed later.
    has_ffmpeg = importlib.util.find_spec("av") is not None
    if config.data.split_column is None:
        splits = group_splits(artist_groups(usable["artist"]), config.data.split_shares)
        usable = usable.set_column(usable.schema.get_field_index("split"), "split", splits)
    made_by = recipe.determining, extractor and extractor.model_dump(mode="json")
    own, other = (
        fingerprint(FORMAT_VERSION, inputs, made_by, settings, ffmpeg) for ffmpeg in (has_ffmpeg, not has_ffmpeg)
    )
    return FeaturesPlan((own, other), catalog, usable, rejected, inputs, width, extractor)


def _reject(songs: pa.Table, reason: Reason, detail: str) -> pa.Table:
    """Rows of QUARANTINE for these songs. `detail`: a template that takes the audio path."""
    columns = {
        "song_id": songs["song_id"],
        "row": songs["row"],
        "source": songs["source"],
        "reason": pa.array([reason.value] * songs.num_rows, pa.string()),
        "detail": pa.array([detail.format(path) for path in songs["audio_path"].to_pylist()], pa.string()),
    }
    return pa.table(columns, schema=QUARANTINE)


def check_rejected(config: Config, plan: FeaturesPlan, rejected: pa.Table, songs: int, where: str) -> None:
    """Check that at most `data.max_rejected_share` of the catalogue is rejected and that a song is left.

    `songs`: number of accepted songs. `where`: location of the quarantine tables, for the message; they are written
    before. Raises InputError.
    """
    counts, example = count_reasons(rejected), next(iter(examples(rejected).values()), "")
    check_share("catalogue", counts, plan.catalog.rows, config.data.max_rejected_share, where, example)
    if not songs:
        tables = ", ".join(config.data.catalog)
        raise TableError(
            f"no song of {tables} can be used: {describe(counts)}, for instance {example}; "
            f"see {where} and correct the input"
        )


def _identity(catalog: Catalog) -> str:
    """Hash of the content of a catalogue, independent of the spelling of paths and of the order of its rows."""
    folders: dict[str, str] = {}
    paths: list[str | None] = []
    for path in catalog.songs["audio_path"].to_pylist():
        if path is None:
            paths.append(None)
            continue
        folder, separator, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = canonical(f"{folder}{separator}")
        paths.append(f"{folders[folder].rstrip('/')}/{name}")
    column = catalog.songs.schema.get_field_index("audio_path")
    songs = catalog.songs.set_column(column, SONGS.field("audio_path"), pa.array(paths, pa.string()))
    songs = songs.drop_columns(["source", "row"])
    rejected = sorted(
        zip(*(map(str, catalog.rejected[name].to_pylist()) for name in ("song_id", "reason")), strict=True)
    )
    return fingerprint(_table_hash(songs), rejected)


def _table_hash(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:16]


def make_features(workspace: Workspace, config: Config, plan: FeaturesPlan) -> None:
    """Write the missing shards of the features, settle the splits, and finish the artifact. Raises InputError."""
    features, quarantine = f"features/{plan.version}", f"quarantine/{plan.version}"
    shards = -(-plan.songs.num_rows // plan.shard_size(config))
    done = set(workspace.children(features))
    pending = [shard for shard in range(shards) if shard_name(shard) not in done]
    where = workspace.uri_of(quarantine)
    if pending:
        connection.connect(config)
        _run_shards(workspace, config, plan, pending)
    if config.data.split_column is None:
        _settle_splits(workspace, config, features)
    rejected = workspace.read_tables(quarantine) if _shards(workspace, quarantine) else QUARANTINE.empty_table()
    quality = _measure(workspace, plan, rejected)
    check_rejected(config, plan, rejected, quality["songs"], where)
    _tidy(workspace, features)
    tree = config.model_dump(mode="json")
    if quality["partly_decoded"]:
        print(
            f"preprocess  {quality['partly_decoded']:,} songs are damaged and were decoded only in part; see the "
            f"column decoded_share in {workspace.uri_of(features)}",
            flush=True,
        )
    if quality["rejected"]:
        print(f"preprocess  {describe(quality['rejected'])}; see {where}", flush=True)
        for reason, example in examples(rejected).items():
            print(f"preprocess    {reason}, for instance {example}", flush=True)
        workspace.finish(
            quarantine,
            build_manifest("quarantine", config=tree, inputs=plan.inputs, quality={"rejected": quality["rejected"]}),
        )
    extractor = None if plan.extractor is None else plan.extractor.model_dump(mode="json")
    workspace.finish(
        features,
        build_manifest(
            "features",
            config=tree,
            inputs=plan.inputs,
            quality=quality,
            feature_width=plan.width,
            extractor=extractor,
        ),
    )


def _run_shards(workspace: Workspace, config: Config, plan: FeaturesPlan, pending: list[int]) -> None:
    """Make the pending shards: in Ray tasks, or with a pretrained encoder in actors that hold it."""
    import ray
    import ray.data

    size, total = plan.shard_size(config), plan.songs.num_rows
    done = total - sum(min(size, total - shard * size) for shard in pending)
    songs = ray.put(plan.songs)
    folders = f"features/{plan.version}", f"quarantine/{plan.version}"
    arguments = (workspace, config, *folders, songs, size, plan.extractor)
    shards = ray.data.from_items(
        [{"shard": shard} for shard in pending], override_num_blocks=min(len(pending), MAX_TASKS)
    )
    if plan.extractor is None:
        written = shards.map_batches(ShardWriter(*arguments).__call__, batch_size=1)
    else:
        use_gpu = config.embed.accelerator == "gpu" or (
            config.embed.accelerator == "auto" and ray.cluster_resources().get("GPU", 0) > 0
        )
        workers = config.embed.num_workers if use_gpu else int(ray.cluster_resources().get("CPU", 1))
        written = shards.map_batches(
            ShardWriter,
            fn_constructor_args=(*arguments, "cuda" if use_gpu else "cpu"),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=max(1, min(workers, len(pending)))),
            num_cpus=1,
            num_gpus=1 if use_gpu else 0,
        )
    with Progress("preprocess", total, "songs", done=done) as progress:
        for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
            progress.advance(int(batch["songs"].sum()))


def _settle_splits(workspace: Workspace, config: Config, features: str) -> None:
    """Assign songs that share a recording to one split, and rewrite the shards of songs that change their split.

    Duplicate recordings are known only after decoding. Splits depend on the catalogue and the duplicate groups alone,
    so an interrupted run repeats the same result.
    """
    shards = _shards(workspace, features)
    if not shards:
        return
    songs = pads.dataset(shards, filesystem=workspace.fs, format="parquet").to_table(
        ["split", "artist", "duplicate_group", "__filename"]
    )
    if not songs.num_rows:
        return
    groups = artist_groups(songs["artist"], songs["duplicate_group"])
    splits = group_splits(groups, config.data.split_shares)
    _warn_of_dominant_group(groups)
    changed = pc.not_equal(songs["split"], splits).to_numpy()
    files = songs["__filename"].combine_chunks().dictionary_encode()
    edges = np.flatnonzero(np.diff(files.indices.to_numpy(), prepend=-1, append=-1))
    items = [
        {"file": files[start].as_py().rpartition("/")[2], "splits": splits.slice(start, end - start).to_pylist()}
        for start, end in itertools.pairwise(edges.tolist())
        if changed[start:end].any()
    ]
    if not items:
        return
    connection.connect(config)
    import ray.data

    print(
        f"preprocess  {np.count_nonzero(changed):,} songs change their split: "
        "their recording is under another artist too",
        flush=True,
    )
    write = functools.partial(_write_splits, workspace=workspace, features=features)
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_TASKS)).map_batches(
        write, batch_size=1
    )
    for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        pass


def _warn_of_dominant_group(groups: pa.Array) -> None:
    """Warn when one group, which is never divided, holds more than half of the songs."""
    largest = max(pc.value_counts(groups).to_pylist(), key=lambda group: group["counts"])
    if 2 * largest["counts"] > len(groups):
        print(
            f"preprocess  WARNING: {largest['counts']:,} of {len(groups):,} songs are connected by shared artists or "
            f"recordings (group '{largest['values']}') and are all for training; give data.split_column to divide them "
            "otherwise",
            flush=True,
        )


def _write_splits(batch: dict[str, Any], *, workspace: Workspace, features: str) -> dict[str, Any]:
    """Replace the split column of shards. Runs in a Ray task."""
    for file, names in zip(batch["file"].tolist(), batch["splits"], strict=True):
        path = f"{features}/{file}"
        shard = pq.read_table(workspace.full(path), filesystem=workspace.fs)
        column = shard.schema.get_field_index("split")
        splits = pa.array(list(names), pa.string())
        workspace.write_table(path, shard.set_column(column, shard.schema.field(column), splits))
    return {"files": batch["file"]}


def _measure(workspace: Workspace, plan: FeaturesPlan, rejected: pa.Table) -> dict[str, Any]:
    """Counts for the manifest, read from the written shards of this run and earlier ones."""
    table = pa.table({"split": pa.array([], pa.string()), "decoded_share": pa.array([], pa.float32())})
    if shards := _shards(workspace, f"features/{plan.version}"):
        with storage_errors(workspace.uri_of(f"features/{plan.version}")):
            table = pads.dataset(shards, filesystem=workspace.fs, format="parquet").to_table(
                columns=["split", "decoded_share"]
            )
    return {
        "songs": table.num_rows,
        "partly_decoded": pc.sum(pc.less(table["decoded_share"], 1.0)).as_py() or 0,
        "rejected": count_reasons(rejected),
        "null_cells": dict(plan.catalog.null_cells.counts),
        "splits": {item["values"]: item["counts"] for item in pc.value_counts(table["split"]).to_pylist()},
    }


def _shards(workspace: Workspace, path: str) -> list[str]:
    """Full paths of the Parquet files of an artifact."""
    return [workspace.full(f"{path}/{name}") for name in workspace.children(path) if name.endswith(".parquet")]


def _tidy(workspace: Workspace, path: str) -> None:
    """Remove temporary files of interrupted writers, and shards of which every song was rejected."""
    for fragment in pads.dataset(_shards(workspace, path), filesystem=workspace.fs, format="parquet").get_fragments():
        if not fragment.count_rows():
            workspace.fs.delete_file(fragment.path)
    for info in workspace.fs.get_file_info(pafs.FileSelector(workspace.full(path))):
        if info.base_name.startswith("."):
            workspace.fs.delete_file(info.path)
