"""Normalise interaction logs of several shapes to events (`schemas.EVENTS`), and reject unusable rows with reasons.

The columns determine the shape of a log: `trigger_song_id` means feedback, otherwise `weight` means affinity,
otherwise `rating` means ratings, otherwise `timestamp` means plays.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import as_epoch_seconds, as_ids, as_numbers, as_strings, example, unreadable
from htcl_ray.catalog.quarantine import rejected_rows
from htcl_ray.catalog.tables import UNREADABLE_ROW
from htcl_ray.config.sections import PairSettings
from htcl_ray.errors import TableError
from htcl_ray.interactions.splits import is_held_out, periods
from htcl_ray.schemas import EVENTS, QUARANTINE, Feedback, Reason


class LogShape(StrEnum):
    """The kind of rows in a log."""

    FEEDBACK = "feedback"
    """A user's feedback to a song that was recommended after a trigger song."""
    PLAYS = "plays"
    """A play of a song by a user at a time."""
    AFFINITY = "affinity"
    """A user's play count of a song, without order."""
    RATINGS = "ratings"
    """A user's rating of a song, without order."""


COLUMNS = {
    LogShape.FEEDBACK: ("user_id", "trigger_song_id", "song_id", "feedback", "timestamp"),
    LogShape.PLAYS: ("user_id", "song_id", "timestamp"),
    LogShape.AFFINITY: ("user_id", "song_id", "weight"),
    LogShape.RATINGS: ("user_id", "song_id", "rating"),
}
"""Required columns of each shape."""
OPTIONAL_COLUMNS = {
    LogShape.FEEDBACK: (),
    LogShape.PLAYS: ("feedback", "played_ratio"),
    LogShape.AFFINITY: (),
    LogShape.RATINGS: (),
}
TIMED = (LogShape.FEEDBACK, LogShape.PLAYS)
"""Shapes whose rows have a timestamp."""


def detect_shape(names: Sequence[str], path: str) -> LogShape:
    """Determine the shape of a log by its column names, after renaming by `data.columns`.

    Raises TableError when a required column of the shape is missing.
    """
    by = {"trigger_song_id": LogShape.FEEDBACK, "weight": LogShape.AFFINITY, "rating": LogShape.RATINGS}
    shape = next((shape for column, shape in by.items() if column in names), LogShape.PLAYS)
    missing = [name for name in COLUMNS[shape] if name not in names]
    if missing:
        shapes = "; ".join(f"{name} ({', '.join(columns)})" for name, columns in COLUMNS.items())
        raise TableError(
            f"the log {path} has no column '{missing[0]}' (it has {', '.join(names) or 'none'}); "
            f"expected one of the shapes {shapes}; "
            f"if a column is called otherwise, set data.columns.{missing[0]}=<its name>"
        )
    return shape


def feedback_value(feedback: str, settings: PairSettings) -> float | None:
    """Map feedback to 1 (positive), −1 (negative) or 0 (neutral); numbers are ratings. None for unknown feedback."""
    word = feedback.lower()
    if word in settings.positive_feedback:
        return 1.0
    if word in settings.negative_feedback:
        return -1.0
    if word in set(Feedback):
        return 0.0
    try:
        rating = float(word)
    except ValueError:
        return None
    return float(rating_values(np.array([rating]), settings)[0]) if np.isfinite(rating) else None


def rating_values(ratings: npt.NDArray[np.float64], settings: PairSettings) -> npt.NDArray[np.float64]:
    """Map ratings to 1 (positive), −1 (negative) or 0 (neutral); NaN for ratings that are not finite."""
    values = np.where(
        ratings >= settings.positive_from, 1.0, np.where(ratings <= settings.max_negative_rating, -1.0, 0.0)
    )
    return np.where(np.isfinite(ratings), values, np.nan)


