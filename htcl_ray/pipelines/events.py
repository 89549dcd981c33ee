"""Interaction logs → events. Files are read in parts that fit in memory, and Ray tasks convert the parts."""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import as_epoch_seconds, as_ids
from htcl_ray.catalog.quarantine import check_share, describe
from htcl_ray.catalog.tables import (
    TableFile,
    TablePart,
    check_renames,
    column_names,
    read_part,
    rename,
    renamed,
    table_files,
    table_parts,
)
from htcl_ray.cluster import connection
from htcl_ray.config import Config
from htcl_ray.errors import TableError
from htcl_ray.interactions.log_summary import LogSummary
from htcl_ray.interactions.logs import COLUMNS, OPTIONAL_COLUMNS, TIMED, LogShape, complete, detect_shape, normalise
from htcl_ray.interactions.splits import period_ends, thin_out
from htcl_ray.progress import Progress
from htcl_ray.schemas import EVENTS, FORMAT_VERSION, QUARANTINE
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

EVENTS_PER_FILE = 1 << 20
TIMES_PER_BATCH = 2_000
"""Timestamps kept of a batch of log rows to find the ends of the periods; exact for batches of at most as many rows."""


@dataclass(frozen=True)
class LogPart:
    """A part of a log file, with its shape and columns."""

    log: str
    """Path in `data.interactions`."""
    part: TablePart
    shape: LogShape
    columns: tuple[str, ...]
    """Columns to read, by their names in the file."""
    names: tuple[str, ...]
    """All columns of the file, renamed by `data.columns`."""


@dataclass(frozen=True)
class LogPlan:
    """Inputs and settings that determine events and pairs, known before Ray starts."""

    events_version: str
    pairs_version: str
    log: str
    """Fingerprint of the log files."""
    files: tuple[tuple[str, TableFile], ...]
    """Path in `data.interactions`, and file."""
    columns: Mapping[str, str]
    """`data.columns`: column of the schema → column in the files."""

    @functools.cached_property
    def parts(self) -> tuple[LogPart, ...]:
        """Parts of the files, with their shapes. Recognising the shape of JSON Lines reads every row.

        Raises TableError.
        """
        parts = []
        for path, file in self.files:
            names = column_names(file)
            new_names = tuple(renamed(names, self.columns))
            shape = detect_shape(new_names, file.path)
            columns = []
            for column in (*COLUMNS[shape], *OPTIONAL_COLUMNS[shape]):
                in_file = self.columns.get(column, column)
                columns += [in_file] if in_file in names else [column] if column in names else []
            parts += [LogPart(path, part, shape, tuple(columns), new_names) for part in table_parts([file])]
        return tuple(parts)


def plan_log(config: Config, features_version: str) -> LogPlan:
    """List the log files and compute the versions of events and pairs, without opening files. Raises TableError."""
    files = tuple((path, file) for path in config.data.interactions for file in table_files([path]))
    log = fingerprint([(canonical(file.path), file.size, file.modified_ns) for _, file in files])
    data = config.data.model_dump(mode="json", include={"columns", "split_shares", "held_out_user_share"})
    meaning = {
        "positive_feedback",
        "negative_feedback",
        "min_positive_rating",
        "max_negative_rating",
        "min_played_ratio",
    }
    events = fingerprint(
        FORMAT_VERSION, features_version, log, data, config.pairs.model_dump(mode="json", include=meaning)
    )
    return LogPlan(events, fingerprint(events, config.pairs.model_dump(mode="json")), log, files, config.data.columns)


