"""Quarantine: keep rejected rows with their reasons, count them, and fail the step above an allowed share."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.catalog.columns import example, unreadable
from htcl_ray.errors import InputError
from htcl_ray.schemas import QUARANTINE, Reason
from htcl_ray.workspace.credentials import without_credentials


def rejected_rows(
    song_ids: Sequence[str | None],
    rows: Sequence[int | None],
    source: str,
    reason: Reason,
    details: Sequence[str] | str,
) -> pa.Table:
    """Build rows of the quarantine table, schema QUARANTINE; `details` is one text for each row or one for all."""
    details = [
        without_credentials(detail) for detail in ([details] * len(rows) if isinstance(details, str) else details)
    ]
    columns = [
        list(song_ids),
        list(rows),
        [without_credentials(source)] * len(rows),
        [reason.value] * len(rows),
        details,
    ]
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, QUARANTINE, strict=True)], schema=QUARANTINE
    )


def count_reasons(rejected: pa.Table) -> dict[str, int]:
    """Count rejected rows by reason, most frequent first."""
    counts = {item["values"]: item["counts"] for item in pc.value_counts(rejected["reason"]).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe(counts: Mapping[str, int]) -> str:
    """Format counts by reason: `12 rejected (undecodable 9, too_short 3)`."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,} rejected" + (f" ({reasons})" if reasons else "")


@dataclass
class NullCells:
    """Counts of optional cells that could not be read and became null."""

    counts: Counter[str] = field(default_factory=Counter)
    """By column."""
    examples: dict[str, str] = field(default_factory=dict)
    """By column: cell, row and table of the first one."""

    def add(self, name: str, column: pa.ChunkedArray, converted: pa.Array, source: str, first_row: int) -> None:
        """Count the unreadable cells of one column of a batch."""
        rows = np.flatnonzero(unreadable(column, converted))
        if rows.size:
            self.counts[name] += rows.size
            self.examples.setdefault(
                name, f"{example(column, int(rows[0]))} in row {first_row + rows[0]} of {without_credentials(source)}"
            )

    def __str__(self) -> str:
        columns = "; ".join(
            f"{name} {count:,}, e.g. {self.examples[name]}" for name, count in self.counts.most_common()
        )
        return f"{self.counts.total():,} cells cannot be read and are null (rows count from 0): {columns}"


def examples(rejected: pa.Table) -> dict[str, str]:
    """Describe the first row of each reason: `row 3 of songs.csv (song 'a'): /music/a.wav does not exist`."""
    by_reason = {}
    for reason in count_reasons(rejected):
        row = rejected.slice(pc.index(rejected["reason"], reason).as_py(), 1).to_pylist()[0]
        place = row["source"] if row["row"] is None else f"row {row['row']} of {row['source']}"
        song = "" if row["song_id"] is None else f" (song '{row['song_id']}')"
        by_reason[reason] = f"{place}{song}: {row['detail']}"
    return by_reason


def check_share(
    table: str, counts: Mapping[str, int], rows: int, max_share: float, quarantine_path: str, example: str = ""
) -> None:
    """Raise InputError when more than the share `max_share` of a table's rows was rejected.

    `table` names the table in the message, which also points to the quarantine table at `quarantine_path`.
    """
    rejected = sum(counts.values())
    if rows and rejected / rows > max_share:
        instance = f", for instance {example}" if example else ""
        raise InputError(
            f"of {rows:,} rows of the {table}, {describe(counts)} is a share of {rejected / rows:.3f}, more than "
            f"data.max_rejected_share={max_share:g} allows{instance}; see {quarantine_path}, correct the input or "
            "raise that key"
        )
