"""Checks of the clients' arguments, which convert NumPy, pandas and PyTorch values to JSON values.

Each check takes a value and the name of the argument, and returns the value to send. Raises ArgumentError.
"""

from __future__ import annotations

import math
import operator
import os
import reprlib
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from htcl_ray.errors import ArgumentError

Value = TypeVar("Value")


def text(value: Any, name: str) -> str:
    """A text that UTF-8 can encode."""
    if not isinstance(value, str):
        raise _wrong(name, value, "a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(name, value, "a text without halves of surrogate pairs, which UTF-8 cannot encode") from None
    return str(value)


def song_id(value: Any, name: str) -> str:
    """The id of a song, which is not empty."""
    if isinstance(value, str) and not value:
        raise ArgumentError(f"{name} is empty; expected the id of a song")
    return text(value, name)


def number(value: Any, name: str) -> float:
    """A finite number."""
    value = _plain(value)
    if isinstance(value, date):
        raise _wrong(name, value, "seconds since 1970, such as when.timestamp() gives")
    if isinstance(value, bool) or not isinstance(value, Real):
        raise _wrong(name, value, "a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    if not finite:
        raise _wrong(name, value, "a finite number")
    return operator.index(value) if isinstance(value, Integral) else float(value)


def whole_number(value: Any, name: str) -> int:
    """An integer, or a float without a fraction, as in an integer column with missing values."""
    given = number(value, name)
    if given != int(given):
        raise _wrong(name, value, "a whole number")
    return int(given)


def flag(value: Any, name: str) -> bool:
    """True or False."""
    value = _plain(value)
    if not isinstance(value, bool):
        raise _wrong(name, value, "True or False")
    return value


def each(check: Callable[[Any, str], Value], values: Any, name: str) -> list[Value]:
    """A list of values that pass `check`."""
    values = _plain(values)
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise _wrong(name, values, "a list")
    return [check(value, f"{name}[{place}]") for place, value in enumerate(values)]


def mapping(value: Any, name: str) -> dict[str, Any]:
    """A mapping of names to JSON values."""
    if not isinstance(value, Mapping):
        raise _wrong(name, value, "a mapping of names to values")
    for key in value:
        if not isinstance(key, str):
            raise _wrong(f"a name in {name}", key, "a text")
    return {text(key, f"a name in {name}"): _json(item, f"{name}.{key}") for key, item in value.items()}


def audio(value: Any, name: str = "audio") -> Any:
    """A path, a file's bytes, or an object with `read`."""
    if isinstance(value, bytes | bytearray | memoryview) or callable(getattr(value, "read", None)):
        return value
    if not isinstance(value, str | os.PathLike):
        raise _wrong(name, value, "a path, the bytes of an audio file, or a file open for reading")
    path = Path(value)
    if "\0" in str(path):
        raise _wrong(name, value, "a path, which holds no NUL character")
    return path


def file_content(value: Any) -> bytes:
    """The bytes that `read` of an audio file returned."""
    if not isinstance(value, bytes | bytearray | memoryview):
        raise ArgumentError(
            f"audio is a file that gives {_kind(value)}; expected one that is open for reading bytes (mode 'rb')"
        )
    return bytes(value)


def unknown(name: str, known: Iterable[str]) -> ArgumentError:
    """The error for an option that does not exist."""
    return ArgumentError(f"'{name}' is not an option; expected one of {', '.join(known)}")


def _json(value: Any, name: str) -> Any:
    value = _plain(value)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text(value, name)
    if isinstance(value, Mapping):
        return mapping(value, name)
    if isinstance(value, list | tuple):
        return each(_json, value, name)
    if isinstance(value, Real):
        return number(value, name)
    raise _wrong(name, value, "a text, a number, True, False, None, a list or a mapping")


def _plain(value: Any) -> Any:
    """The Python value of a NumPy, pandas or PyTorch number or array.

    Other values are returned unchanged, and so are dates, which `tolist` would convert to nanoseconds.
    """
    if str(getattr(value, "dtype", "")).startswith(("datetime64", "timedelta64")) or not callable(
        getattr(value, "tolist", None)
    ):
        return value
    return value.tolist()


def _wrong(name: str, value: Any, expected: str) -> ArgumentError:
    actual = f"{_kind(value)} {reprlib.repr(value)}" if isinstance(value, str | bytes | Real | date) else _kind(value)
    return ArgumentError(f"{name} is {actual}; expected {expected}".encode("utf-8", "backslashreplace").decode())


def _kind(value: Any) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