def check_log(config: Config, plan: LogPlan, song_ids: pa.Array) -> None:
    """Print the shape and a summary of each log.

    `song_ids`: of the catalogue. Raises TableError for implausible values, and when no song of the log is known.
    """
    if not plan.parts:
        raise TableError(f"the log {', '.join(config.data.interactions)} is empty; expected at least one row")
    any_known, example = False, None
    summaries: dict[tuple[str, LogShape], LogSummary] = {}
    scanned = ("song_id", "timestamp", "feedback", "rating", "weight")
    for part in plan.parts:
        summary = summaries.setdefault((part.log, part.shape), LogSummary(part.log, part.shape))
        summary.add_names(part.names)
        wanted = [name for name in part.columns if name in (*scanned, *_names_in_files(config, *scanned))]
        for _, table in read_part(part.part, wanted):
            table = rename(table, config.data.columns)
            if not any_known:
                songs = as_ids(table["song_id"])
                any_known = bool(pc.any(pc.is_in(songs, value_set=song_ids)).as_py())
                example = example or next((song for song in songs.slice(0, 100).to_pylist() if song), None)
            summary.add(table, config.pairs)
    for summary in summaries.values():
        print("".join(f"preprocess  {line}\n" for line in summary.lines(config.pairs)), end="", flush=True)
    named = ", ".join(config.data.interactions)
    if not any(summary.rows for summary in summaries.values()):
        raise TableError(f"the log {named} is empty; expected at least one row")
    if not any_known:
        raise TableError(
            f"the log {named} names no song of the catalogue (it has song_id '{example}', the catalogue "
            f"'{song_ids[0].as_py()}'); expected the same ids in both"
        )
    for summary in summaries.values():
        summary.check(config.pairs, config.data.max_rejected_share)


def _names_in_files(config: Config, *columns: str) -> list[str]:
    """Names of these columns in the user's files."""
    return [config.data.columns.get(name, name) for name in columns]


def check_all_renames(config: Config) -> None:
    """Check that the catalogue or the log has every column of `data.columns`. Raises TableError."""
    wanted, names = {*config.data.columns.values()}, set[str]()
    for file in table_files([*config.data.catalog, *config.data.interactions]) if wanted else []:
        names.update(column_names(file))
        if wanted <= names:
            return
    check_renames(sorted(names), config.data.columns)


def make_events(workspace: Workspace, config: Config, plan: LogPlan, features_version: str) -> None:
    """Write accepted log rows as events and rejected rows to the quarantine. Raises InputError for too many of them."""
    events, quarantine = f"events/{plan.events_version}", f"quarantine/{plan.events_version}"
    connection.connect(config)
    import ray

    workspace.remove(events)
    workspace.remove(quarantine)
    ends = _period_ends(config, plan)
    songs = ray.put(read_songs(workspace, features_version))
    write = functools.partial(_write_events, plan=plan, ends=ends, songs=songs, workspace=workspace, config=config)
    counts: Counter[str] = Counter()
    examples: dict[str, str] = {}
    with Progress("preprocess", len(plan.parts), "parts of the log") as progress:
        for batch in _run_parts(plan, write):
            for text in batch["counts"].tolist():
                counts.update(json.loads(text))
            for text in batch["examples"].tolist():
                examples = {**json.loads(text), **examples}
            progress.advance(len(batch["counts"]))
    rows, accepted = counts.pop("rows"), counts.pop("accepted", 0)
    rejected = dict(counts.most_common())
    print(f"preprocess  {rows:,} log rows: {accepted:,} accepted, {describe(rejected)}", flush=True)
    for reason in rejected:
        print(f"preprocess  {reason}, for instance {examples[reason]}", flush=True)
    check_share("log", rejected, rows, config.data.max_rejected_share, workspace.uri_of(quarantine))
    tree, inputs = config.model_dump(mode="json"), {"features": features_version, "log": plan.log}
    if rejected:
        workspace.finish(
            quarantine, build_manifest("quarantine", config=tree, inputs=inputs, quality={"rejected": rejected})
        )
    quality = {
        "events": accepted,
        "rejected": rejected,
        "period_ends": [end if math.isfinite(end) else None for end in ends],
    }
    workspace.finish(events, build_manifest("events", config=tree, inputs=inputs, quality=quality))


def read_songs(workspace: Workspace, features_version: str) -> pa.Table:
    """Columns song_id and split of every song with features."""
    return workspace.read_tables(f"features/{features_version}", columns=["song_id", "split"]).combine_chunks()


