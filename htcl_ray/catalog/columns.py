"""Convert columns of any Arrow type to strings, ids, lists, years, numbers and times.

A blank cell (null, white space, NaN, an empty list) becomes null, and so does an unreadable one: an object in place of
text, bytes that are not UTF-8, `ca. 1990` as a year. `unreadable` marks the second kind, so that it can be counted.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, date, datetime
from datetime import time as time_of_day
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

_CONVERSION_ERRORS = (pa.ArrowException, ValueError, TypeError, OverflowError, RecursionError)
_UNREADABLE = object()
"""Placeholder for a value that Arrow cannot convert to Python."""


def as_strings(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert to strings without surrounding white space, for titles, feedback and the like; lists join with "; ".

    Whole floats lose their ".0", because pandas stores integers with missing values as floats. UUIDs are written
    8-4-4-4-12.
    """
    return _as_strings(column, _text)


def as_ids(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert to ids of songs or users: as `as_strings`, but lists are unreadable and 16 non-UTF-8 bytes are a UUID."""
    return _as_strings(column, _id)


def as_lists(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert to lists of strings: other types are split at ';', and lists of lists or objects are unreadable."""
    array = one_array(column)
    cells = _values(array) if _is_nested(array.type) or _is_json(array.type) else as_strings(array).to_pylist()
    return pa.array([_parts(cell) or None for cell in cells], pa.list_(pa.string()))


def as_years(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Convert integers, floats, dates and strings that begin with a year to int32 years, 1000 to 2099."""
    matches = [re.match(r"(1\d|20)\d\d(?!\d)", value) if value else None for value in as_strings(column).to_pylist()]
    return pa.array([int(match.group()) if match else None for match in matches], pa.int32())


def unreadable(column: pa.Array | pa.ChunkedArray, converted: pa.Array) -> npt.NDArray[np.bool_]:
    """Mark unreadable cells, bool [rows]: not blank in `column`, null in `converted`, a result of `as_strings` etc."""
    array = one_array(column)
    lost = np.asarray(pc.and_(pc.is_valid(array), pc.is_null(converted)))
    for i in np.flatnonzero(lost):
        lost[i] = not _is_blank(_value(array, int(i)))
    return lost


def example(column: pa.Array | pa.ChunkedArray, row: int) -> str:
    """Format the cell of a row for an error message, in at most 60 characters."""
    value = _value(one_array(column.slice(row, 1)), 0)
    text = "a value that cannot be converted" if value is _UNREADABLE else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_numbers(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Convert to float64; NaN for cells that are no number."""
    array = one_array(column)
    if not _is_number(array.type):
        text = as_strings(array)
        array = pc.if_else(pc.match_substring_regex(text, _NUMBER), text, pa.scalar(None, pa.string()))
    numbers: npt.NDArray[np.float64] = (
        array.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False)
    )
    return numbers


_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"

EARLIEST_SECONDS = 315_532_800
"""1980-01-01. Smaller numbers are no event times, but days, minutes or years since some date, or row numbers."""
LATEST_SECONDS = 4_102_444_800
"""2100-01-01. Between both bounds, the numbers of EPOCH_UNITS and compact dates do not overlap."""
TOLERANCE_SECONDS = 86_400
"""Largest distance of a time into the future: clocks are inexact, and times without a zone are read as UTC."""
EPOCH_UNITS = {"epoch seconds": 1, "epoch milliseconds": 10**3, "epoch microseconds": 10**6, "epoch nanoseconds": 10**9}
TIME_FORMS = ("unreadable", "date or time type", "ISO 8601", *EPOCH_UNITS)
"""Forms of timestamps; `read_times` returns indexes into this tuple."""


def as_epoch_seconds(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.float64]:
    """Convert to epoch seconds, float64 [rows]; see `read_times`."""
    return read_times(column)[0]


def read_times(column: pa.Array | pa.ChunkedArray) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Convert to epoch seconds, float64 [rows], and return the form of each cell as an index into TIME_FORMS.

    Accepts Arrow's dates and timestamps, ISO 8601 (extended, or basic such as 20240131 and 20240131T120000), and epoch
    seconds, milliseconds, microseconds or nanoseconds. Times without a zone are UTC. NaN for cells without a time
    between 1980 and tomorrow.
    """
    array = one_array(column)
    kind = array.type
    forms = np.zeros(len(array), dtype=np.int64)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        units = 1 / 86400 if pa.types.is_date32(kind) else _PER_SECOND["ms" if pa.types.is_date64(kind) else kind.unit]
        integers = array.cast(pa.int32() if pa.types.is_date32(kind) else pa.int64())
        seconds = integers.cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy(zero_copy_only=False) / units
        forms[:] = TIME_FORMS.index("date or time type")
    else:
        numbers = as_numbers(array)
        seconds = _compact_seconds(numbers)
        forms[~np.isnan(seconds)] = TIME_FORMS.index("ISO 8601")
        for name, unit in EPOCH_UNITS.items():
            within = (numbers >= EARLIEST_SECONDS * unit) & (numbers < LATEST_SECONDS * unit)
            seconds[within] = numbers[within] / unit
            forms[within] = TIME_FORMS.index(name)
        if not _is_number(kind):
            written = np.isnan(numbers)
            seconds[written] = _iso_seconds(as_strings(array).filter(pa.array(written)))
            forms[written] = TIME_FORMS.index("ISO 8601")
    plausible = (seconds >= EARLIEST_SECONDS) & (seconds <= time.time() + TOLERANCE_SECONDS)
    return np.where(plausible, seconds, np.nan), np.where(plausible, forms, 0)


_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_ISO = r"^\d{4}-\d{2}-\d{2}([T ]\d{2}:\d{2}(:\d{2}(\.\d{1,6})?)?)?Z?$"


def _compact_seconds(numbers: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Read numbers such as 20240131, 202401311200 and 20240131120000 (ISO 8601 basic, without "T"); others are NaN."""
    seconds = np.full(numbers.size, np.nan)
    for digits in (8, 12, 14):
        scale = 10 ** (digits - 4)
        rows = np.flatnonzero((numbers >= 1980 * scale) & (numbers < 2100 * scale) & (numbers == np.floor(numbers)))
        parts = numbers[rows].astype(np.int64) * 10 ** (14 - digits)
        year, month, day, hour, minute, second = (
            parts // 10**p % (10**4 if p == 10 else 100) for p in (10, 8, 6, 4, 2, 0)
        )
        start = (year - 1970).astype("datetime64[Y]").astype("datetime64[M]") + np.clip(month - 1, 0, 11)
        date_ = start.astype("datetime64[D]") + (day - 1)
        valid = (
            (month >= 1)
            & (month <= 12)
            & (day >= 1)
            & (date_.astype("datetime64[M]") == start)
            & (hour < 24)
            & (minute < 60)
            & (second < 60)
        )
        of_day = hour * 3600 + minute * 60 + second
        seconds[rows[valid]] = (date_.astype(np.int64) * 86400 + of_day)[valid]
    return seconds


def _iso_seconds(texts: pa.Array) -> npt.NDArray[np.float64]:
    """Convert ISO 8601 texts to epoch seconds; NaN for other texts."""
    common = pc.match_substring_regex(texts, _ISO).fill_null(False)
    with contextlib.suppress(pa.ArrowInvalid):  # 2024-13-01
        if pc.all(common).as_py():
            moments = pc.utf8_rtrim(texts, characters="Z").cast(pa.timestamp("us"))
            microseconds: npt.NDArray[np.int64] = moments.cast(pa.int64()).to_numpy(zero_copy_only=False)
            return microseconds / 1e6
    return np.array([_one_iso(text) for text in texts.to_pylist()], dtype=np.float64)


def _one_iso(text: str | None) -> float:
    if text is None:
        return np.nan
    try:
        moment = datetime.fromisoformat(text)
        return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return np.nan


def _as_strings(column: pa.Array | pa.ChunkedArray, text_of: Callable[[Any], str | None]) -> pa.Array:
    array = one_array(column)
    try:
        texts = _cast(array)
    except pa.ArrowException:
        texts = None
    if texts is None:
        texts = pa.array([text_of(value) for value in _values(array)], pa.string())
    texts = pc.utf8_trim_whitespace(texts)
    return pc.if_else(pc.equal(texts, ""), pa.scalar(None, pa.string()), texts)


def _cast(array: pa.Array) -> pa.Array | None:
    """Cast to strings with Arrow; None for types whose cells are converted one by one.

    Raises ArrowException for invalid UTF-8.
    """
    kind = array.type
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_finite(array), array, pa.scalar(None, kind))
        whole = pc.and_(pc.equal(array, pc.floor(array)), pc.less(pc.abs(array), 2**53))
        as_whole = pc.if_else(whole, array, pa.scalar(None, kind)).cast(pa.int64()).cast(pa.string())
        return pc.coalesce(as_whole, array.cast(pa.string()))
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    is_plain = pa.types.is_null(kind) or pa.types.is_boolean(kind) or pa.types.is_integer(kind)
    if is_text or is_bytes or is_plain or pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        texts = array.cast(pa.string())
        texts.validate(full=True)  # Parquet files may hold invalid UTF-8
        return texts
    return None


