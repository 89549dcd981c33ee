"""Columns of whatever type a table has → the types we work with. Cells that hold nothing become null."""

from __future__ import annotations

import json
import re
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def as_strings(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Strings without surrounding space; empty ones are null. Whole floats lose their ".0": pandas writes ids so when some are missing."""
    array = _one_array(column)
    kind = array.type
    if pa.types.is_null(kind):
        return array.cast(pa.string())
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, kind))
        whole = pc.and_(pc.equal(array, pc.floor(array)), pc.less(pc.abs(array), 2**53))
        as_whole = pc.if_else(whole, array, pa.scalar(None, kind)).cast(pa.int64()).cast(pa.string())
        array = pc.coalesce(as_whole, array.cast(pa.string()))
    elif _is_nested(kind):
        array = pa.array([None if value is None else _joined(value) for value in array.to_pylist()], pa.string())
    elif not pa.types.is_string(kind):
        array = array.cast(pa.string())
    array = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)


def as_lists(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Lists of strings: lists as they are, anything else split at ';'. Without a value it is null."""
    array = _one_array(column)
    if not _is_nested(array.type):
        array = as_strings(array)
    cells = [_parts(value) for value in array.to_pylist()]
    return pa.array([cell or None for cell in cells], pa.list_(pa.string()))


def as_years(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """int32 years from integers, floats, dates and strings that begin with a year; anything else is null."""
    found = [re.match(r"\d{4}(?!\d)", value) if value else None for value in as_strings(column).to_pylist()]
    return pa.array([int(match.group()) if match else None for match in found], pa.int32())


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def _is_nested(kind: pa.DataType) -> bool:
    return pa.types.is_nested(kind)


def _parts(value: Any) -> list[str]:
    if value is None:
        return []
    cells = value.split(";") if isinstance(value, str) else value if isinstance(value, list) else [value]
    return [text for text in (str(cell).strip() for cell in cells if cell is not None) if text]


def _joined(value: Any) -> str:
    return "; ".join(_parts(value)) if isinstance(value, list) else json.dumps(value, ensure_ascii=False, default=str)
