"""`htcl preprocess`: catalogue → log-mel shards; logs → events → preference pairs and negatives; rejected rows →
quarantine.

The unit of work is the shard: `data.songs_per_shard` songs in the order of their ids. A shard's file appears whole or
not at all, so a run that was killed goes on with the shards that are missing. Everything a person can mend is checked
before Ray starts.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import itertools
import time
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
from htcl_ray.catalog.duplicates import duplicate_group
from htcl_ray.catalog.quarantine import check_share, count_reasons, describe, examples, rejected_rows
from htcl_ray.catalog.songs import SONGS, Catalog, read_catalog
from htcl_ray.cluster import connection
from htcl_ray.config import Config
from htcl_ray.errors import AudioError, TableError
from htcl_ray.interactions.splits import group_split, group_splits
from htcl_ray.pipelines.events import LogPlan, check_all_renames, check_log, make_events, plan_log
from htcl_ray.pipelines.mine_pairs import make_pairs
from htcl_ray.schemas import FORMAT_VERSION, METADATA, QUARANTINE, Reason, features_schema
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.filesystem import storage_errors
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

SECONDS_BETWEEN_LINES = 2.0


def preprocess(config: Config) -> StepResult:
    """Make features of `data.catalog` and, when `data.interactions` is given, events, preference pairs and negatives.

    What is finished is not made again, and what is half-finished is completed. Raises InputError for input that cannot
    be used.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    workspace.check_writable()
    if config.data.catalog:
        print(
            f"preprocess  reading {without_credentials(', '.join(config.data.catalog))} and the sizes of its audio files",
            flush=True,
        )
    plan = plan_features(config)
    where = f"quarantine/{plan.version}"
    if plan.rejected.num_rows:
        workspace.write_table(f"{where}/catalog.parquet", plan.rejected)
    _check_rejected(config, plan, plan.rejected, plan.songs.num_rows, workspace.uri_of(where))
    log = plan_log(config, plan.version) if config.data.interactions else None
    check_all_renames(config)
    needs_features = workspace.manifest(f"features/{plan.version}") is None
    needs_events = log is not None and workspace.manifest(f"events/{log.events_version}") is None
    needs_pairs = log is not None and any(
        workspace.manifest(f"{kind}/{log.pairs_version}") is None for kind in ("pairs", "negatives")
    )
    if log is not None and needs_events:
        check_log(config, log, plan.songs["song_id"].combine_chunks())
    if needs_features:
        if plan.catalog.null_cells.counts:
            print(f"preprocess  catalogue: {plan.catalog.null_cells}", flush=True)
        _make_features(workspace, config, plan)
    if log is not None and needs_events:
        make_events(workspace, config, log, plan.version)
    if log is not None and (needs_events or needs_pairs):
        make_pairs(workspace, config, log, plan.version)
    summary = _summary(workspace, plan, log)
    skipped = not (needs_features or needs_events or needs_pairs)
    return StepResult(
        "preprocess", workspace.uri_of(f"features/{plan.version}"), summary, time.monotonic() - started, skipped
    )


def _summary(workspace: Workspace, plan: FeaturesPlan, log: LogPlan | None) -> str:
    features = (workspace.manifest(f"features/{plan.version}") or {})["quality"]
    text = f"{features['songs']:,} songs, {describe(features['rejected'])}"
    if features["partly_decoded"]:
        text += f", {features['partly_decoded']:,} decoded only in part"
    if log is None:
        return text
    events, pairs = (
        (workspace.manifest(path) or {})["quality"]
        for path in (f"events/{log.events_version}", f"pairs/{log.pairs_version}")
    )
    return f"{text}; {events['events']:,} events, {describe(events['rejected'])}; {pairs['pairs']:,} pairs"


