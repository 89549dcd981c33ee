"""The Range header of a request (RFC 9110, section 14): which bytes of a file are asked for."""

from __future__ import annotations

import re

WHOLE = None
_RANGE = re.compile(r"bytes=[ \t]*(\d*)-(\d*)[ \t]*", re.IGNORECASE | re.ASCII)
_DIGITS = 18


class NotSatisfiable(Exception):
    """The range begins behind the end of the file, or is a suffix of no bytes."""


def asked_for(header: str | None, size: int, most_open: int) -> range | None:
    """The bytes of a file of `size` bytes that a Range header asks for; None: all of it, without a range.

    A header that is not valid, of another unit or of several ranges is passed over, as the standard allows. Of a range
    without an end at most `most_open` bytes are given, which section 15.3.7 allows as well: a player that pauses then
    holds no connection open. Raises NotSatisfiable.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match[0].strip().endswith("=-") or max(len(match[1]), len(match[2])) > _DIGITS:
        return WHOLE
    first, last = match[1], match[2]
    if not first:
        wanted = min(int(last), size)
        if not wanted:
            raise NotSatisfiable
        return range(size - wanted, size)
    start = int(first)
    if last and int(last) < start:
        return WHOLE
    if start >= size:
        raise NotSatisfiable
    return range(start, min(int(last) + 1, size) if last else min(start + most_open, size))
