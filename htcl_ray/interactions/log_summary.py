"""What a log was recognised as: shape, time range, feedback and rating scale, with counts; and the refusal of what
cannot be meant.
"""

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

MOST_WORDS = 1000
DEFAULT_SCALE = (4.0, 5.0)
"""Largest ratings of the scales that the default of `pairs.min_positive_rating` is for."""


@dataclass
class LogSummary:
    """Counts over the parts of one log that have one shape."""

    path: str
    shape: LogShape
    rows: int = 0
    unused: set[str] = field(default_factory=set)
    """Log columns that the tables have and this shape does not use."""
    forms: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(len(TIME_FORMS), np.int64))
    """Timestamps by how they are written, as in TIME_FORMS."""
    times: tuple[float, float] = (np.inf, -np.inf)
    has_time_of_day: bool = False
    bad_time: str | None = None
    words: Counter[str] = field(default_factory=Counter)
    """Feedback that is no number."""
    ratings: Counter[int] = field(default_factory=Counter)
    """Ratings by value: 1 positive, 0 neutral, -1 negative."""
    scale: tuple[float, float] = (np.inf, -np.inf)
    weights: tuple[float, float] = (np.inf, -np.inf)

    def add_names(self, names: Sequence[str]) -> None:
        """Note the log columns, by our names, that tables of this log have."""
        self.unused |= {*LOG_COLUMNS} & {*names} - {*COLUMNS[self.shape], *OPTIONAL_COLUMNS[self.shape]}

    def add(self, table: pa.Table, settings: PairSettings) -> None:
        """Count a batch of rows; columns are called by our names."""
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
            self.words[word if word in self.words or len(self.words) < MOST_WORDS else "(other values)"] += item[
                "counts"
            ]

    def check(self, settings: PairSettings, max_rejected_share: float) -> None:
        """Raise TableError for unknown feedback, times that are none, and ratings of another scale than the configured
        one.
        """
        unknown = {word: count for word, count in self.words.items() if feedback_value(word, settings) is None}
        if sum(unknown.values()) > max_rejected_share * self.rows:
            shown = ", ".join(f"'{word}'" for word in sorted(unknown)[:5]) + (
                f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
            )
            raise TableError(
                f"the log {self.path} has unknown feedback values: {shown}; expected {', '.join(Feedback)} or numbers (ratings)"
            )
        if self.shape in TIMED and self.rows and self.forms[0] == self.rows:
            raise TableError(
                f"no timestamp of the log {self.path} can be read (the first is {self.bad_time}); expected ISO 8601, or epoch seconds, "
                "milliseconds or microseconds, from 1980 to tomorrow, or another column in data.columns.timestamp"
            )
        low, high = self.scale
        is_default_scale = low >= 0 and DEFAULT_SCALE[0] <= high <= DEFAULT_SCALE[1]
        if self.ratings.total() and settings.min_positive_rating is None and not is_default_scale:
            reached = "" if self.ratings[1] else f", and no number reaches {settings.positive_from:g}"
            raise TableError(
                f"the ratings of the log {self.path} are from {low:g} to {high:g}{reached}; without pairs.min_positive_rating they are "
                "read on a scale that ends at 4 to 5, so set pairs.min_positive_rating and pairs.max_negative_rating to the lowest rating "
                "of a song that a user likes and the highest of one that a user dislikes"
            )

    def lines(self, settings: PairSettings) -> list[str]:
        """What is printed: one line, and one for each warning."""
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
                f"ratings {low:g} to {high:g} ({self.ratings[1]:,} positive, from {settings.positive_from:g}; {self.ratings[0]:,} neutral; "
                f"{self.ratings[-1]:,} negative, up to {settings.max_negative_rating:g})"
            )
        if self.weights[1] >= self.weights[0]:
            parts.append(f"weight {self.weights[0]:g} to {self.weights[1]:g} (play counts)")
        if self.unused:
            parts.append(f"not used: {', '.join(sorted(self.unused))}")
        lines = [f"log {self.path}: {self.shape} ({', '.join(COLUMNS[self.shape])}); {'; '.join(parts)}"]
        if self.shape is LogShape.PLAYS and not self.has_time_of_day and self.forms[1:].any():
            lines.append(
                f"warning: the log {self.path} knows days but no times; plays of one day have no order and form no directed pair"
            )
        if self.ratings.total() and not self.ratings[1]:
            lines.append(
                f"warning: no number of the log {self.path} reaches pairs.min_positive_rating={settings.positive_from:g}"
            )
        return lines


def _wider(range_: tuple[float, float], numbers: npt.NDArray[np.float64]) -> tuple[float, float]:
    found = numbers[np.isfinite(numbers)]
    return (min(range_[0], found.min()), max(range_[1], found.max())) if found.size else range_