@dataclass(frozen=True)
class FeaturesPlan:
    """Everything that determines the features, known before any audio is opened."""

    versions: tuple[str, str]
    """Fingerprint with the decoders of this machine, and with those of one that has FFmpeg where this one lacks it, or
    the reverse."""
    catalog: Catalog
    songs: pa.Table
    """Songs whose audio file can be opened and is not empty; shards are slices of it. `split` is null for songs without
    an artist."""
    rejected: pa.Table
    """Rejected without opening audio."""
    inputs: dict[str, str]

    @property
    def version(self) -> str:
        """Fingerprint of the features that `htcl preprocess` makes on this machine."""
        return self.versions[0]


def plan_features(config: Config) -> FeaturesPlan:
    """Read and check the catalogue, and look at its audio files from outside. Raises InputError."""
    catalog = read_catalog(config.data)
    songs = catalog.songs
    stats = sizes_and_times(songs["audio_path"].to_pylist())
    unusable = [_reject(songs.filter(stats[:, 0] == size), *why) for size, why in UNUSABLE.items()]
    rejected = pa.concat_tables([catalog.rejected, *unusable])
    usable = songs.filter(stats[:, 0] > 0)
    inputs = {"catalog": _identity(catalog), "audio": hashlib.sha256(stats.tobytes()).hexdigest()[:16]}
    settings = config.data.model_dump(mode="json", include={"split_shares", "songs_per_shard"})
    has_ffmpeg = (
        importlib.util.find_spec("av") is not None
    )  # installing it later must give the songs that wait for it another chance
    if config.data.split_column is None:
        splits = group_splits(artist_groups(usable["artist"]), config.data.split_shares)
        usable = usable.set_column(usable.schema.get_field_index("split"), "split", splits)
    recipe = config.audio.model_dump(mode="json")
    own, other = (
        fingerprint(FORMAT_VERSION, inputs, recipe, settings, ffmpeg) for ffmpeg in (has_ffmpeg, not has_ffmpeg)
    )
    return FeaturesPlan((own, other), catalog, usable, rejected, inputs)


def _reject(songs: pa.Table, reason: Reason, detail: str) -> pa.Table:
    columns = {
        "song_id": songs["song_id"],
        "row": songs["row"],
        "source": songs["source"],
        "reason": pa.array([reason.value] * songs.num_rows, pa.string()),
        "detail": pa.array([detail.format(path) for path in songs["audio_path"].to_pylist()], pa.string()),
    }
    return pa.table(columns, schema=QUARANTINE)


def _check_rejected(config: Config, plan: FeaturesPlan, rejected: pa.Table, songs: int, where: str) -> None:
    """Raise InputError when too many rows are rejected or no song is left; `where` is the quarantine table, which is
    written by then.
    """
    counts, such = count_reasons(rejected), next(iter(examples(rejected).values()), "")
    check_share("catalogue", counts, plan.catalog.rows, config.data.max_rejected_share, where, such)
    if not songs:
        tables = ", ".join(config.data.catalog)
        raise TableError(
            f"no song of {tables} can be used: {describe(counts)}, for instance {such}; see {where} and correct the input"
        )


def _identity(catalog: Catalog) -> str:
    """Hash of what a catalogue says, not of how its path and those of its audio files are spelled or where a row stands
    in it.
    """
    folders: dict[str, str] = {}
    paths = []
    for path in catalog.songs["audio_path"].to_pylist():
        folder, separator, name = path.rpartition("/")
        if folder not in folders:
            folders[folder] = canonical(f"{folder}{separator}")
        paths.append(f"{folders[folder].rstrip('/')}/{name}")
    place = catalog.songs.schema.get_field_index("audio_path")
    songs = catalog.songs.set_column(place, SONGS.field("audio_path"), pa.array(paths, pa.string())).drop_columns(
        ["source", "row"]
    )
    rejected = sorted(
        zip(*(map(str, catalog.rejected[name].to_pylist()) for name in ("song_id", "reason")), strict=True)
    )
    return fingerprint(_table_hash(songs), rejected)


