"""The text of a song: what the text tower reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def song_text(values: Sequence[Any]) -> str:
    """One line from the values of the text columns, in their order; empty when the song has none.

    Columns are separated by "; ", the values of a multi-valued one by ", ". Runs of white space become one space.
    """
    cells = (
        ", ".join(str(item) for item in value) if isinstance(value, list) else str(value)
        for value in values
        if value is not None
    )
    return "; ".join(text for text in (" ".join(cell.split()) for cell in cells) if text)
