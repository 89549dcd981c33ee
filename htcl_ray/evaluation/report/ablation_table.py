"""The table of an ablation: variants of the method beside the full one, with paired differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from htcl_ray.evaluation.report.report_tree import IMPROVED, NOT_SHOWN, WORSE, number, verdict
from htcl_ray.evaluation.report.resamples import Key
from htcl_ray.evaluation.stats.bootstrap import Estimate, difference

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
"""Task, figure and title of the table's columns; those that were not measured are left out."""


def ablation_tree(figures: Mapping[str, Mapping[Key, Estimate]]) -> dict[str, Any]:
    """`columns`, `variants` and `n` of the table, the last row chance.

    Of each variant the figures of the last stage that it has, with their differences from the full method and from
    chance.
    """
    full = figures[FULL]
    last = "preference" if any(method == "preference" for _, method, _ in full) else "semantic"
    columns = [(task, figure, title) for task, figure, title in COLUMNS if (task, last, figure) in full]
    variants = []
    for name, found in figures.items():
        cells = []
        for task, figure, _ in columns:
            ours = found.get((task, last, figure)) or found.get((task, "semantic", figure))
            compared = None if name == FULL else full[task, last, figure]
            cells.append(None if ours is None else _cell(figure, ours, compared, _chance(full, task, figure)))
        variants.append({"name": name, "figures": cells})
    chance = [_chance(full, task, figure) for task, figure, _ in columns]
    variants.append(
        {
            "name": CHANCE,
            "figures": [
                None if item is None else _cell(figure, item)
                for item, (_, figure, _) in zip(chance, columns, strict=True)
            ],
        }
    )
    return {
        "columns": [{"task": task, "figure": figure, "title": title} for task, figure, title in columns],
        "n": ", ".join(f"{title} {full[task, last, figure].n}" for task, figure, title in columns),
        "variants": variants,
    }


def _chance(full: Mapping[Key, Estimate], task: str, figure: str) -> Estimate | None:
    """The task's control: a random order, or always the commonest label."""
    return full.get((task, "random", figure)) or full.get((task, "commonest", figure))


def _cell(figure: str, ours: Estimate, full: Estimate | None = None, chance: Estimate | None = None) -> dict[str, Any]:
    low, high = ours.interval or (None, None)
    cell: dict[str, Any] = {"value": ours.value, "low": low, "high": high, "n": ours.n}
    for name, other in (("against_full", full), ("against_chance", chance)):
        cell[name] = None
        if other is not None:
            gain = difference(ours, other)
            between = gain.interval or (None, None)
            cell[name] = {"value": gain.value, "low": between[0], "high": between[1], "verdict": verdict(figure, gain)}
    return cell


def ablation_table(tree: Mapping[str, Any]) -> Table:
    """The table for a terminal: each figure, and whether its difference from the full method is shown."""
    result = Table(
        "variant",
        *(column["title"] for column in tree["columns"]),
        title="against the full method: ↓ worse, ↑ better, ° not shown",
    )
    marks = {WORSE: " ↓", IMPROVED: " ↑", NOT_SHOWN: " °"}
    for variant in tree["variants"]:
        cells = []
        for column, figure in zip(tree["columns"], variant["figures"], strict=True):
            against = figure and figure["against_full"]
            cells.append(
                "–"
                if figure is None
                else number(figure["value"], column["figure"]) + (marks[against["verdict"]] if against else "")
            )
        result.add_row(variant["name"], *cells)
    return result
