"""Summaries of interaction logs: shape, time range, feedback values and rating scale, with checks of plausibility."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import TIME_FORMS, as_numbers, as_strings, example, read_times
from htcl_ray.config.sections import PairSettings
from htcl_ray.errors import TableError
from htcl_ray.interactions.logs import COLUMNS, OPTIONAL_COLUMNS, TIMED, LogShape, feedback_value, rating_values
from htcl_ray.schemas import LOG_COLUMNS, Feedback

MAX_FEEDBACK_VALUES = 1000
DEFAULT_SCALE = (4.0, 5.0)
"""Range of the largest rating of a scale for which the default of `pairs.min_positive_rating` is meant."""


@dataclass
class LogSummary:
    """Counts over the tables of one log that have the same shape."""

    path: str
    shape: LogShape
    rows: int = 0
    unused: set[str] = field(default_factory=set)
    """Log columns of the tables that this shape does not use."""
    forms: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(TIME_FORMS), np.int64))
    """Number of timestamps in each of TIME_FORMS."""
    times: tuple[float, float] = (np.inf, -np.inf)
    has_time_of_day: bool = False
    bad_time: str | None = None
    words: Counter[str] = field(default_factory=Counter)
    """Count of each feedback value that is no number."""
    ratings: Counter[int] = field(default_factory=Counter)
    """Count of ratings by sign: 1 positive, 0 neutral, -1 negative."""
    scale: tuple[float, float] = (np.inf, -np.inf)
    weights: tuple[float, float] = (np.inf, -np.inf)

    def add_names(self, names: Sequence[str]) -> None:
        """Record the columns of a table of this log, after renaming by `data.columns`."""
        self.unused |= {*LOG_COLUMNS} & {*names} - {*COLUMNS[self.shape], *OPTIONAL_COLUMNS[self.shape]}

    def add(self, table: pa.Table, settings: PairSettings) -> None:
        """Count a batch of rows, with columns renamed by `data.columns`."""
        self.rows += table.num_rows
        if self.shape in TIMED:
            seconds, forms = read_times(table["timestamp"])
            self.forms += np.bincount(forms, minlength=len(TIME_FORMS))
            self.times = _wider(self.times, seconds)
            self.has_time_of_day |= bool(np.any(seconds[forms > 0] % 86400))
            if self.bad_time is None and not forms.all():
                self.bad_time = example(table["timestamp"], int(np.argmin(forms)))
        if self.shape is LogShape.AFFINITY:
            self.weights = _wider(self.weights, as_numbers(table["weight"]))
        column = "rating" if self.shape is LogShape.RATINGS else "feedback"
        if column in table.column_names and self.shape is not LogShape.AFFINITY:
            self._add_feedback(as_strings(table[column]), settings)

    def _add_feedback(self, feedback: pa.Array, settings: PairSettings) -> None:
        numbers = as_numbers(feedback)
        self.scale = _wider(self.scale, numbers)
        values = rating_values(numbers, settings)
        self.ratings.update({value: int(np.count_nonzero(values == value)) for value in (1, 0, -1)})
        if self.shape is LogShape.RATINGS:
            return
        for item in pc.value_counts(feedback.filter(pa.array(np.isnan(values))).drop_null()).to_pylist():
            word = item["values"]
            key = word if word in self.words or len(self.words) < MAX_FEEDBACK_VALUES else "(other values)"
            self.words[key] += item["counts"]

    def check(self, settings: PairSettings, max_rejected_share: float) -> None:
        """Raise TableError for too much unknown feedback, unreadable times, or an unexpected rating scale."""
        unknown = {word: count for word, count in self.words.items() if feedback_value(word, settings) is None}
        if sum(unknown.values()) > max_rejected_share * self.rows:
            shown = ", ".join(f"'{word}'" for word in sorted(unknown)[:5]) + (
                f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            )
            raise TableError(
                f"the log {self.path} has unknown feedback values: {shown}; expected {', '.join(Feedback)} or numbers "
                "(ratings)"
            )
        if self.shape in TIMED and self.rows and self.forms[0] == self.rows:
            raise TableError(
                f"no timestamp of the log {self.path} can be read (the first is {self.bad_time}); expected ISO 8601, "
                "or epoch seconds, milliseconds or microseconds, from 1980 to tomorrow, or another column in "
                "data.columns.timestamp"
            )
        low, high = self.scale
        is_default_scale = low >= 0 and DEFAULT_SCALE[0] <= high <= DEFAULT_SCALE[1]
        if self.ratings.total() and settings.min_positive_rating is None and not is_default_scale:
            reached = "" if self.ratings[1] else f", and no number reaches {settings.positive_from:g}"
            raise TableError(
                f"the ratings of the log {self.path} are from {low:g} to {high:g}{reached}; without "
                "pairs.min_positive_rating they are read on a scale that ends at 4 to 5, so set "
                "pairs.min_positive_rating and pairs.max_negative_rating to the lowest rating of a song that a user "
                "likes and the highest of one that a user dislikes"
            )

    def lines(self, settings: PairSettings) -> list[str]:
        """Format the summary as one line, followed by one line for each warning."""
        parts = [f"{self.rows:,} rows"]
        if self.shape in TIMED:
            forms = ", ".join(f"{name} {count:,}" for name, count in zip(TIME_FORMS, self.forms, strict=True) if count)
            form = "%Y-%m-%d %H:%M:%S" if self.has_time_of_day else "%Y-%m-%d"
            ends = [f"{datetime.fromtimestamp(seconds, UTC):{form}}" for seconds in self.times if np.isfinite(seconds)]
            parts.append(f"timestamp {' to '.join(ends)} UTC ({forms})" if ends else f"timestamp ({forms})")
        if self.words:
            parts.append("feedback " + ", ".join(f"{word} {count:,}" for word, count in self.words.most_common(10)))
        if self.ratings.total():
            low, high = self.scale
            parts.append(
                f"ratings {low:g} to {high:g} ({self.ratings[1]:,} positive, from {settings.positive_from:g}; "
                f"{self.ratings[0]:,} neutral; {self.ratings[-1]:,} negative, "
                f"up to {settings.max_negative_rating:g})"
            )
        if self.weights[1] >= self.weights[0]:
            parts.append(f"weight {self.weights[0]:g} to {self.weights[1]:g} (play counts)")
        if self.unused:
            parts.append(f"not used: {', '.join(sorted(self.unused))}")
        lines = [f"log {self.path}: {self.shape} ({', '.join(COLUMNS[self.shape])}); {'; '.join(parts)}"]
        if self.shape is LogShape.PLAYS and not self.has_time_of_day and self.forms[1:].any():
            lines.append(
                f"warning: the log {self.path} knows days but no times; plays of one day have no order and form no "
                "directed pair"
            )
        if self.ratings.total() and not self.ratings[1]:
            lines.append(
                f"warning: no number of the log {self.path} reaches "
                f"pairs.min_positive_rating={settings.positive_from:g}"
            )
        return lines


def _wider(range_: tuple[float, float], numbers: npt.NDArray[np.float64]) -> tuple[float, float]:
    """Extend a range to include the finite ones of `numbers`."""
    finite = numbers[np.isfinite(numbers)]
    return (min(range_[0], finite.min()), max(range_[1], finite.max())) if finite.size else range_
