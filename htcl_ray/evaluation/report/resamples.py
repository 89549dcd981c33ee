"""Figures with their resamples as a table, so that a gate or a comparison can take paired differences from a finished
report.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import Task

Key = tuple[str, str, str]
"""Task, method, figure."""

SCHEMA = pa.schema(
    [
        pa.field("task", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("figure", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("population", pa.string(), nullable=False),
        pa.field("resampled", pa.list_(pa.float32())),
    ]
)
"""`reports/<run>/figures.parquet`; see `bootstrap.Estimate`."""


def estimates(tasks: Iterable[Task]) -> dict[Key, Estimate]:
    """Every figure of the tasks by its key."""
    return {
        (task.name, method, figure): estimate
        for task in tasks
        for method, figures in task.methods.items()
        for figure, estimate in figures.items()
    }


def to_table(found: dict[Key, Estimate]) -> pa.Table:
    """Rows of SCHEMA."""
    rows = [
        (
            *key,
            float(item.value),
            item.n,
            item.population,
            None if item.resampled is None else item.resampled.astype(np.float32),
        )
        for key, item in found.items()
    ]
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def from_table(table: pa.Table) -> dict[Key, Estimate]:
    """What `to_table` was given."""
    found = {}
    for row in table.to_pylist():
        resampled = None if row["resampled"] is None else np.array(row["resampled"], dtype=np.float32)
        found[(row["task"], row["method"], row["figure"])] = Estimate(
            row["value"], row["n"], resampled, row["population"]
        )
    return found