def _table_hash(table: pa.Table) -> str:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return hashlib.sha256(sink.getvalue()).hexdigest()[:16]


def _make_features(workspace: Workspace, config: Config, plan: FeaturesPlan) -> None:
    features, quarantine = f"features/{plan.version}", f"quarantine/{plan.version}"
    shards = -(-plan.songs.num_rows // config.data.songs_per_shard)
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
    _check_rejected(config, plan, rejected, quality["songs"], where)
    _tidy(workspace, features)
    tree = config.model_dump(mode="json")
    if quality["partly_decoded"]:
        print(
            f"preprocess  {quality['partly_decoded']:,} songs are damaged and were decoded only in part: decoded_share in "
            f"{workspace.uri_of(features)} says how much",
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
    workspace.finish(features, build_manifest("features", config=tree, inputs=plan.inputs, quality=quality))


def _run_shards(workspace: Workspace, config: Config, plan: FeaturesPlan, pending: list[int]) -> None:
    import ray
    import ray.data

    size = config.data.songs_per_shard
    total = plan.songs.num_rows
    done = total - sum(min(size, total - shard * size) for shard in pending)
    if done:
        print(f"preprocess  {done:,} of {total:,} songs are done already; going on with the rest", flush=True)
    songs = ray.put(plan.songs)
    write = functools.partial(_write_shards, songs=songs, workspace=workspace, config=config, version=plan.version)
    tasks = min(len(pending), 4096)  # a task takes several shards when there are very many
    written = ray.data.from_items([{"shard": shard} for shard in pending], override_num_blocks=tasks).map_batches(
        write, batch_size=1
    )
    started, last, first = time.monotonic(), 0.0, done
    for batch in written.iter_batches(batch_size=None, prefetch_batches=0):
        done += int(batch["songs"].sum())
        seconds = time.monotonic() - started
        if seconds - last >= SECONDS_BETWEEN_LINES or done == total:
            rate = (done - first) / seconds
            print(
                f"preprocess  {done:,}/{total:,} songs  {rate:,.0f}/s  {(total - done) / rate:,.0f} s left", flush=True
            )
            last = seconds


def _write_shards(
    batch: dict[str, Any], *, songs: Any, workspace: Workspace, config: Config, version: str
) -> dict[str, Any]:
    """Write the shards that a batch names; runs in a Ray task."""
    import ray

    size = config.data.songs_per_shard
    table = ray.get(songs)
    counts = []
    for shard in batch["shard"].tolist():
        rows = table.slice(shard * size, size)
        features, rejected = make_shard(rows, config)
        if rejected.num_rows:  # first: the features file says that the shard is done
            workspace.write_table(f"quarantine/{version}/{shard_name(shard)}", rejected)
        workspace.write_table(f"features/{version}/{shard_name(shard)}", features)
        counts.append(rows.num_rows)
    return {"songs": np.array(counts)}


def shard_name(shard: int) -> str:
    """File name of a shard, in features and in quarantine; name order is the order of song ids."""
    return f"shard-{shard:07d}.parquet"


def make_shard(songs: pa.Table, config: Config) -> tuple[pa.Table, pa.Table]:
    """Features and rejected rows of some songs: reads and decodes their audio."""
    from htcl_ray.audio import check_audible, decode_clip, log_mel  # audio libraries, which planning does not need

    recipe = config.audio
    kept, mels, derived, rejected = [], [], [], [QUARANTINE.empty_table()]
    for i, song in enumerate(songs.select(["song_id", "audio_path", "split", "source", "row"]).to_pylist()):
        try:
            waveform, decoded_share = decode_clip(song["audio_path"], recipe)
            check_audible(waveform, recipe)
            mel = log_mel(waveform, recipe.sample_rate, recipe)
        except AudioError as error:
            detail = f"{song['audio_path']}: {error.detail}"
            rejected.append(rejected_rows([song["song_id"]], [song["row"]], song["source"], error.reason, detail))
            continue
        group = duplicate_group(waveform)
        split = song["split"] or group_split(f"recording:{group}", config.data.split_shares).value
        padded = np.full((recipe.max_frames, recipe.n_mels), mel.min(), dtype=np.float16)
        padded[: len(mel)] = mel
        kept.append(i)
        mels.append(padded)
        derived.append((len(mel), split, decoded_share, group))
    schema = features_schema(recipe.max_frames, recipe.n_mels)
    columns = {name: songs[name].combine_chunks() for name in ("song_id", "text", "audio_path", *METADATA.names)}
    columns = {name: column.take(pa.array(kept, pa.int64())) for name, column in columns.items()}
    stacked = np.stack(mels) if mels else np.zeros((0, recipe.max_frames, recipe.n_mels), np.float16)
    storage = pa.FixedSizeListArray.from_arrays(pa.array(stacked.reshape(-1)), recipe.max_frames * recipe.n_mels)
    columns["log_mel"] = pa.ExtensionArray.from_storage(schema.field("log_mel").type, storage)
    for i, name in enumerate(("valid_frames", "split", "decoded_share", "duplicate_group")):
        columns[name] = pa.array([values[i] for values in derived], schema.field(name).type)
    return pa.table([columns[name] for name in schema.names], schema=schema), pa.concat_tables(rejected)


def _settle_splits(workspace: Workspace, config: Config, features: str) -> None:
    """Give songs that are connected by a recording one split, which only decoded audio tells, and write the shards that
    this changes.

    Splits depend on the catalogue and the duplicate groups alone, so that a run that was killed here does the same
    again.
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
    _warn_of_majority(groups)
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
        f"preprocess  {np.count_nonzero(changed):,} songs change their split: their recording is under another artist too",
        flush=True,
    )
    write = functools.partial(_write_splits, workspace=workspace, features=features)
    dataset = ray.data.from_items(items, override_num_blocks=min(len(items), 4096)).map_batches(write, batch_size=1)
    for _ in dataset.iter_batches(batch_size=None, prefetch_batches=0):
        pass


def _warn_of_majority(groups: pa.Array) -> None:
    largest = max(pc.value_counts(groups).to_pylist(), key=lambda group: group["counts"])
    if 2 * largest["counts"] > len(groups):
        print(
            f"preprocess  WARNING: {largest['counts']:,} of {len(groups):,} songs are connected by shared artists or recordings "
            f"(group '{largest['values']}') and are all for training; give data.split_column to divide them otherwise",
            flush=True,
        )


def _write_splits(batch: dict[str, Any], *, workspace: Workspace, features: str) -> dict[str, Any]:
    """Replace the split column of a shard; runs in a Ray task."""
    for file, splits in zip(batch["file"].tolist(), batch["splits"], strict=True):
        path = f"{features}/{file}"
        shard = pq.read_table(workspace.full(path), filesystem=workspace.fs)
        place = shard.schema.get_field_index("split")
        workspace.write_table(
            path, shard.set_column(place, shard.schema.field(place), pa.array(list(splits), pa.string()))
        )
    return {"files": batch["file"]}


def _measure(workspace: Workspace, plan: FeaturesPlan, rejected: pa.Table) -> dict[str, Any]:
    """Counts from the files as they were written, whichever run wrote them."""
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
    return [workspace.full(f"{path}/{name}") for name in workspace.children(path) if name.endswith(".parquet")]


def _tidy(workspace: Workspace, path: str) -> None:
    """Remove what killed writers left beside the shards, and shards of which every song was rejected."""
    for fragment in pads.dataset(_shards(workspace, path), filesystem=workspace.fs, format="parquet").get_fragments():
        if not fragment.count_rows():
            workspace.fs.delete_file(fragment.path)
    for info in workspace.fs.get_file_info(pafs.FileSelector(workspace.full(path))):
        if info.base_name.startswith("."):
            workspace.fs.delete_file(info.path)
