"""Events → occurrences: each time that a user received a song well after a trigger song, and each time that one was
rejected there.

Feedback names its trigger. A play's trigger is the last positively received play before it in its session; plays at
equal times have no order. Affinity logs and ratings have no order: each song that a user prefers is a trigger of every
other.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.config.sections import PairSettings
from htcl_ray.interactions.sessions import NO_TRIGGER, session_starts, triggers

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


def occurrences(events: pa.Table, settings: PairSettings) -> pa.Table:
    """Occurrences, schema OCCURRENCES, in events (schema EVENTS) that are sorted by user and time and hold whole
    users.
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
    """Rejected songs and their triggers, schema OCCURRENCES, in events as for `occurrences`. Affinity logs and ratings
    have none.
    """
    feedback, plays, _ = _by_shape(events)
    return pa.concat_tables(
        [_from_feedback(feedback, sign=-1), _from_plays(plays, settings.session_gap_minutes * 60, sign=-1)]
    )


def _by_shape(events: pa.Table) -> tuple[pa.Table, pa.Table, pa.Table]:
    """Feedback, plays, affinity."""
    has_trigger, has_time = pc.is_valid(events["trigger_song_id"]), pc.is_valid(events["timestamp"])
    return (
        events.filter(has_trigger),
        events.filter(pc.and_(pc.invert(has_trigger), has_time)),
        events.filter(pc.invert(has_time)),
    )


def _from_feedback(events: pa.Table, sign: int) -> pa.Table:
    strength = pc.multiply(events["value"], sign)
    answered = pc.greater(strength, 0)
    found = events.filter(answered)
    return _as_occurrences(found, found["trigger_song_id"], strength.filter(answered))


def _from_plays(events: pa.Table, gap_seconds: float, sign: int) -> pa.Table:
    value, seconds = events["value"].to_numpy(), events["timestamp"].to_numpy()
    starts = session_starts(user_codes(events), seconds, gap_seconds)
    trigger = triggers(starts, seconds, _codes(events["song_id"]), value > 0)
    rows = np.flatnonzero((sign * value > 0) & (trigger != NO_TRIGGER))
    return _as_occurrences(
        events.take(pa.array(rows)), events["song_id"].take(pa.array(trigger[rows])), pa.array(sign * value[rows])
    )


def _from_affinity(events: pa.Table, most: int) -> pa.Table:
    """Every ordered pair of a user's heaviest songs, as strong as the geometric mean of both weights, relative to the
    user's largest.
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
    """The user of each row as a number, counted in order of appearance."""
    return _codes(events["user_id"])


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    return column.combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False).astype(np.int64)
