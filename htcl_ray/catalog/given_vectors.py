"""Given vectors of songs: read from a column of the catalogue or from tables of their own, and checked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import as_ids, as_strings, one_array
from htcl_ray.catalog.quarantine import rejected_rows
from htcl_ray.catalog.tables import column_names, read_part, rename, renamed, table_files, table_parts
from htcl_ray.errors import TableError
from htcl_ray.schemas import QUARANTINE, Reason

VECTOR = pa.list_(pa.float32())
LARGEST = float(np.finfo(np.float16).max)
"""Largest number of a vector: features are stored as float16."""
SMALLEST = 1e-3
"""Least largest number of all vectors; far smaller ones would lose their digits as float16."""


def as_vectors(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert lists of numbers of any type, or texts of JSON lists, to lists of float32; null for unreadable cells.

    A null inside a list becomes NaN, and so does a number beyond float32.
    """
    array = one_array(column)
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = kind.value_type
        if pa.types.is_integer(inner) or pa.types.is_floating(inner) or pa.types.is_decimal(inner):
            lengths = pc.list_value_length(array)
            values = pc.list_flatten(array).cast(pa.float32(), safe=False).fill_null(np.nan)
            ends = pc.cumulative_sum(lengths.fill_null(0).cast(pa.int32()))
            offsets = pa.concat_arrays([pa.array([0], pa.int32()), ends])
            return pa.ListArray.from_arrays(offsets, values, type=VECTOR, mask=pc.is_null(array))
        return pa.nulls(len(array), VECTOR)
    return pa.array([_from_json(text) for text in as_strings(array).to_pylist()], VECTOR)


def _from_json(text: str | None) -> list[float] | None:
    try:
        cells = json.loads(text or "")
        return [float(cell) for cell in cells] if isinstance(cells, list) else None
    except (ValueError, TypeError, RecursionError):
        return None


def read_vectors(paths: Sequence[str], columns: Mapping[str, str]) -> tuple[pa.Array, pa.Array]:
    """Song ids and vectors of the tables `data.vectors`; see `as_vectors`. Rows without a song id are left out.

    Raises TableError for a table without both columns, and for a song id that occurs twice.
    """
    files = table_files(paths)
    for file in files:
        names = renamed(column_names(file), columns)
        for needed in ("song_id", "vector"):
            if needed not in names:
                raise TableError(
                    f"the vectors {file.path} have no column '{needed}' (they have {', '.join(names)}); "
                    f"if it is called otherwise, set data.columns.{needed}=<its name>"
                )
    ids, vectors = [pa.array([], pa.string())], [pa.array([], VECTOR)]
    for part in table_parts(files):
        for _, table in read_part(part):
            table = rename(table, columns)
            ids.append(as_ids(table["song_id"]))
            vectors.append(as_vectors(table["vector"]))
    song_ids, rows = pa.concat_arrays(ids), pa.concat_arrays(vectors)
    known = pc.is_valid(song_ids)
    song_ids, rows = song_ids.filter(known), rows.filter(known)
    counts = pc.value_counts(song_ids)
    several = counts.filter(pc.greater(counts.field("counts"), 1))
    if len(several):
        example = several[0].as_py()["values"]
        raise TableError(
            f"{len(several):,} song ids of {', '.join(paths)} occur more than once, for instance '{example}'; expected "
            "one vector for each song"
        )
    return song_ids, rows


def with_vectors(songs: pa.Table, song_ids: pa.Array, vectors: pa.Array) -> pa.Table:
    """Songs with the column `vector` of their ids; null for a song without a vector."""
    column = vectors.take(pc.index_in(songs["song_id"].combine_chunks(), value_set=song_ids))
    return songs.set_column(songs.schema.get_field_index("vector"), pa.field("vector", VECTOR), column)


def check_vectors(songs: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Songs with usable vectors, `vector` as lists of one fixed size, and rows of QUARANTINE for the others.

    The width is that of most vectors. Raises TableError when all vectors are so small that float16 cannot hold them.
    """
    vectors = songs["vector"].combine_chunks()
    lengths = pc.list_value_length(vectors)
    counts = pc.value_counts(lengths.drop_null())
    width = max(counts.to_pylist(), key=lambda item: item["counts"])["values"] if len(counts) else 0
    missing = np.asarray(pc.is_null(vectors))
    wrong = np.asarray(pc.not_equal(lengths, width).fill_null(False)) | (~missing & (width == 0))
    fitting = np.flatnonzero(~missing & ~wrong)
    values = _matrix(vectors.take(pa.array(fitting)), width)
    finite = (np.abs(values) <= LARGEST).all(axis=1)
    good = fitting[finite]
    largest = float(np.abs(values[finite]).max(initial=0))
    if len(good) and largest < SMALLEST:
        raise TableError(
            f"the largest number of all vectors is {largest:g}, too small to be stored with 11 significant bits; "
            "multiply all vectors by the same factor"
        )
    where = {
        Reason.MISSING_VECTOR: (missing, "the song has no vector, or it is no list of numbers"),
        Reason.WRONG_VECTOR_WIDTH: (wrong, f"the vector has another width; expected {width} numbers, as most have"),
    }
    rejected = [_rejected(songs.filter(pa.array(mask)), reason, why) for reason, (mask, why) in where.items()]
    damaged = songs.take(pa.array(fitting[~finite]))
    rejected.append(_rejected(damaged, Reason.NOT_FINITE, f"the vector holds NaN, or numbers beyond ±{LARGEST:,.0f}"))
    kept = songs.take(pa.array(good))
    fixed = pa.FixedSizeListArray.from_arrays(pa.array(values[finite].reshape(-1)), max(width, 1))
    field = kept.schema.get_field_index("vector")
    return kept.set_column(field, pa.field("vector", fixed.type), fixed), pa.concat_tables(rejected)


def _matrix(vectors: pa.Array, width: int) -> npt.NDArray[np.float32]:
    flat: npt.NDArray[np.float32] = vectors.flatten().to_numpy(zero_copy_only=False)
    return flat.reshape(-1, width) if width else np.empty((0, 0), np.float32)


def _rejected(songs: pa.Table, reason: Reason, detail: str) -> pa.Table:
    parts = [
        rejected_rows(part["song_id"].to_pylist(), part["row"].to_pylist(), source, reason, detail)
        for source in pc.unique(songs["source"]).to_pylist()
        for part in [songs.filter(pc.equal(songs["source"], source))]
    ]
    return pa.concat_tables([QUARANTINE.empty_table(), *parts])
