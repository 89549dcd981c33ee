"""Read the user's tables in batches: Parquet, CSV, JSON Lines or Arrow IPC, files or folders, local or remote.

CSV cells are read as strings, so the id "007" keeps its zeros; `htcl_ray.catalog.columns` converts them. Every batch of
a file has the same columns, also if rows of JSON Lines lack keys. Large Parquet files are read in several parts, so
that no process holds a whole log.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.config.sections import nearest
from htcl_ray.errors import TableError
from htcl_ray.workspace.filesystem import explain, is_storage_error, open_filesystem, split_options, storage_errors
from htcl_ray.workspace.paths import is_uri, local_path

FORMATS = {
    ".parquet": "parquet",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
}
COMPRESSIONS = (".gz", ".bz2", ".zst")
BATCH_ROWS = 1 << 16
PART_ROWS = 1 << 20
CSV_BLOCK_BYTES = 1 << 24
"""A row must fit in one block, and lyrics are long."""
UNREADABLE_ROW = "(unreadable row)"
"""Extra column of batches with rows that cannot be parsed: the reason, or null for other rows. All other cells of an
unreadable row are null."""


@dataclass(frozen=True)
class TableFile:
    """One file of a table, as a path or URI."""

    path: str
    format: str
    size: int
    """Bytes."""
    modified_ns: int

    @property
    def folder(self) -> str:
        """The base of relative paths in the table."""
        bare, options = split_options(self.path) if is_uri(self.path) else (self.path, "")
        return posixpath.dirname(bare) + options


@dataclass(frozen=True)
class TablePart:
    """A part of a file for one task: row groups of a Parquet file, or a whole file of another format."""

    file: TableFile
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None


def table_files(paths: Sequence[str]) -> list[TableFile]:
    """List the files of tables in a stable order; a folder stands for every table file below it. Raises TableError.

    Below a folder, files and folders whose names begin with "." or "_" are skipped, such as Jupyter's checkpoints,
    Spark's uncommitted output and the log of a Delta table.
    """
    return [file for path in paths for file in _files_of(path)]


def _files_of(path: str) -> list[TableFile]:
    path = local_path(path) or path
    filesystem, inner = open_filesystem(path)
    with storage_errors(path):
        info = filesystem.get_file_info(inner)
        if info.type == pafs.FileType.NotFound:
            raise TableError(f"the table {path} does not exist")
        if info.type != pafs.FileType.Directory:
            return [_table_file(path, info)]
        below = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
    relative = {posixpath.relpath(item.path, inner): item for item in below if item.type == pafs.FileType.File}
    files = [
        _table_file(_join(path, name), item)
        for name, item in sorted(relative.items())
        if _format_of(name) and not _is_hidden(name)
    ]
    if not files:
        raise TableError(f"the folder {path} holds no table; expected files that end in {', '.join(FORMATS)}")
    return files


def _is_hidden(relative: str) -> bool:
    return any(name.startswith((".", "_")) for name in relative.split("/"))


def _table_file(path: str, info: pafs.FileInfo) -> TableFile:
    format = _format_of(path)
    if format is None:
        raise TableError(f"the table {path} has an unknown format; expected a name that ends in {', '.join(FORMATS)}")
    return TableFile(path, format, info.size or 0, info.mtime_ns or 0)


def _format_of(path: str) -> str | None:
    name = path.lower()
    for suffix in COMPRESSIONS:
        name = name.removesuffix(suffix)
    return FORMATS.get(posixpath.splitext(name)[1])


def _join(folder: str, relative: str) -> str:
    if not is_uri(folder):
        return f"{folder.rstrip('/')}/{relative}"
    bare, options = split_options(folder)
    return f"{bare.rstrip('/')}/{relative.replace('%', '%25')}{options}"


def table_parts(files: Sequence[TableFile]) -> list[TablePart]:
    """Split files into parts of about PART_ROWS rows where the format allows it."""
    parts = []
    for file in files:
        if file.format != "parquet":
            parts.append(TablePart(file))
            continue
        with _named_errors(file), _open_parquet(file) as parquet:
            start, groups, count = 0, list[int](), 0
            for group in range(parquet.metadata.num_row_groups):
                groups.append(group)
                count += parquet.metadata.row_group(group).num_rows
                if count >= PART_ROWS or group == parquet.metadata.num_row_groups - 1:
                    parts.append(TablePart(file, start, tuple(groups)))
                    start, groups, count = start + count, [], 0
    return parts


@functools.lru_cache(maxsize=4096)
def column_names(file: TableFile) -> tuple[str, ...]:
    """Return the column names of a file; for JSON Lines, all keys of all rows.

    Raises TableError for a file without columns or with a repeated name.
    """
    with _named_errors(file):
        names = _column_names(file) if file.size else []
    if not names:
        raise TableError(f"the table {file.path} is empty; expected columns and rows")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"the table {file.path} has several columns called '{twice[0]}'; expected each name once")
    return tuple(names)


def _column_names(file: TableFile) -> list[str]:
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            return list(parquet.schema_arrow.names)
    if file.format == "arrow":
        with _open_ipc(file) as reader:
            return list(reader.schema.names)
    if file.format == "csv":
        with _open_stream(file) as stream:
            return _csv_header(stream)
    names: dict[str, None] = {}
    reason = None
    for row in _json_rows(file):
        if isinstance(row, str):
            reason = reason or row
        else:
            names.update(dict.fromkeys(row))
    if reason is not None and not names:
        raise TableError(f"no row of {file.path} can be read: {reason}")
    return list(names)


def read_part(part: TablePart, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Yield the batches of a part, each with the number of its first row in the file. Raises TableError.

    Every batch has the columns of `column_names`, or the selection `columns`, and UNREADABLE_ROW if some of its rows
    cannot be parsed.
    """
    row = part.first_row
    with _named_errors(part.file):
        for table in _read(part, None if columns is None else list(columns)):
            yield row, table
            row += table.num_rows