def _run_parts(plan: LogPlan, task: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    """Run a Ray task on the number of each part of the log; iterates over the results as they arrive."""
    import ray.data

    numbers = [{"part": number} for number in range(len(plan.parts))]
    dataset = ray.data.from_items(numbers, override_num_blocks=min(len(numbers), 4096)).map_batches(task, batch_size=1)
    return iter(dataset.iter_batches(batch_size=None, prefetch_batches=0))


def _period_ends(config: Config, plan: LogPlan) -> tuple[float, float]:
    """Ends of the training and validation periods, in epoch seconds; infinite for a log without times."""
    seconds, events = [np.zeros(0)], [np.zeros(0)]
    if any(part.shape in TIMED for part in plan.parts):
        for batch in _run_parts(plan, functools.partial(_read_times, plan=plan, config=config)):
            seconds.append(batch["seconds"])
            events.append(batch["events"])
    return period_ends(np.concatenate(seconds), np.concatenate(events), config.data.split_shares)


def _read_times(batch: dict[str, Any], *, plan: LogPlan, config: Config) -> dict[str, npt.NDArray[np.float64]]:
    """Sample of the timestamps of parts of the log, with the number of events of each. Runs in a Ray task."""
    seconds, events = [np.zeros(0)], [np.zeros(0)]
    for number in batch["part"].tolist():
        part = plan.parts[number]
        if part.shape not in TIMED:
            continue
        wanted = [name for name in part.columns if name in ("timestamp", *_names_in_files(config, "timestamp"))]
        for _, table in read_part(part.part, wanted):
            times, weights = thin_out(
                as_epoch_seconds(rename(table, config.data.columns)["timestamp"]), TIMES_PER_BATCH
            )
            seconds.append(times)
            events.append(weights)
    return {"seconds": np.concatenate(seconds), "events": np.concatenate(events)}


def _write_events(
    batch: dict[str, Any], *, plan: LogPlan, ends: tuple[float, float], songs: Any, workspace: Workspace, config: Config
) -> dict[str, Any]:
    """Write the event and quarantine files of parts of the log. Runs in a Ray task.

    Returns the counts and an example of each reason for rejection, as JSON.
    """
    import ray

    song_ids = ray.get(songs)["song_id"].combine_chunks()
    counts, examples = [], []
    for number in batch["part"].tolist():
        part, counted, first = plan.parts[number], Counter[str](), dict[str, str]()
        events, rejected = (
            _Files(workspace, f"events/{plan.events_version}", number, EVENTS),
            _Files(workspace, f"quarantine/{plan.events_version}", number, QUARANTINE),
        )
        for first_row, table in read_part(part.part, part.columns):
            table = rename(table, config.data.columns)
            good, bad = normalise(table, part.shape, song_ids, config.pairs, part.part.file.path, first_row)
            events.add(complete(good, ends, config.data.held_out_user_share))
            rejected.add(bad)
            counted.update({"rows": table.num_rows, "accepted": good.num_rows})
            counted.update(bad["reason"].to_pylist())
            for reason in set(bad["reason"].unique().to_pylist()) - {*first}:
                row = bad.slice(pc.index(bad["reason"], reason).as_py(), 1).to_pylist()[0]
                first[reason] = f"row {row['row']} of {row['source']}: {row['detail']}"
        events.flush()
        rejected.flush()
        counts.append(json.dumps(counted))
        examples.append(json.dumps(first))
    return {"counts": np.array(counts), "examples": np.array(examples)}


class _Files:
    """Collects the rows of one part and writes files of at least `EVENTS_PER_FILE` rows."""

    def __init__(self, workspace: Workspace, folder: str, part: int, schema: pa.Schema) -> None:
        self.workspace, self.folder, self.part, self.schema = workspace, folder, part, schema
        self.collected: list[pa.Table] = []
        self.num_written = 0

    def add(self, table: pa.Table) -> None:
        """Add rows, and write a file when enough are collected."""
        self.collected.append(table)
        if sum(rows.num_rows for rows in self.collected) >= EVENTS_PER_FILE:
            self.flush()

    def flush(self) -> None:
        """Write the collected rows, if any."""
        table = pa.concat_tables(self.collected) if self.collected else self.schema.empty_table()
        self.collected = []
        if table.num_rows:
            self.workspace.write_table(f"{self.folder}/part-{self.part:05d}-{self.num_written:05d}.parquet", table)
            self.num_written += 1
