"""Results of evaluation tasks: the metrics of several methods on the same queries, with their resamples."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from htcl_ray.evaluation.stats.bootstrap import Estimate

MetricKey = tuple[str, str, str]
"""Task, method, metric."""

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
"""`reports/<run>/figures.parquet`, a row for each metric of each method; see `bootstrap.Estimate`."""


ORACLE, BEST = "oracle", "best"
"""Methods that know the truth: vectors of true traits in recommendation, and ideal rankings in retrieval by tags."""
UPPER_BOUNDS = (ORACLE, BEST)


@dataclass(frozen=True)
class TaskResult:
    """Metrics of several methods on the same queries."""

    name: str
    """Key in the report and in the bounds of a gate, such as `text_to_audio`."""
    title: str
    """For people, such as `text → audio`."""
    unit: str
    """Unit of `n`, in the plural: texts, songs, users."""
    over: str
    """Clusters that the intervals resample: artists or users."""
    control: str | None
    """The method without information: a metric is significant when its paired difference from this method is."""
    methods: dict[str, dict[str, Estimate]]
    """By method (a space of the model, a baseline or a control) and metric."""
    counts: dict[str, int] = field(default_factory=dict)
    """Number of queries, candidates and excluded rows."""


@dataclass(frozen=True)
class EvaluationResult:
    """Everything that an evaluation measures, before it becomes a report."""

    data: dict[str, Any]
    """Numbers of songs, artists and texts, and the spaces."""
    leakage: dict[str, Any]
    """See `leakage.leakage`."""
    tasks: list[TaskResult]
    plot_data: dict[str, Any]
    """See `plot_data.plot_data`; in addition `blend_curve`, None without stage 2 or without a log."""


def estimates(tasks: Iterable[TaskResult]) -> dict[MetricKey, Estimate]:
    """Every metric of the tasks by its key."""
    return {
        (task.name, method, metric): estimate
        for task in tasks
        for method, metrics in task.methods.items()
        for metric, estimate in metrics.items()
    }


def to_table(metrics: dict[MetricKey, Estimate]) -> pa.Table:
    """Write metrics and their resamples as rows of `SCHEMA`."""
    rows = [
        (
            *key,
            float(item.value),
            item.n,
            item.population,
            None if item.resampled is None else item.resampled.astype(np.float32),
        )
        for key, item in metrics.items()
    ]
    return pa.Table.from_pylist([dict(zip(SCHEMA.names, row, strict=True)) for row in rows], schema=SCHEMA)


def from_table(table: pa.Table) -> dict[MetricKey, Estimate]:
    """Read the rows of `to_table`."""
    metrics = {}
    for row in table.to_pylist():
        resampled = None if row["resampled"] is None else np.array(row["resampled"], dtype=np.float32)
        key = (row["task"], row["method"], row["figure"])
        metrics[key] = Estimate(row["value"], row["n"], resampled, row["population"])
    return metrics
