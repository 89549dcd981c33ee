"""The table of an ablation: variants of the method against the full one, with paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from htcl_ray.evaluation.report.report_tree import IMPROVED, NOT_SIGNIFICANT, WORSE, number, verdict
from htcl_ray.evaluation.stats.bootstrap import Estimate, difference
from htcl_ray.evaluation.task_result import MetricKey

FULL = "full"
CHANCE = "chance"
COLUMNS = (
    ("text_to_audio", "recall@10", "text→audio recall@10"),
    ("probe_genre", "accuracy", "genre probe"),
    ("cold", "ndcg@10", "cold NDCG@10"),
    ("cold", "user_auc", "cold user AUC"),
    ("cold_known_users", "item_auc", "cold item AUC, known users"),
    ("hot", "ndcg@10", "hot NDCG@10"),
)
"""Task, metric and title of the columns; metrics that were not measured are left out."""


def ablation_tree(reports: Mapping[str, Mapping[MetricKey, Estimate]]) -> dict[str, Any]:
    """`columns`, `variants` and `n` of the table; the last row is chance.

    `reports`: metrics of each variant. A row has the metrics of the last stage of the variant, with their differences
    from the full method and from chance.
    """
    full = reports[FULL]
    last = "preference" if any(method == "preference" for _, method, _ in full) else "semantic"
    columns = [(task, metric, title) for task, metric, title in COLUMNS if (task, last, metric) in full]
    variants = []
    for name, metrics in reports.items():
        cells = []
        for task, metric, _ in columns:
            own = metrics.get((task, last, metric)) or metrics.get((task, "semantic", metric))
            compared = None if name == FULL else full[task, last, metric]
            cells.append(None if own is None else _cell(metric, own, compared, _chance(full, task, metric)))
        variants.append({"name": name, "figures": cells})
    chance = [_chance(full, task, metric) for task, metric, _ in columns]
    variants.append(
        {
            "name": CHANCE,
            "figures": [
                None if item is None else _cell(metric, item)
                for item, (_, metric, _) in zip(chance, columns, strict=True)
            ],
        }
    )
    return {
        "columns": [{"task": task, "figure": metric, "title": title} for task, metric, title in columns],
        "n": ", ".join(f"{title} {full[task, last, metric].n}" for task, metric, title in columns),
        "variants": variants,
    }


def _chance(full: Mapping[MetricKey, Estimate], task: str, metric: str) -> Estimate | None:
    """The control of the task: a random order, or always the most frequent label."""
    return full.get((task, "random", metric)) or full.get((task, "commonest", metric))


def _cell(metric: str, own: Estimate, full: Estimate | None = None, chance: Estimate | None = None) -> dict[str, Any]:
    low, high = own.interval or (None, None)
    cell: dict[str, Any] = {"value": own.value, "low": low, "high": high, "n": own.n}
    for name, other in (("against_full", full), ("against_chance", chance)):
        cell[name] = None
        if other is not None:
            gain = difference(own, other)
            between = gain.interval or (None, None)
            cell[name] = {"value": gain.value, "low": between[0], "high": between[1], "verdict": verdict(metric, gain)}
    return cell


def ablation_table(tree: Mapping[str, Any]) -> Table:
    """The table for a terminal: each metric, and whether its difference from the full method is significant."""
    result = Table(
        "variant",
        *(column["title"] for column in tree["columns"]),
        title="against the full method: ↓ worse, ↑ better, ° not significant",
    )
    marks = {WORSE: " ↓", IMPROVED: " ↑", NOT_SIGNIFICANT: " °"}
    for variant in tree["variants"]:
        cells = []
        for column, item in zip(tree["columns"], variant["figures"], strict=True):
            against = item and item["against_full"]
            cells.append(
                "–"
                if item is None
                else number(item["value"], column["figure"]) + (marks[against["verdict"]] if against else "")
            )
        result.add_row(variant["name"], *cells)
    return result
