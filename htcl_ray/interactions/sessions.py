"""Plays in order of time → sessions, and the song that led to each play."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

NO_TRIGGER = -1


def session_starts(
    users: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64], gap_seconds: float
) -> npt.NDArray[np.int64]:
    """For each play, the row at which its session starts. Rows are sorted by user and time; users are numbers.

    A session ends where the user changes or more than `gap_seconds` pass between two plays.
    """
    rows = np.arange(users.size)
    new = np.ones(users.size, dtype=bool)
    new[1:] = (users[1:] != users[:-1]) | (np.diff(seconds) > gap_seconds)
    return np.maximum.accumulate(np.where(new, rows, 0)) if users.size else rows


def triggers(
    starts: npt.NDArray[np.int64],
    seconds: npt.NDArray[np.float64],
    songs: npt.NDArray[np.int64],
    positive: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int64]:
    """For each play, the row of the last positively received play at an earlier time of its session, or NO_TRIGGER.

    `starts` is what `session_starts` returns; songs are numbers. Plays at one time have no order: none of them is the
    trigger of another, and where several songs were received positively at the last time before a play, that play has
    no trigger.
    """
    if not starts.size:
        return starts
    rows = np.arange(starts.size)
    first = np.flatnonzero(
        (np.diff(starts, prepend=-1) != 0) | (np.diff(seconds, prepend=np.nan) != 0)
    )  # of each session and time
    moment = np.repeat(np.arange(first.size), np.diff(first, append=starts.size))
    trigger = np.minimum.reduceat(np.where(positive, rows, starts.size), first)
    lowest = np.minimum.reduceat(np.where(positive, songs, songs.max()), first)
    highest = np.maximum.reduceat(np.where(positive, songs, -1), first)
    trigger = np.where(highest > lowest, NO_TRIGGER, trigger)
    any_positive = highest >= 0
    last = np.maximum.accumulate(np.where(any_positive, np.arange(first.size), -1))
    before = np.concatenate([[-1], last[:-1]])[moment]
    return np.where((before >= 0) & (first[before] >= starts), trigger[before], NO_TRIGGER)
