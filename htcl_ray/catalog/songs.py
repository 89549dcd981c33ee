"""Read and check catalogue tables: one table of songs, and the rejected rows with their reasons."""

from __future__ import annotations

import hashlib
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import as_ids, as_lists, as_strings, as_years, example, unreadable
from htcl_ray.catalog.given_vectors import VECTOR, as_vectors, read_vectors, with_vectors
from htcl_ray.catalog.quarantine import NullCells, rejected_rows
from htcl_ray.catalog.tables import (
    UNREADABLE_ROW,
    TableFile,
    column_names,
    read_part,
    rename,
    renamed,
    table_files,
    table_parts,
)
from htcl_ray.config.sections import DataSettings, nearest
from htcl_ray.errors import TableError
from htcl_ray.schemas import CATALOG_COLUMNS, LIST_METADATA, METADATA, QUARANTINE, TEXT_METADATA, Reason, Split
from htcl_ray.workspace.filesystem import split_options
from htcl_ray.workspace.paths import is_uri

SONGS = pa.schema(
    [
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("audio_path", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("split", pa.string()),
        *METADATA,
        pa.field("source", pa.string(), nullable=False),
        pa.field("row", pa.int64(), nullable=False),
    ]
)
"""`audio_path` is absolute or a URI, and null only where songs have given vectors; `split` is null unless the catalogue
has a split column; `source` and `row` locate the song in its table."""
SONGS_WITH_VECTORS = SONGS.append(pa.field("vector", VECTOR))
"""Songs with given vectors: lists of any length, or null, until `check_vectors`."""


@dataclass(frozen=True)
class Catalog:
    """A catalogue with checked rows; its audio files have not been opened yet."""

    songs: pa.Table
    """Schema SONGS, or with given vectors SONGS_WITH_VECTORS, sorted by song_id."""
    rejected: pa.Table
    """Schema QUARANTINE."""
    rows: int
    """Number of rows of the tables, including rejected ones."""
    null_cells: NullCells
    """Optional cells that could not be read and became null."""


def read_catalog(settings: DataSettings, *, given_vectors: bool = False) -> Catalog:
    """Read and check the tables of `data.catalog`.

    Rows are rejected when they cannot be parsed, have no song id, no audio path or an unknown value in the split
    column, or have no text, because such a song can be neither trained on nor retrieved by text. With `given_vectors`
    songs need no audio path; their vectors are those of the column `vector` or of the tables `data.vectors`. Raises
    TableError for tables that are missing or empty, lack the song_id, the audio_path (the vectors) or every text
    column, or repeat a song_id.
    """
    source = "vector" if given_vectors else "audio_path"
    if not settings.catalog:
        raise TableError(
            "no catalogue is given; set data.catalog to a Parquet, CSV, JSON Lines or Arrow table with song_id and "
            f"{source}"
        )
    files = table_files(settings.catalog)
    in_tables = given_vectors and bool(settings.vectors)
    for file in files:
        _check_columns(file, settings, ("song_id",) if in_tables else ("song_id", source))
    schema = SONGS_WITH_VECTORS if given_vectors else SONGS
    accepted, rejected, rows, null_cells = [schema.empty_table()], [QUARANTINE.empty_table()], 0, NullCells()
    for part in table_parts(files):
        for first_row, table in read_part(part):
            good, bad = _check_rows(rename(table, settings.columns), part.file, first_row, settings, null_cells, schema)
            accepted.append(good)
            rejected += bad
            rows += table.num_rows
    if not rows:
        raise TableError(f"the catalogue {', '.join(settings.catalog)} is empty; expected at least one song")
    songs = pa.concat_tables(accepted).combine_chunks()
    _check_unique(songs)
    if in_tables:
        songs = with_vectors(songs, *read_vectors(settings.vectors, settings.columns))
    return Catalog(songs.sort_by("song_id"), pa.concat_tables(rejected).combine_chunks(), rows, null_cells)


def _check_columns(file: TableFile, settings: DataSettings, needed_columns: Sequence[str]) -> None:
    names = renamed(column_names(file), settings.columns)
    for needed in needed_columns:
        if needed not in names:
            elsewhere = ", or give tables of song_id and vector as data.vectors" if needed == "vector" else ""
            raise TableError(
                f"the catalogue {file.path} has no column '{needed}' (it has {', '.join(names)}); "
                f"if it is called otherwise, set data.columns.{needed}=<its name>{elsewhere}"
            )
    for name in settings.text_columns:
        if name not in names and name not in CATALOG_COLUMNS:
            raise TableError(
                f"data.text_columns names '{name}', but the catalogue {file.path} has no such column; "
                f"{nearest(name, names)}"
            )
    if not set(settings.text_columns) & set(names):
        raise TableError(
            f"the catalogue {file.path} has none of the text columns ({', '.join(settings.text_columns)}); "
            "set data.text_columns to the columns that describe a song"
        )
    if settings.split_column is not None and settings.split_column not in names:
        raise TableError(
            f"data.split_column is '{settings.split_column}', but the catalogue {file.path} has no such column; "
            f"{nearest(settings.split_column, names)}"
        )


def _check_rows(
    table: pa.Table, file: TableFile, first_row: int, settings: DataSettings, null_cells: NullCells, schema: pa.Schema
) -> tuple[pa.Table, list[pa.Table]]:
    """Split one batch into songs and rejected rows."""
    count, given_vectors = table.num_rows, "vector" in schema.names
    columns: dict[str, pa.Array] = {"song_id": as_ids(table["song_id"])}
    has_path, has_vector = "audio_path" in table.column_names, "vector" in table.column_names
    columns["audio_path"] = as_strings(table["audio_path"]) if has_path else pa.nulls(count, pa.string())
    if given_vectors:
        columns["vector"] = as_vectors(table["vector"]) if has_vector else pa.nulls(count, VECTOR)
    columns["text"] = _texts(table, settings.text_columns)
    columns["split"] = (
        as_strings(table[settings.split_column]) if settings.split_column else pa.nulls(table.num_rows, pa.string())
    )
    for field in METADATA:
        columns[field.name] = (
            _metadata(table, field.name) if field.name in table.column_names else pa.nulls(table.num_rows, field.type)
        )
    for name in dict.fromkeys([*METADATA.names, *settings.text_columns]):
        if name in table.column_names:
            null_cells.add(
                name, table[name], columns[name] if name in columns else as_strings(table[name]), file.path, first_row
            )
    columns["source"] = pa.array([file.path] * table.num_rows, pa.string())
    columns["row"] = pa.array(range(first_row, first_row + table.num_rows), pa.int64())

    unparsed = table[UNREADABLE_ROW] if UNREADABLE_ROW in table.column_names else pa.nulls(table.num_rows, pa.string())
    checked = pa.table({**{name: columns[name] for name in _CHECKED}, UNREADABLE_ROW: unparsed}).to_pylist()
    reasons = [_why_rejected(cells, settings, given_vectors) for cells in checked]
    for name, missing in _REQUIRED.items():
        if name not in table.column_names:
            continue
        for row in np.flatnonzero(unreadable(table[name], columns[name])):
            if (reasons[row] or (None,))[0] is missing:
                reasons[row] = missing, f"{name} cannot be read as text: {example(table[name], int(row))}"
    bad = [
        rejected_rows([columns["song_id"][i].as_py()], [first_row + i], file.path, *reason)
        for i, reason in enumerate(reasons)
        if reason
    ]
    columns["audio_path"] = pa.array(
        [_resolve(path, file.folder) for path in columns["audio_path"].to_pylist()], pa.string()
    )
    keep = pa.array([reason is None for reason in reasons], pa.bool_())
    return pa.table([columns[name] for name in schema.names], names=schema.names).filter(keep).cast(schema), bad


_CHECKED = ("song_id", "audio_path", "text", "split")
_REQUIRED = {"song_id": Reason.MISSING_SONG_ID, "audio_path": Reason.MISSING_AUDIO_PATH}


def _why_rejected(cells: Mapping[str, Any], settings: DataSettings, given_vectors: bool) -> tuple[Reason, str] | None:
    if cells[UNREADABLE_ROW] is not None:
        return Reason.UNREADABLE_ROW, cells[UNREADABLE_ROW]
    if cells["song_id"] is None:
        return Reason.MISSING_SONG_ID, "the row has no song_id"
    if cells["audio_path"] is None and not given_vectors:
        return Reason.MISSING_AUDIO_PATH, "the row has no audio_path"
    if settings.split_column and cells["split"] not in set(Split):
        return Reason.UNKNOWN_SPLIT, f"{settings.split_column} is {cells['split']!r}; expected {', '.join(Split)}"
    if not cells["text"]:
        return Reason.MISSING_TEXT, f"every text column is empty ({', '.join(settings.text_columns)})"
    return None


def _texts(table: pa.Table, names: Sequence[str]) -> pa.Array:
    present = [name for name in names if name in table.column_names]
    cells = [
        (_metadata(table, name) if name in METADATA.names else as_strings(table[name])).to_pylist() for name in present
    ]
    return pa.array([song_text(values) for values in zip(*cells, strict=True)], pa.string())


def _metadata(table: pa.Table, name: str) -> pa.Array:
    if name in LIST_METADATA:
        return as_lists(table[name])
    return as_strings(table[name]) if name in TEXT_METADATA else as_years(table[name])


def _resolve(path: str | None, folder: str) -> str | None:
    """Resolve an audio path that may be relative to its table's folder to an absolute path or URI."""
    if path is None or is_uri(path):
        return path
    if is_uri(folder) and not path.startswith("/"):
        bare, options = split_options(folder)
        scheme, _, rest = bare.partition("://")
        escaped = path.replace("%", "%25")  # a path, to be part of a URI
        return f"{scheme}://{posixpath.normpath(f'{rest}/{escaped}')}{options}"
    return os.path.abspath(os.path.join(os.path.expanduser(folder), path))


def _check_unique(songs: pa.Table) -> None:
    counts = pc.value_counts(songs["song_id"])
    several = counts.filter(pc.greater(counts.field("counts"), 1))
    if not len(several):
        return
    example = several[0].as_py()["values"]
    places = songs.filter(pc.equal(songs["song_id"], example)).select(["row", "source"]).slice(0, 2).to_pylist()
    where = " and ".join(f"row {place['row']} of {place['source']}" for place in places)
    raise TableError(
        f"{len(several):,} song ids of the catalogue occur more than once, for instance '{example}' in {where} "
        "(rows count from 0); expected one row for each song_id"
    )


COLUMN_SEPARATOR = "; "
"""Between the columns of a song's text."""


def song_text(values: Sequence[Any]) -> str:
    """Join the values of a song's text columns, in their order, to one line; empty without any value.

    Columns are separated by "; ", the values of a list column by ", ". Runs of white space become one space.
    """
    cells = (
        ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
        for value in values
        if value is not None
    )
    return COLUMN_SEPARATOR.join(text for text in (" ".join(cell.split()) for cell in cells) if text)


def vector_group(vector: npt.NDArray[np.float32]) -> str:
    """Hash a given vector: 16 hex digits that are equal for equal vectors, as duplicates of a recording have."""
    return hashlib.blake2b(vector.astype("<f4").tobytes(), digest_size=8).hexdigest()


def duplicate_group(waveform: npt.NDArray[np.float32]) -> str:
    """Hash the decoded, clipped and resampled audio at 16 bits: 16 hex digits that are equal for duplicate recordings.

    Copies of a file and lossless encodings of one recording share a group; another lossy encoding has its own. The hash
    needs one song at a time, no pass over the catalogue.
    """
    samples = np.rint(np.clip(waveform, -1, 1) * 32767).astype("<i2")
    return hashlib.blake2b(samples.tobytes(), digest_size=8).hexdigest()
