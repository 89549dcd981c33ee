"""Plays in order of time → sessions, and the song that led to each play."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NO_TRIGGER = -1


def session_starts(users: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64], gap_seconds: float) -> npt.NDArray[np.int64]:
    """For each play, the row at which its session starts. Rows are sorted by user and time; users are numbers.

    A session ends where the user changes or more than `gap_seconds` pass between two plays.
    """
    rows = np.arange(users.size)
    new = np.ones(users.size, dtype=bool)
    new[1:] = (users[1:] != users[:-1]) | (np.diff(seconds) > gap_seconds)
    return np.maximum.accumulate(np.where(new, rows, 0)) if users.size else rows


def triggers(starts: npt.NDArray[np.int64], positive: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """For each play, the row of the last positively received play before it in its session, or NO_TRIGGER."""
    rows = np.arange(starts.size)
    last = np.full(starts.size, NO_TRIGGER)
    if starts.size:
        last[1:] = np.maximum.accumulate(np.where(positive, rows, NO_TRIGGER))[:-1]
    return np.where(last >= starts, last, NO_TRIGGER)
