"""Columns of whatever type a table has → the types we work with. Cells that hold nothing become null."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
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


def as_numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """float64; NaN where there is no number."""
    array = _one_array(column)
    if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
        text = as_strings(array)
        array = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, pa.scalar(None, pa.string()))
    return array.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)


_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"

LATEST_SECONDS = 1e11
"""Year 5138. A larger number is a time in milliseconds rather than seconds."""


def as_epoch_seconds(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Epoch seconds from times, epoch seconds or ISO 8601; without a zone they are UTC. NaN where there is no time from 1970 on."""
    array = _one_array(column)
    if pa.types.is_timestamp(array.type) or pa.types.is_date(array.type):
        micros = array.cast(pa.timestamp("us"), safe=False).cast(pa.int64())
        seconds = micros.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False) / 1e6
    else:
        seconds = as_numbers(array).copy()
        if not (pa.types.is_integer(array.type) or pa.types.is_floating(array.type)):
            text = as_strings(array).to_pylist()
            for i in np.flatnonzero(np.isnan(seconds)):
                seconds[i] = _iso_seconds(text[i])
    seconds[~((seconds >= 0) & (seconds < LATEST_SECONDS))] = np.nan
    return seconds


def _iso_seconds(text: str | None) -> float:
    if text is None:
        return np.nan
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return np.nan
