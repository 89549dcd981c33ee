"""Derive occurrences from events: a user's positive or negative reaction to a song after a trigger song.

Feedback names its trigger. The trigger of a play is the last positive play before it in the same session; plays at
equal times have no order. In affinity logs and ratings, which have no order, each preferred song of a user is a trigger
of every other.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.config.sections import PairSettings

OCCURRENCES = pa.schema(
    [
        pa.field("trigger_song_id", pa.string()),
        pa.field("song_id", pa.string()),
        pa.field("user_id", pa.string()),
        pa.field("strength", pa.float64()),
        pa.field("timestamp", pa.float64()),
        pa.field("period", pa.string()),
        pa.field("held_out_user", pa.bool_()),
    ]
)
NO_TRIGGER = -1


def occurrences(events: pa.Table, settings: PairSettings) -> pa.Table:
    """Return the positive occurrences, schema OCCURRENCES.

    `events`: schema EVENTS, sorted by user and time, with all events of each user.
    """
    feedback, plays, affinity = _by_shape(events)
    return pa.concat_tables(
        [
            _from_feedback(feedback, sign=1),
            _from_plays(plays, settings.session_gap_minutes * 60, sign=1),
            _from_affinity(affinity, settings.max_songs_per_user),
        ]
    )


def rejections(events: pa.Table, settings: PairSettings) -> pa.Table:
    """Return the explicit negatives, schema OCCURRENCES, of events as for `occurrences`.

    Affinity logs and ratings have none.
    """
    feedback, plays, _ = _by_shape(events)
    return pa.concat_tables(
        [_from_feedback(feedback, sign=-1), _from_plays(plays, settings.session_gap_minutes * 60, sign=-1)]
    )


def _by_shape(events: pa.Table) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Split events into feedback, plays and affinity."""
    has_trigger, has_time = pc.is_valid(events["trigger_song_id"]), pc.is_valid(events["timestamp"])
    return (
        events.filter(has_trigger),
        events.filter(pc.and_(pc.invert(has_trigger), has_time)),
        events.filter(pc.invert(has_time)),
    )


def _from_feedback(events: pa.Table, sign: int) -> pa.Table:
    strength = pc.multiply(events["value"], sign)
    matches = pc.greater(strength, 0)
    events = events.filter(matches)
    return _as_occurrences(events, events["trigger_song_id"], strength.filter(matches))


def _from_plays(events: pa.Table, gap_seconds: float, sign: int) -> pa.Table:
    value, seconds = events["value"].to_numpy(), events["timestamp"].to_numpy()
    starts = session_starts(user_codes(events), seconds, gap_seconds)
    trigger = triggers(starts, seconds, _codes(events["song_id"]), value > 0)
    rows = np.flatnonzero((sign * value > 0) & (trigger != NO_TRIGGER))
    return _as_occurrences(
        events.take(pa.array(rows)), events["song_id"].take(pa.array(trigger[rows])), pa.array(sign * value[rows])
    )


def _from_affinity(events: pa.Table, most: int) -> pa.Table:
    """Pair each user's `most` heaviest songs in both directions.

    The strength is the geometric mean of both weights, divided by the user's largest weight.
    """
    events = events.filter(pc.greater(events["value"], 0))  # ratings may be neutral or negative
    if not events.num_rows:
        return OCCURRENCES.empty_table()
    liked = events.group_by(["user_id", "song_id"], use_threads=False).aggregate(
        [("value", "sum"), ("held_out_user", "any"), ("period", "min")]
    )
    liked = liked.sort_by([("user_id", "ascending"), ("value_sum", "descending"), ("song_id", "ascending")])
    starts = np.append(np.flatnonzero(np.diff(user_codes(liked), prepend=-1)), liked.num_rows)
    first, second = [], []
    for start, end in itertools.pairwise(starts):
        rows = np.arange(start, min(end, start + most))
        a, b = np.repeat(rows, rows.size), np.tile(rows, rows.size)
        first.append(a[a != b])
        second.append(b[a != b])
    trigger, song = np.concatenate(first), np.concatenate(second)
    weight = liked["value_sum"].to_numpy().astype(np.float64)
    largest = weight[starts[:-1]][np.repeat(np.arange(starts.size - 1), np.diff(starts))]
    good = liked.take(pa.array(song))
    columns = {
        "trigger_song_id": liked["song_id"].take(pa.array(trigger)),
        "song_id": good["song_id"],
        "user_id": good["user_id"],
        "strength": pa.array(np.sqrt(weight[trigger] * weight[song]) / largest[song]),
        "timestamp": pa.nulls(good.num_rows, pa.float64()),
        "period": good["period_min"],
        "held_out_user": good["held_out_user_any"],
    }
    return pa.table(columns).cast(OCCURRENCES)


def _as_occurrences(events: pa.Table, trigger: pa.ChunkedArray, strength: pa.Array | pa.ChunkedArray) -> pa.Table:
    columns = [
        trigger,
        events["song_id"],
        events["user_id"],
        strength,
        *(events[name] for name in ("timestamp", "period", "held_out_user")),
    ]
    return pa.table(columns, names=OCCURRENCES.names).cast(OCCURRENCES)


def user_codes(events: pa.Table) -> npt.NDArray[np.int64]:
    """Encode the user of each row as an integer, in order of appearance: int64 [rows]."""
    return _codes(events["user_id"])


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    indices = column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return np.asarray(indices, dtype=np.int64)


def session_starts(
    users: npt.NDArray[np.int64], seconds: npt.NDArray[np.float64], gap_seconds: float
) -> npt.NDArray[np.int64]:
    """Return the first row of each play's session, int64 [rows], for rows sorted by user and time.

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
    """Return the row of each play's trigger, int64 [rows]: the last positive play at an earlier time of its session.

    `starts` is the result of `session_starts`; `songs` are integer codes. NO_TRIGGER for a play without one. Plays at
    one time have no order: none of them is the trigger of another, and if several songs were positive at the last time
    before a play, that play has no trigger.
    """
    if not starts.size:
        return starts
    rows = np.arange(starts.size)
    # The first row of each distinct (session, time).
    first = np.flatnonzero((np.diff(starts, prepend=-1) != 0) | (np.diff(seconds, prepend=np.nan) != 0))
    moment = np.repeat(np.arange(first.size), np.diff(first, append=starts.size))
    trigger = np.minimum.reduceat(np.where(positive, rows, starts.size), first)
    lowest = np.minimum.reduceat(np.where(positive, songs, songs.max()), first)
    highest = np.maximum.reduceat(np.where(positive, songs, -1), first)
    trigger = np.where(highest > lowest, NO_TRIGGER, trigger)
    any_positive = highest >= 0
    last = np.maximum.accumulate(np.where(any_positive, np.arange(first.size), -1))
    before = np.concatenate([[-1], last[:-1]])[moment]
    return np.where((before >= 0) & (first[before] >= starts), trigger[before], NO_TRIGGER)
