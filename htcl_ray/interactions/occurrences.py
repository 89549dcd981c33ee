"""Events → occurrences: each time that a user received a song well after a trigger song.

Feedback names its trigger. A play's trigger is the last positively received play before it in its session. Affinity logs have no order:
each song that a user prefers is a trigger of every other.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.interactions.sessions import NO_TRIGGER, session_starts, triggers
from htcl_ray.settings import PairSettings

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
    """Occurrences, schema OCCURRENCES, in events (schema EVENTS) that are sorted by user and time and hold whole users."""
    has_trigger, has_time = pc.is_valid(events["trigger_song_id"]), pc.is_valid(events["timestamp"])
    return pa.concat_tables(
        [
            _from_feedback(events.filter(has_trigger)),
            _from_plays(events.filter(pc.and_(pc.invert(has_trigger), has_time)), settings.session_gap_minutes * 60),
            _from_affinity(events.filter(pc.invert(has_time)), settings.max_songs_per_user),
        ]
    )


def _from_feedback(events: pa.Table) -> pa.Table:
    good = events.filter(pc.greater(events["value"], 0))
    return _as_occurrences(good, good["trigger_song_id"], good["value"])


def _from_plays(events: pa.Table, gap_seconds: float) -> pa.Table:
    positive = pc.greater(events["value"], 0).to_numpy()
    trigger = triggers(session_starts(user_codes(events), events["timestamp"].to_numpy(), gap_seconds), positive)
    rows = pa.array(np.flatnonzero(positive & (trigger != NO_TRIGGER)))
    good = events.take(rows)
    return _as_occurrences(good, events["song_id"].take(pa.array(trigger[rows.to_numpy()])), good["value"])


def _from_affinity(events: pa.Table, most: int) -> pa.Table:
    """Every ordered pair of a user's heaviest songs, as strong as the geometric mean of both weights, relative to the user's largest."""
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


def _as_occurrences(events: pa.Table, trigger: pa.ChunkedArray, strength: pa.ChunkedArray) -> pa.Table:
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
    users = events["user_id"].combine_chunks().dictionary_encode()
    return users.indices.to_numpy(zero_copy_only=False).astype(np.int64)