def rename(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """Copy source columns to the package's names, as `columns` maps names to source names.

    Source columns stay; a column that already has the package's name is replaced.
    """
    for name, source in columns.items():
        if source in table.column_names and name != source:
            data = table[source]
            if name in table.column_names:
                table = table.drop_columns([name])
            table = table.append_column(name, data)
    return table


def renamed(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """Return the column names after `rename`."""
    return list(dict.fromkeys([*names, *(name for name, source in columns.items() if source in names)]))


def check_renames(names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise TableError when `data.columns` names a source column that is not in `names`, the columns of all tables."""
    for name, source in columns.items():
        if source not in names:
            raise TableError(
                f"data.columns.{name} is '{source}', but no table has a column of that name; "
                f"{nearest(source, sorted(set(names)))}"
            )


def _read(part: TablePart, columns: list[str] | None) -> Iterator[pa.Table]:
    if part.file.format == "parquet":
        with _open_parquet(part.file) as parquet:
            groups = list(part.row_groups) if part.row_groups is not None else None
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                yield pa.Table.from_batches([batch])
    elif part.file.format == "arrow":
        yield from _read_ipc(part.file, columns)
    elif part.file.format == "csv":
        yield from _read_csv(part.file, columns)
    else:
        yield from _read_jsonl(part.file, column_names(part.file) if columns is None else columns)


@contextlib.contextmanager
def _open_ipc(file: TableFile) -> Iterator[pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader]:
    """Open an Arrow IPC file or stream."""
    filesystem, inner = open_filesystem(file.path)
    with filesystem.open_input_file(inner) as source:
        is_file = source.read(6) == b"ARROW1"
        source.seek(0)
        with pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source) as reader:
            yield reader


def _read_ipc(file: TableFile, columns: list[str] | None) -> Iterator[pa.Table]:
    with _open_ipc(file) as reader:
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        for batch in (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader:
            table = pa.Table.from_batches([batch])
            table = table if columns is None else table.select(columns)
            for start in range(0, table.num_rows, BATCH_ROWS):
                yield table.slice(start, BATCH_ROWS)


def _open_parquet(file: TableFile) -> pq.ParquetFile:
    filesystem, inner = open_filesystem(file.path)
    return pq.ParquetFile(filesystem.open_input_file(inner), pre_buffer=True)


def _open_stream(file: TableFile) -> pa.NativeFile:
    filesystem, inner = open_filesystem(file.path)
    return filesystem.open_input_stream(inner)  # decompresses by extension


def _open_csv(
    stream: pa.NativeFile, bad: dict[int, str], convert: pacsv.ConvertOptions | None = None
) -> pacsv.CSVStreamingReader:
    """Open a reader that skips rows whose number of cells differs from the header's, and adds row → reason to `bad`."""

    def skip(row: pacsv.InvalidRow) -> str:
        reason = f"the row has {row.actual_columns} cells; expected {row.expected_columns}, as the header has"
        bad[row.number - 2] = reason  # the header is row 1
        return "skip"

    parse = pacsv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip)
    return pacsv.open_csv(stream, pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES), parse, convert)


def _csv_header(stream: pa.NativeFile) -> list[str]:
    with _open_csv(stream, {}) as reader:
        return list(reader.schema.names)


def _read_csv(file: TableFile, columns: list[str] | None) -> Iterator[pa.Table]:
    with _open_stream(file) as stream:
        names = _csv_header(stream)
    convert = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        include_columns=columns,
        strings_can_be_null=True,
        null_values=[""],  # "NA", "null" and "None" are names of songs and artists
        check_utf8=False,  # only cells that are not UTF-8 become null, see `columns`, not their whole row
    )
    bad: dict[int, str] = {}
    with _open_stream(file) as stream, _open_csv(stream, bad, convert) as reader:
        start, table = 0, reader.schema.empty_table()
        for batch in reader:
            table = _with_bad_rows(pa.Table.from_batches([batch]), bad, start)
            start += table.num_rows
            yield table
        if any(row >= start for row in bad):
            yield _with_bad_rows(table.select(reader.schema.names).slice(0, 0), bad, start)


