"""Reading the user's tables: Parquet, CSV or JSON Lines, one file or a folder of them, from a disk or object storage.

Nothing here guesses types: CSV cells arrive as strings, so the id "007" stays one, and what a column means is decided in `columns`.
Tables are read a batch at a time, and a large Parquet file in several parts, so that no process needs to hold a log.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from htcl_ray.errors import TableError
from htcl_ray.settings import nearest
from htcl_ray.storage import explain, is_storage_error, is_uri, local_path, open_filesystem, split_options, storage_errors

FORMATS = {".parquet": "parquet", ".csv": "csv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
COMPRESSIONS = (".gz", ".bz2", ".zst")
BATCH_ROWS = 1 << 16
PART_ROWS = 1 << 20
CSV_BLOCK_BYTES = 1 << 24
"""A row must fit in one block; lyrics are long."""


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
        """What relative paths in the table are relative to."""
        bare, options = split_options(self.path) if is_uri(self.path) else (self.path, "")
        return posixpath.dirname(bare) + options


@dataclass(frozen=True)
class TablePart:
    """A piece of a file that one task reads: some row groups of a Parquet file, or a whole file of another format."""

    file: TableFile
    first_row: int = 0
    row_groups: tuple[int, ...] | None = None


def table_files(paths: Sequence[str]) -> list[TableFile]:
    """The files of tables, in a stable order; a folder stands for every table file below it. Raises TableError."""
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
    named = {_join(path, posixpath.relpath(item.path, inner)): item for item in below if item.type == pafs.FileType.File}
    files = [_table_file(name, item) for name, item in sorted(named.items()) if _format_of(name) and item.base_name[0] not in "._"]
    if not files:
        raise TableError(f"the folder {path} holds no table; expected files that end in {', '.join(FORMATS)}")
    return files


def _table_file(path: str, info: pafs.FileInfo) -> TableFile:
    found = _format_of(path)
    if found is None:
        raise TableError(f"the table {path} has an unknown format; expected a name that ends in {', '.join(FORMATS)}")
    return TableFile(path, found, info.size or 0, info.mtime_ns or 0)


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


def column_names(file: TableFile) -> list[str]:
    """Column names of a file; of JSON Lines, the keys of its first rows. Raises TableError when it has none, or one twice."""
    with _named_errors(file):
        names = _column_names(file) if file.size else []
    if not names:
        raise TableError(f"the table {file.path} is empty; expected columns and rows")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise TableError(f"the table {file.path} has several columns called '{twice[0]}'; expected each name once")
    return names


def _column_names(file: TableFile) -> list[str]:
    if file.format == "parquet":
        with _open_parquet(file) as parquet:
            return list(parquet.schema_arrow.names)
    if file.format == "csv":
        with _open_stream(file) as stream:
            return _csv_header(stream)
    first = next(_read_jsonl(file), None)
    return [] if first is None else list(first.column_names)


def read_part(part: TablePart, columns: Sequence[str] | None = None) -> Iterator[tuple[int, pa.Table]]:
    """Batches of a part, each with the number of its first row in the file; `columns` limits what is read. Raises TableError."""
    row = part.first_row
    with _named_errors(part.file):
        for table in _read(part, None if columns is None else list(columns)):
            yield row, table
            row += table.num_rows


def rename(table: pa.Table, columns: Mapping[str, str]) -> pa.Table:
    """Give columns our names: `columns` maps ours to theirs. Theirs stay too, and a column that already had our name gives way."""
    for ours, theirs in columns.items():
        if theirs in table.column_names and ours != theirs:
            data = table[theirs]
            if ours in table.column_names:
                table = table.drop_columns([ours])
            table = table.append_column(ours, data)
    return table


def renamed(names: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    """The column names that `rename` leads to."""
    return list(dict.fromkeys([*names, *(ours for ours, theirs in columns.items() if theirs in names)]))


def check_renames(names: Sequence[str], columns: Mapping[str, str]) -> None:
    """Raise TableError when `data.columns` points to a column that none of the tables has; `names` are those of all tables."""
    for ours, theirs in columns.items():
        if theirs not in names:
            raise TableError(
                f"data.columns.{ours} is '{theirs}', but no table has a column of that name; {nearest(theirs, sorted(set(names)))}"
            )


def _read(part: TablePart, columns: list[str] | None) -> Iterator[pa.Table]:
    if part.file.format == "parquet":
        with _open_parquet(part.file) as parquet:
            groups = list(part.row_groups) if part.row_groups is not None else None
            for batch in parquet.iter_batches(BATCH_ROWS, row_groups=groups, columns=columns):
                yield pa.Table.from_batches([batch])
    elif part.file.format == "csv":
        yield from _read_csv(part.file, columns)
    else:
        for table in _read_jsonl(part.file):
            yield table if columns is None else table.select([name for name in columns if name in table.column_names])


def _open_parquet(file: TableFile) -> pq.ParquetFile:
    filesystem, inner = open_filesystem(file.path)
    return pq.ParquetFile(filesystem.open_input_file(inner), pre_buffer=True)


def _open_stream(file: TableFile) -> pa.NativeFile:
    filesystem, inner = open_filesystem(file.path)
    return filesystem.open_input_stream(inner)  # decompresses by the name


_CSV_PARSE = pacsv.ParseOptions(newlines_in_values=True)


def _csv_header(stream: pa.NativeFile) -> list[str]:
    with pacsv.open_csv(stream, pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES), _CSV_PARSE) as reader:
        return list(reader.schema.names)


def _read_csv(file: TableFile, columns: list[str] | None) -> Iterator[pa.Table]:
    with _open_stream(file) as stream:
        names = _csv_header(stream)
    convert = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in names},
        include_columns=columns,
        strings_can_be_null=True,
        null_values=[""],  # "NA", "null" and "None" are names of songs and artists
    )
    with (
        _open_stream(file) as stream,
        pacsv.open_csv(stream, pacsv.ReadOptions(block_size=CSV_BLOCK_BYTES), _CSV_PARSE, convert) as reader,
    ):
        for batch in reader:
            yield pa.Table.from_batches([batch])


def _read_jsonl(file: TableFile) -> Iterator[pa.Table]:
    with _open_stream(file) as stream:
        lines = enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), start=1)
        objects = (_json_object(file, number, line) for number, line in lines if line.strip())
        while rows := list(itertools.islice(objects, BATCH_ROWS)):
            names = list(dict.fromkeys(name for row in rows for name in row))
            yield pa.table({name: _json_column([row.get(name) for row in rows]) for name in names})


def _json_object(file: TableFile, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise TableError(f"line {number} of {file.path} is not a JSON object; expected one row a line (JSON Lines)")
    return row


def _json_column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):  # strings among numbers, lists among strings
        return pa.array([None if v is None else "; ".join(map(str, v)) if isinstance(v, list) else str(v) for v in values], pa.string())


@contextlib.contextmanager
def _named_errors(file: TableFile) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if is_storage_error(error):
            raise explain(error, file.path) from error
        reason = str(error).splitlines()[0][:200]
        raise TableError(f"the table {file.path} cannot be read as {file.format}: {reason}") from None