def normalise(
    table: pa.Table, shape: LogShape, songs: pa.Array, settings: PairSettings, source: str, first_row: int
) -> tuple[pa.Table, pa.Table]:
    """Convert a batch of log rows to events and rejected rows.

    `songs`: ids of the songs that have features. The events have the columns of EVENTS up to `timestamp`. In a log of
    plays, a row without feedback, or with `play`, is positive if its `played_ratio` is unknown or at least
    `min_played_ratio`, and neutral otherwise.
    """
    user, song = as_ids(table["user_id"]), as_ids(table["song_id"])
    nothing = pa.nulls(table.num_rows, pa.string())
    trigger, seconds = nothing, np.full(table.num_rows, np.nan)
    checks: list[tuple[Reason, npt.NDArray[np.bool_], str]] = [
        *(
            [(Reason.UNREADABLE_ROW, ~_null(table[UNREADABLE_ROW]), UNREADABLE_ROW)]
            if UNREADABLE_ROW in table.column_names
            else []
        ),
        (Reason.MISSING_USER_ID, _null(user), "user_id"),
        (Reason.MISSING_SONG_ID, _null(song), "song_id"),
        (Reason.UNKNOWN_SONG, ~_known(song, songs), "song_id"),
    ]
    if shape is LogShape.AFFINITY:
        value = as_numbers(table["weight"])
        with np.errstate(over="ignore"):
            stored = value.astype(np.float32)  # the type of events, where 1e39 is infinite and 1e-50 is 0
        checks.append((Reason.BAD_WEIGHT, ~((stored > 0) & np.isfinite(stored)), "weight"))
    elif shape is LogShape.RATINGS:
        value = rating_values(as_numbers(table["rating"]), settings)
        checks.append((Reason.BAD_RATING, np.isnan(value), "rating"))
    else:
        seconds = as_epoch_seconds(table["timestamp"])
        checks.append((Reason.BAD_TIMESTAMP, np.isnan(seconds), "timestamp"))
        feedback = as_strings(table["feedback"]) if "feedback" in table.column_names else nothing
        feedback_lost = unreadable(table["feedback"], feedback) if "feedback" in table.column_names else False
        value = _values(feedback, settings)
        if shape is LogShape.FEEDBACK:
            trigger = as_ids(table["trigger_song_id"])
            checks.append((Reason.UNKNOWN_TRIGGER_SONG, ~_known(trigger, songs), "trigger_song_id"))
            checks.append((Reason.BAD_FEEDBACK, np.isnan(value), "feedback"))
        else:
            ratio_text = as_strings(table["played_ratio"]) if "played_ratio" in table.column_names else nothing
            ratio = as_numbers(ratio_text)
            checks.append((Reason.BAD_FEEDBACK, (np.isnan(value) & ~_null(feedback)) | feedback_lost, "feedback"))
            ratio_lost = (
                unreadable(table["played_ratio"], ratio_text) if "played_ratio" in table.column_names else False
            )
            bad_ratio = ~_null(ratio_text) & ~((ratio >= 0) & (ratio <= 1))
            checks.append((Reason.BAD_PLAYED_RATIO, bad_ratio | ratio_lost, "played_ratio"))
            is_plain_play = _null(feedback) | ((value == 0) & _equal(feedback, Feedback.PLAY))
            value = np.where(is_plain_play, np.where(ratio < settings.min_played_ratio, 0.0, 1.0), value)
    rejected = _rejected(table, song, checks, source, first_row)
    keep = pa.array(~np.logical_or.reduce([wrong for _, wrong, _ in checks]))
    timestamp = pa.array(seconds, pa.float64(), mask=np.isnan(seconds))
    columns = [user, song, trigger, pa.array(value, pa.float64()).cast(pa.float32()), timestamp]
    return pa.table(columns, names=EVENTS.names[: len(columns)]).filter(keep), rejected


def complete(events: pa.Table, period_ends: tuple[float, float], held_out_share: float) -> pa.Table:
    """Add `held_out_user` and `period` to events: schema EVENTS."""
    users = events["user_id"].combine_chunks().dictionary_encode()
    held_out = np.array([is_held_out(user, held_out_share) for user in users.dictionary.to_pylist()], dtype=bool)
    seconds = events["timestamp"].combine_chunks().fill_null(np.nan).to_numpy(zero_copy_only=False)
    events = events.append_column(
        "held_out_user", pa.array(held_out[users.indices.to_numpy()] if len(users) else held_out)
    )
    return events.append_column("period", pa.array(periods(seconds, period_ends), pa.string())).cast(EVENTS)


def _values(feedback: pa.Array, settings: PairSettings) -> npt.NDArray[np.float64]:
    """Map each feedback by `feedback_value`, float64 [rows]; NaN for missing or unknown feedback."""
    codes = feedback.dictionary_encode()
    distinct = [feedback_value(text, settings) for text in codes.dictionary.to_pylist()]
    values = np.array([*(np.nan if value is None else value for value in distinct), np.nan], dtype=np.float64)
    rows: npt.NDArray[np.int64] = codes.indices.fill_null(len(distinct)).to_numpy(zero_copy_only=False)
    return values[rows]


def _null(array: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    return _as_mask(pc.is_null(array))


def _known(ids: pa.Array, songs: pa.Array) -> npt.NDArray[np.bool_]:
    return _as_mask(pc.is_in(ids, value_set=songs))


def _equal(array: pa.Array, word: str) -> npt.NDArray[np.bool_]:
    return _as_mask(pc.equal(pc.utf8_lower(array), word).fill_null(False))


def _as_mask(array: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = array.to_numpy(zero_copy_only=False)
    return mask


_EXPECTED = {
    Reason.MISSING_USER_ID: "a user",
    Reason.MISSING_SONG_ID: "a song",
    Reason.UNKNOWN_SONG: "a song of the catalogue that has features",
    Reason.UNKNOWN_TRIGGER_SONG: "a song of the catalogue that has features",
    Reason.BAD_TIMESTAMP: "ISO 8601, or epoch seconds, milliseconds or microseconds, from 1980 to tomorrow",
    Reason.BAD_FEEDBACK: f"{', '.join(Feedback)} or a number",
    Reason.BAD_PLAYED_RATIO: "0 to 1",
    Reason.BAD_WEIGHT: "a number above 0 that a 32-bit float can hold",
    Reason.BAD_RATING: "a number",
}


def _rejected(
    table: pa.Table,
    song: pa.Array,
    checks: Sequence[tuple[Reason, npt.NDArray[np.bool_], str]],
    source: str,
    first_row: int,
) -> pa.Table:
    """Build the quarantine rows of a batch; a row that fails several checks gets the reason of the first."""
    seen = np.zeros(table.num_rows, dtype=bool)
    rejected = [QUARANTINE.empty_table()]
    for reason, wrong, column in checks:
        rows = np.flatnonzero(wrong & ~seen)
        seen |= wrong
        if rows.size:
            if reason is Reason.UNREADABLE_ROW:
                details = table[column].take(pa.array(rows)).to_pylist()
            else:
                given = [example(table[column], int(row)) for row in rows]
                details = [
                    f"{column} is {'missing' if cell == 'None' else cell}; expected {_EXPECTED[reason]}"
                    for cell in given
                ]
            rejected.append(
                rejected_rows(
                    song.take(pa.array(rows)).to_pylist(), (first_row + rows).tolist(), source, reason, details
                )
            )
    return pa.concat_tables(rejected)
