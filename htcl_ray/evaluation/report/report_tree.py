"""The report of one evaluation as a tree: `report.json`, its headline, and its table for a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import rich.box
from rich.table import Table

from htcl_ray.evaluation.evaluated_songs import BLEND
from htcl_ray.evaluation.report.resamples import Key, estimates
from htcl_ray.evaluation.stats.bootstrap import Estimate, comparable, difference, is_shown
from htcl_ray.evaluation.task_result import Measured, Task, lower_is_better

TITLES = {
    "semantic": "stage 1",
    "preference": "stage 2",
    BLEND: "blend 0.5",
    "log_mel": "log-mel",
    "genre": "genre labels",
    "item_knn": "item-kNN",
    "als": "ALS",
}
"""Of methods; others go by their own name."""
FIGURES = {
    "median_rank": "median rank",
    "mrr": "MRR",
    "hit_rate": "HR",
    "ndcg": "NDCG",
    "user_auc": "user AUC",
    "item_auc": "item AUC",
    "roc_auc": "ROC-AUC",
    "map": "mAP",
    "accuracy_folds": "accuracy, folds",
    "knn_accuracy": "kNN accuracy",
    "knn_accuracy_folds": "kNN accuracy, folds",
    "knn_roc_auc": "kNN ROC-AUC",
    "knn_map": "kNN mAP",
}
HEADLINES = ("recall", "median_rank", "accuracy", "roc_auc", "map", "ndcg", "user_auc", "item_auc")
"""Figures of which the summary and the terminal speak, of several k the largest; all others are in the tables of the
page."""
PRIMARY = ("ndcg", "accuracy", "roc_auc", "recall")
"""Of HEADLINES, the metrics that a task is judged by, the first that it has; more is better of each."""
IMPROVED, WORSE, NOT_SHOWN = "improved", "worse", "not shown"
NOT_COMPARABLE = "not comparable"
"""Of a difference between two test sets: other songs, users or candidates."""


def report_tree(
    described: Mapping[str, Any], measured: Measured, more_tasks: Sequence[Task] = ()
) -> tuple[dict[str, Any], dict[Key, Estimate]]:
    """The content of report.json (see report_model.py), and every figure with its resamples.

    `described`: run, format_version, created, command, config, inputs, libraries.
    """
    tasks = [*measured.tasks, *more_tasks]
    found = estimates(tasks)
    tree = {
        **described,
        "data": measured.data,
        "leakage": measured.leakage,
        "tasks": {task.name: _task_tree(task) for task in tasks},
        "differences": differences(found, found, "preference", "semantic"),
        "baselines": baseline_differences(found, tasks, measured.data["spaces"]),
        "pictures": measured.pictures,
    }
    return tree, found


def differences(
    first: Mapping[Key, Estimate], second: Mapping[Key, Estimate], method: str, against: str
) -> list[dict[str, Any]]:
    """Figures of `method` in `first` minus those of `against` in `second`: paired, and in the order of `first`."""
    rows = []
    for (task, of, figure), ours in first.items():
        theirs = second.get((task, against, figure))
        if of == method and theirs is not None and task not in ("collapse", "determinism"):
            rows += _difference(task, figure, method, against, ours, theirs)
    return rows


def baseline_differences(
    found: Mapping[Key, Estimate], tasks: Sequence[Task], spaces: Sequence[str]
) -> list[dict[str, Any]]:
    """For each task with a control: the first metric of the best space minus that of each method that needs no
    model.
    """
    rows = []
    for task in tasks:
        ours = [space for space in spaces if space in task.methods]
        figure = primary_figure(task.methods[ours[0]]) if ours and task.control is not None else None
        values = (
            {space: found[task.name, space, figure].value for space in ours if figure in task.methods[space]}
            if figure
            else {}
        )
        known = [space for space, value in values.items() if not math.isnan(value)]
        if figure is None or not known:
            continue
        best = max(known, key=lambda space: values[space])
        for against, figures in task.methods.items():
            if against not in (*spaces, "shuffled") and figure in figures:
                rows += _difference(task.name, figure, best, against, found[task.name, best, figure], figures[figure])
    return rows


def primary_figure(figures: Iterable[str]) -> str | None:
    """The metric by which a task is judged: NDCG, accuracy, ROC-AUC or recall, of several k the largest; None without
    any of them.
    """
    headlines = headline_figures(list(figures))
    return next((figure for name in PRIMARY for figure in headlines if figure.partition("@")[0] == name), None)


def _difference(
    task: str, figure: str, method: str, against: str, ours: Estimate, theirs: Estimate
) -> list[dict[str, Any]]:
    """One row, or none when a value is missing."""
    if math.isnan(ours.value - theirs.value):
        return []
    gain = difference(ours, theirs)
    low, high = gain.interval or (None, None)
    row = {
        "task": task,
        "figure": figure,
        "method": method,
        "against": against,
        "first": ours.value,
        "second": theirs.value,
    }
    row |= {"value": gain.value, "low": low, "high": high, "n": gain.n}
    return [{**row, "verdict": verdict(figure, gain) if comparable(ours, theirs) else NOT_COMPARABLE}]


def verdict(figure: str, gain: Estimate) -> str:
    """What a difference says: improved or worse only when its interval does not hold 0."""
    if not is_shown(gain):
        return NOT_SHOWN
    better = gain.value < 0 if lower_is_better(figure) else gain.value > 0
    return IMPROVED if better else WORSE


def table(report: Mapping[str, Any]) -> Table:
    """The headlines for a terminal: for each task with a control the figures of every space beside it."""
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
        result.add_column(TITLES.get(name, name), justify="right", no_wrap=True)
    result.add_column("n", justify="right", no_wrap=True)
    for task in report["tasks"].values():
        methods = {name: task["methods"].get(task["control"] if name == "control" else name, {}) for name in columns}
        if task["control"] is None or not any(methods.values()):
            continue
        result.add_section()
        result.add_row(task["title"], style="bold")
        for figure in headline_figures(list(dict.fromkeys(figure for found in methods.values() for figure in found))):
            cells = [cell(found.get(figure), figure) for found in methods.values()]
            count = max(found[figure]["n"] for found in methods.values() if figure in found)
            result.add_row(f"  {figure_title(figure)}", *cells, str(count))
    return result


def headline_figures(figures: Sequence[str]) -> list[str]:
    """Those of HEADLINES, in the order given; of `recall@1`, `recall@5` the last."""
    largest: dict[str, int] = {}
    for figure in figures:
        name, _, k = figure.partition("@")
        largest[name] = max(largest.get(name, 0), int(k or 0))
    return [
        figure
        for figure in figures
        if (name := figure.partition("@")[0]) in HEADLINES and int(figure.partition("@")[2] or 0) == largest[name]
    ]


def cell(figure: Mapping[str, Any] | None, name: str) -> str:
    """A figure in a terminal: with ° when it is not shown to differ from the control."""
    if figure is None:
        return "–"
    return number(figure["value"], name) + ("°" if figure["shown"] is False else "")


def phrase(report: Mapping[str, Any]) -> str:
    """The headline: text → audio of stage 1, then probe and cold songs of the last stage beside stage 1."""
    tasks = report["tasks"]
    last = "preference" if "preference" in report["data"]["spaces"] else "semantic"
    retrieval = tasks["text_to_audio"]["methods"]["semantic"]
    parts = [
        f"text→audio median rank {number(retrieval['median_rank']['value'], 'median_rank')} of {report['data']['songs']}"
    ]
    for task, figure, title in (
        ("probe_genre", "accuracy", "genre probe"),
        ("cold", _largest_ndcg(report), "cold {figure}"),
    ):
        methods = tasks.get(task, {}).get("methods", {})
        if figure in methods.get(last, {}):
            title = title.format(figure=figure_title(figure))
            beside = f" (stage 1: {methods['semantic'][figure]['value']:.2f})" if last != "semantic" else ""
            parts.append(f"{title} {methods[last][figure]['value']:.2f}{beside}")
    return ", ".join(parts)


def number(value: float | None, figure: str = "") -> str:
    """A figure as people read it: rates with three decimals, ranks with at most one, tiny differences as powers of
    ten.
    """
    if value is None or math.isnan(value):
        return "–"
    if "rank" in figure:
        return f"{value:.1f}".removesuffix(".0")
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def figure_title(figure: str) -> str:
    """A figure's name for people."""
    name, _, k = figure.partition("@")
    short = FIGURES.get(name, name.replace("_", " "))
    return f"{short}@{k}" if k else short


def heading_of(report: Mapping[str, Any]) -> str:
    """What was asked, in a line."""
    data = report["data"]
    return f"{data['songs']} {data['split']} songs by {data['artists']} artists, {data['unique_texts']} unique texts"


def _largest_ndcg(report: Mapping[str, Any]) -> str:
    figures = report["tasks"].get("cold", {}).get("methods", {}).get("semantic", {})
    return max((name for name in figures if name.startswith("ndcg@")), key=lambda name: int(name[5:]), default="")


def _task_tree(task: Task) -> dict[str, Any]:
    control = task.methods.get(task.control or "", {})
    return {
        "title": task.title,
        "unit": task.unit,
        "over": task.over,
        "control": task.control,
        "counts": task.counts,
        "methods": {
            method: {
                figure: _figure_tree(item, None if method == task.control else control.get(figure))
                for figure, item in figures.items()
            }
            for method, figures in task.methods.items()
        },
    }


def _figure_tree(item: Estimate, control: Estimate | None) -> dict[str, Any]:
    low, high = item.interval or (None, None)
    value = None if math.isnan(item.value) else item.value
    shown = None if control is None else is_shown(difference(item, control))
    return {"value": value, "low": low, "high": high, "n": item.n, "shown": shown}
