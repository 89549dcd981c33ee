"""The table of an ablation: variants of the method beside the full one, with paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from htcl_ray.evaluation.bootstrap import Estimate, difference
from htcl_ray.evaluation.report import IMPROVED, NOT_SHOWN, WORSE, number, verdict
from htcl_ray.evaluation.saved import Key

FULL = "full"
COLUMNS = (
    ("text_to_audio", "recall@10", "text→audio recall@10"),
    ("probe_genre", "accuracy", "genre probe"),
    ("cold", "ndcg@10", "cold NDCG@10"),
    ("cold", "user_auc", "cold user AUC"),
    ("cold", "item_auc", "cold item AUC"),
    ("hot", "ndcg@10", "hot NDCG@10"),
)
"""Task, figure and title of the table's columns; those that were not measured are left out."""


def ablation_tree(figures: Mapping[str, Mapping[Key, Estimate]]) -> dict[str, Any]:
    """`columns`, `variants` and `n` of the table: of each variant the last stage that it has, and its difference from the full method."""
    full = figures[FULL]
    last = "preference" if any(method == "preference" for _, method, _ in full) else "semantic"
    columns = [(task, figure, title) for task, figure, title in COLUMNS if (task, last, figure) in full]
    variants = []
    for name, found in figures.items():
        cells = []
        for task, figure, _ in columns:
            ours = found.get((task, last, figure)) or found.get((task, "semantic", figure))
            cells.append(None if ours is None else _cell(figure, ours, None if name == FULL else full[task, last, figure]))
        variants.append({"name": name, "figures": cells})
    return {
        "columns": [{"task": task, "figure": figure, "title": title} for task, figure, title in columns],
        "n": ", ".join(f"{title} {full[task, last, figure].n}" for task, figure, title in columns),
        "variants": variants,
    }


def _cell(figure: str, ours: Estimate, full: Estimate | None) -> dict[str, Any]:
    low, high = ours.interval or (None, None)
    cell: dict[str, Any] = {"value": ours.value, "low": low, "high": high, "n": ours.n, "against_full": None}
    if full is not None:
        gain = difference(ours, full)
        between = gain.interval or (None, None)
        cell["against_full"] = {"value": gain.value, "low": between[0], "high": between[1], "verdict": verdict(figure, gain)}
    return cell


def ablation_table(tree: Mapping[str, Any]) -> Table:
    """The table for a terminal: each figure, and whether its difference from the full method is shown."""
    result = Table(
        "variant", *(column["title"] for column in tree["columns"]), title="against the full method: ↓ worse, ↑ better, ° not shown"
    )
    marks = {WORSE: " ↓", IMPROVED: " ↑", NOT_SHOWN: " °"}
    for variant in tree["variants"]:
        cells = []
        for column, figure in zip(tree["columns"], variant["figures"], strict=True):
            against = figure and figure["against_full"]
            cells.append(
                "–" if figure is None else number(figure["value"], column["figure"]) + (marks[against["verdict"]] if against else "")
            )
        result.add_row(variant["name"], *cells)
    return result
