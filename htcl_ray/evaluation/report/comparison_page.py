"""Self-contained HTML pages that compare several runs: two reports, or the variants of an ablation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import jinja2

from htcl_ray.evaluation.metrics import metric_label
from htcl_ray.evaluation.report.report_tree import (
    IMPROVED,
    METHOD_LABELS,
    NOT_COMPARABLE,
    NOT_SIGNIFICANT,
    VERDICT_LABELS,
    WORSE,
    number,
)

SHADES = {IMPROVED: "good", WORSE: "bad", NOT_SIGNIFICANT: "faint", NOT_COMPARABLE: "faint"}


def comparison_html(tree: Mapping[str, Any]) -> str:
    """Two reports: both values of each metric, and the paired difference."""
    reports = tree["reports"]
    rows = [
        [
            _cell(f"{row['task']} {metric_label(row['figure'])}"),
            _cell(METHOD_LABELS.get(row["method"], row["method"])),
            _cell(number(row["second"], row["figure"])),
            _cell(number(row["first"], row["figure"])),
            _cell(f"{row['value']:+.3f}", _between(row)),
            _cell(VERDICT_LABELS[row["verdict"]], shade=SHADES[row["verdict"]]),
        ]
        for row in tree["differences"]
    ]
    changed = [
        f"{name} {tree['inputs']['first'][name] or 'none'} → {version or 'none'}"
        for name, version in tree["inputs"]["second"].items()
        if tree["inputs"]["first"].get(name) != version and name in tree["inputs"]["first"]
    ]
    lead = (
        f"{tree['created']}. Intervals: 95 %, paired. Changed: {', '.join(changed) or 'nothing but settings'}. "
        f"{tree['test_set']}"
    )
    header = ["metric", "method", reports["first"], reports["second"], "difference", ""]
    return _page(f"From report {reports['first']} to {reports['second']}", lead, header, rows)


def ablation_html(tree: Mapping[str, Any]) -> str:
    """The table of an ablation: variants as rows, metrics as columns, with the difference from the full method."""
    columns: Sequence[Mapping[str, str]] = tree["columns"]
    rows = []
    for variant in tree["variants"]:
        cells = [_cell(variant["name"])]
        for column, item in zip(columns, variant["figures"], strict=True):
            if item is None:
                cells.append(_cell("–"))
                continue
            against = item["against_full"]
            small = ""
            if against is not None:
                small = f"{against['value']:+.3f} {_between(against)} {VERDICT_LABELS[against['verdict']]}"
            if item["against_chance"] and item["against_chance"]["verdict"] == NOT_SIGNIFICANT:
                small += ", not above chance"
            shade = SHADES[against["verdict"]] if against else ""
            cells.append(_cell(number(item["value"], column["figure"]), small, shade))
        rows.append(cells)
    lead = (
        f"{tree['created']}. Small print: difference from the full method with its paired 95 % interval. "
        f"n: {tree['n']}."
    )
    return _page("Ablations", lead, ["variant", *(column["title"] for column in columns)], rows)


def _between(row: Mapping[str, Any]) -> str:
    return "" if row["low"] is None else f"({row['low']:+.3f} to {row['high']:+.3f})"


def _cell(text: str, small: str = "", shade: str = "") -> dict[str, str]:
    return {"text": text, "small": small, "shade": shade}


def _page(title: str, lead: str, header: Sequence[str], rows: Sequence[Sequence[Mapping[str, str]]]) -> str:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = resources.files("htcl_ray.evaluation.report").joinpath("comparison.html").read_text(encoding="utf-8")
    return environment.from_string(page).render(title=title, lead=lead, header=header, rows=rows)
