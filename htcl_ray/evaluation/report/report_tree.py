"""Content of `report.json`, its one-line summary, and its table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.table import Table

from htcl_ray.evaluation.evaluated_songs import BLEND
from htcl_ray.evaluation.metrics import headline_metrics, lower_is_better, metric_label, primary_metric
from htcl_ray.evaluation.stats.bootstrap import Estimate, comparable, difference, is_significant
from htcl_ray.evaluation.task_result import UPPER_BOUNDS, EvaluationResult, MetricKey, TaskResult, estimates

METHOD_LABELS = {
    "semantic": "stage 1",
    "preference": "stage 2",
    BLEND: "blend 0.5",
    "log_mel": "raw features",
    "genre": "genre labels",
    "artist_mean": "artist mean",
    "item_knn": "item-kNN",
    "als": "ALS",
}
"""Labels of methods; others go by their own name."""
IMPROVED, WORSE, NOT_SIGNIFICANT = "improved", "worse", "not shown"
"""Values of `verdict` in report.json; for people see `VERDICT_LABELS`."""
NOT_COMPARABLE = "not comparable"
"""Verdict of a difference between two test sets: other songs, users or candidates."""
VERDICT_LABELS = {
    IMPROVED: "improved",
    WORSE: "worse",
    NOT_SIGNIFICANT: "not significant",
    NOT_COMPARABLE: "not comparable",
}


def report_tree(
    described: Mapping[str, Any], result: EvaluationResult, more_tasks: Sequence[TaskResult] = ()
) -> tuple[dict[str, Any], dict[MetricKey, Estimate]]:
    """The content of report.json (see report_schema.py), and every metric with its resamples.

    `described`: run, format_version, created, command, config, inputs, libraries.
    """
    tasks = [*result.tasks, *more_tasks]
    metrics = estimates(tasks)
    tree = {
        **described,
        "data": result.data,
        "leakage": result.leakage,
        "tasks": {task.name: _task_tree(task) for task in tasks},
        "differences": differences(metrics, metrics, "preference", "semantic"),
        "baselines": baseline_differences(metrics, tasks, result.data["spaces"]),
        "pictures": result.plot_data,
    }
    return tree, metrics


def differences(
    first: Mapping[MetricKey, Estimate], second: Mapping[MetricKey, Estimate], method: str, against: str
) -> list[dict[str, Any]]:
    """Metrics of `method` in `first` minus those of `against` in `second`: paired, in the order of `first`."""
    rows = []
    for (task, of, metric), own in first.items():
        other = second.get((task, against, metric))
        if of == method and other is not None and task not in ("collapse", "determinism"):
            rows += _difference(task, metric, method, against, own, other)
    return rows


def baseline_differences(
    metrics: Mapping[MetricKey, Estimate], tasks: Sequence[TaskResult], spaces: Sequence[str]
) -> list[dict[str, Any]]:
    """For each task with a control: the primary metric of the best space minus that of each baseline."""
    rows = []
    for task in tasks:
        own = [space for space in spaces if space in task.methods]
        metric = primary_metric(task.methods[own[0]]) if own and task.control is not None else None
        values = (
            {space: metrics[task.name, space, metric].value for space in own if metric in task.methods[space]}
            if metric
            else {}
        )
        known = [space for space, value in values.items() if not math.isnan(value)]
        if metric is None or not known:
            continue
        best = max(known, key=lambda space: values[space])
        for against, of_method in task.methods.items():
            if against not in (*spaces, "shuffled", *UPPER_BOUNDS) and metric in of_method:
                rows += _difference(
                    task.name, metric, best, against, metrics[task.name, best, metric], of_method[metric]
                )
    return rows


def _difference(
    task: str, metric: str, method: str, against: str, own: Estimate, other: Estimate
) -> list[dict[str, Any]]:
    """One row, or none when a value is missing."""
    if math.isnan(own.value - other.value):
        return []
    gain = difference(own, other)
    low, high = gain.interval or (None, None)
    row = {
        "task": task,
        "figure": metric,
        "method": method,
        "against": against,
        "first": own.value,
        "second": other.value,
    }
    row |= {"value": gain.value, "low": low, "high": high, "n": gain.n}
    return [{**row, "verdict": verdict(metric, gain) if comparable(own, other) else NOT_COMPARABLE}]


def verdict(metric: str, gain: Estimate) -> str:
    """Verdict on a difference: improved or worse only when its interval excludes 0."""
    if not is_significant(gain):
        return NOT_SIGNIFICANT
    better = gain.value < 0 if lower_is_better(metric) else gain.value > 0
    return IMPROVED if better else WORSE


def table(report: Mapping[str, Any]) -> Table:
    """The headline metrics for a terminal: every space and the control of each task with a control."""
    heading = heading_of(report)
    result = Table(
        "",
        box=rich.box.SIMPLE,
        pad_edge=False,
        title=heading,
        title_justify="left",
        show_edge=False,
        min_width=len(heading),
    )
    columns = [*report["data"]["spaces"], "control"]
    for name in columns:
        result.add_column(METHOD_LABELS.get(name, name), justify="right", no_wrap=True)
    result.add_column("n", justify="right", no_wrap=True)
    for task in report["tasks"].values():
        methods = {name: task["methods"].get(task["control"] if name == "control" else name, {}) for name in columns}
        if task["control"] is None or not any(methods.values()):
            continue
        result.add_section()
        result.add_row(task["title"], style="bold")
        for metric in headline_metrics(list(dict.fromkeys(metric for of in methods.values() for metric in of))):
            cells = [cell(of.get(metric), metric) for of in methods.values()]
            count = max(of[metric]["n"] for of in methods.values() if metric in of)
            result.add_row(f"  {metric_label(metric)}", *cells, str(count))
    return result


def cell(item: Mapping[str, Any] | None, metric: str) -> str:
    """A metric in a terminal, marked ° when its difference from the control is not significant."""
    if item is None:
        return "–"
    return number(item["value"], metric) + ("°" if item["shown"] is False else "")


def phrase(report: Mapping[str, Any]) -> str:
    """One-line summary: text-to-audio of stage 1, then probe and cold-start songs of the last stage and of stage 1."""
    tasks = report["tasks"]
    last = "preference" if "preference" in report["data"]["spaces"] else "semantic"
    retrieval = tasks["text_to_audio"]["methods"]["semantic"]
    parts = [
        f"text→audio median rank {number(retrieval['median_rank']['value'], 'median_rank')} "
        f"of {report['data']['songs']}"
    ]
    for task, metric, title in (
        ("probe_genre", "accuracy", "genre probe"),
        ("cold", _largest_ndcg(report), "cold {metric}"),
    ):
        methods = tasks.get(task, {}).get("methods", {})
        if metric in methods.get(last, {}):
            title = title.format(metric=metric_label(metric))
            stage_1 = f" (stage 1: {methods['semantic'][metric]['value']:.2f})" if last != "semantic" else ""
            parts.append(f"{title} {methods[last][metric]['value']:.2f}{stage_1}")
    return ", ".join(parts)


def number(value: float | None, metric: str = "") -> str:
    """Format a value for people: three decimals, at most one for ranks, powers of ten for tiny differences."""
    if value is None or math.isnan(value):
        return "–"
    if "rank" in metric:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def heading_of(report: Mapping[str, Any]) -> str:
    """One line that describes the test set."""
    data = report["data"]
    return f"{data['songs']} {data['split']} songs by {data['artists']} artists, {data['unique_texts']} unique texts"


def _largest_ndcg(report: Mapping[str, Any]) -> str:
    metrics = report["tasks"].get("cold", {}).get("methods", {}).get("semantic", {})
    return max((name for name in metrics if name.startswith("ndcg@")), key=lambda name: int(name[5:]), default="")


def _task_tree(task: TaskResult) -> dict[str, Any]:
    control = task.methods.get(task.control or "", {})
    return {
        "title": task.title,
        "unit": task.unit,
        "over": task.over,
        "control": task.control,
        "counts": task.counts,
        "methods": {
            method: {
                metric: _metric_tree(item, None if method == task.control else control.get(metric))
                for metric, item in metrics.items()
            }
            for method, metrics in task.methods.items()
        },
    }


def _metric_tree(item: Estimate, control: Estimate | None) -> dict[str, Any]:
    low, high = item.interval or (None, None)
    value = None if math.isnan(item.value) else item.value
    significant = None if control is None else is_significant(difference(item, control))
    return {"value": value, "low": low, "high": high, "n": item.n, "shown": significant}
