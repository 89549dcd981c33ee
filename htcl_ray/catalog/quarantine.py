"""Rejected rows: kept with their reason, counted for a person, and too many of them fail the step."""

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
    """Rows of the quarantine table; `details` is one text for each row or one for all."""
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
    """Rejected rows by reason, most frequent first."""
    counts = {item["values"]: item["counts"] for item in pc.value_counts(rejected["reason"]).to_pylist()}
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def describe(counts: Mapping[str, int]) -> str:
    """`12 rejected (undecodable 9, too_short 3)`."""
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
    return f"{sum(counts.values()):,} rejected" + (f" ({reasons})" if reasons else "")


@dataclass
class NullCells:
    """Optional cells that hold something and could not be read; they are null."""

    counts: Counter[str] = field(default_factory=Counter)
    """By column."""
    examples: dict[str, str] = field(default_factory=dict)
    """Row, table and cell of the first one of each column."""

    def add(self, name: str, column: pa.ChunkedArray, converted: pa.Array, source: str, first_row: int) -> None:
        """Count the unreadable cells of one column of a batch."""
        rows = np.flatnonzero(unreadable(column, converted))
        if rows.size:
            self.counts[name] += rows.size
            self.examples.setdefault(
                name, f"{example(column, int(rows[0]))} in row {first_row + rows[0]} of {without_credentials(source)}"
            )

    def __str__(self) -> str:
        found = "; ".join(f"{name} {count:,}, e.g. {self.examples[name]}" for name, count in self.counts.most_common())
        return f"{self.counts.total():,} cells cannot be read and are null (rows count from 0): {found}"


def examples(rejected: pa.Table) -> dict[str, str]:
    """The first row of each reason: `row 3 of songs.csv (song 'a'): /music/a.wav does not exist`."""
    found = {}
    for reason in count_reasons(rejected):
        row = rejected.slice(pc.index(rejected["reason"], reason).as_py(), 1).to_pylist()[0]
        place = row["source"] if row["row"] is None else f"row {row['row']} of {row['source']}"
        song = "" if row["song_id"] is None else f" (song '{row['song_id']}')"
        found[reason] = f"{place}{song}: {row['detail']}"
    return found


def check_share(what: str, counts: Mapping[str, int], rows: int, largest: float, where: str, example: str = "") -> None:
    """Raise InputError when more than the share `largest` of a table's rows was rejected. `where`: the quarantine
    table, written before.
    """
    rejected = sum(counts.values())
    if rows and rejected / rows > largest:
        such = f", for instance {example}" if example else ""
        raise InputError(
            f"of {rows:,} rows of the {what}, {describe(counts)} is a share of {rejected / rows:.3f}, more than "
            f"data.max_rejected_share={largest:g} allows{such}; see {where}, correct the input or raise that key"
        )