def _with_bad_rows(table: pa.Table, bad: Mapping[int, str], start: int) -> pa.Table:
    """Insert skipped rows as rows of nulls into a table that begins at row `start` of the file."""
    end, inside = start + table.num_rows, list[int]()
    for row in sorted(row for row in bad if row >= start):
        if row <= end:
            inside.append(row)
            end += 1
    if not inside:
        return table
    is_bad = np.isin(np.arange(start, end), inside)
    reasons = [bad.get(row) for row in range(start, end)]
    whole = table.take(pa.array(np.cumsum(~is_bad) - 1, mask=is_bad))
    return whole.append_column(UNREADABLE_ROW, pa.array(reasons, pa.string()))


def _read_jsonl(file: TableFile, names: Sequence[str]) -> Iterator[pa.Table]:
    rows = _json_rows(file)
    while batch := list(itertools.islice(rows, BATCH_ROWS)):
        reasons = [row if isinstance(row, str) else None for row in batch]
        objects = [{} if isinstance(row, str) else row for row in batch]
        columns = {name: _json_column([row.get(name) for row in objects]) for name in names}
        if any(reasons):
            columns[UNREADABLE_ROW] = pa.array(reasons, pa.string())
        yield pa.table(columns)


def _json_rows(file: TableFile) -> Iterator[dict[str, Any] | str]:
    """Yield the object of each line that is not blank, or the reason why a line is not an object."""
    with _open_stream(file) as stream:
        for number, line in enumerate(io.BufferedReader(stream), start=1):
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield (
                row
                if isinstance(row, dict)
                else f"line {number} is not a JSON object; expected one row a line (JSON Lines)"
            )


def _json_column(values: list[Any]) -> pa.Array:
    """Convert values to a flat Arrow type if they share one, else to JSON texts."""
    with contextlib.suppress(pa.ArrowException, OverflowError, UnicodeError):  # mixed types, or a lone surrogate
        array = pa.array(values)
        if not pa.types.is_nested(array.type) or (
            pa.types.is_list(array.type) and not pa.types.is_nested(array.type.value_type)
        ):
            return array
    cells = [None if value is None else _json_text(value) for value in values]
    return pa.ExtensionArray.from_storage(pa.json_(), pa.array(cells, pa.string()))


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value)
    except RecursionError:
        return "{}"  # as unreadable as any object


@contextlib.contextmanager
def _named_errors(file: TableFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_storage_error(error):
            raise explain(error, file.path) from error
        reason = str(error).splitlines()[0][:200]
        raise TableError(f"the table {file.path} cannot be read as {file.format}: {reason}") from None