def one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Combine to one array, without dictionaries and without extension types other than JSON."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if isinstance(array, pa.ChunkedArray):  # combine_chunks of more than 2 GB, or of none
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.nulls(0)
    if isinstance(array, pa.ExtensionArray) and not _is_json(array.type):
        return one_array(array.storage)
    if pa.types.is_dictionary(array.type):
        return one_array(array.dictionary.take(array.indices))
    return array


def _is_nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_nested(kind))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.JsonType)


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _values(array: pa.Array) -> list[Any]:
    return [_value(array, i) for i in range(len(array))]


def _value(array: pa.Array, row: int) -> Any:
    try:
        value = array[row].as_py()
        if value is not None and _is_json(array.type):
            return json.loads(value)
    except UnicodeDecodeError:  # a string that is not UTF-8
        return bytes(array[row].as_buffer())
    except _CONVERSION_ERRORS:
        return _UNREADABLE
    is_uuid = isinstance(value, bytes) and pa.types.is_fixed_size_binary(array.type) and len(value) == 16
    return uuid.UUID(bytes=value) if is_uuid else value


def _text(value: Any) -> str | None:
    """Convert a cell to text; None for a blank or unreadable one."""
    if isinstance(value, list):
        return "; ".join(_parts(value)) or None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Decimal):
        return format(value.to_integral_value() if value == value.to_integral_value() else value, "f")
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return str(int(value)) if value.is_integer() and abs(value) < 2**53 else str(value)
    if isinstance(value, str | bytes):
        try:  # bytes may be in another encoding, strings of JSON may have lone surrogates
            return value.decode() if isinstance(value, bytes) else value.encode().decode()
        except UnicodeError:
            return None
    return str(value) if isinstance(value, int | date | time_of_day | uuid.UUID) else None


def _id(value: Any) -> str | None:
    text = None if isinstance(value, list) else _text(value)
    return str(uuid.UUID(bytes=value)) if text is None and isinstance(value, bytes) and len(value) == 16 else text


def _parts(value: Any) -> list[str]:
    """Convert the items of a list, or of a string with ';', to texts; empty when one of them is unreadable."""
    cells = value if isinstance(value, list) else (_text(value) or "").split(";")
    texts = [None if isinstance(cell, list) else _text(cell) for cell in cells if not _is_blank(cell)]
    return [] if None in texts else [text.strip() for text in texts if text is not None]


def _is_blank(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_blank(item) for item in value)
    if isinstance(value, str):
        return not value.strip()
    return value is None or (isinstance(value, float) and math.isnan(value))
