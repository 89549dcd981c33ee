"""`htcl evaluate --compare A B`: two finished reports side by side, with paired differences."""

from __future__ import annotations

import time
from typing import Any

import rich.box
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from htcl_ray.config import Config
from htcl_ray.errors import InputError, MismatchError
from htcl_ray.evaluation.report.comparison_page import comparison_html
from htcl_ray.evaluation.report.report_tree import (
    IMPROVED,
    NOT_COMPARABLE,
    NOT_SHOWN,
    TITLES,
    WORSE,
    differences,
    figure_title,
    number,
)
from htcl_ray.evaluation.stats.bootstrap import comparable
from htcl_ray.pipelines.evaluate import evaluate_reference, inputs_of, read_figures
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace


def compare(config: Config, first: str, second: str) -> StepResult:
    """Figures of report `second` minus those of `first`, method by method, written to
    reports/comparison-<fingerprint>/.

    Reports go by the name of their folder; its path will do. Differences are paired, on the same songs, users and
    candidates. When `first` asked other questions than `second`, as after songs or log rows were added, its models are
    evaluated on the test set and with the settings of `second`, and those figures take its place; where that is
    impossible the differences count as not comparable. Raises WorkspaceError for an unknown report and MismatchError
    when no figure is in both.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    first, second = (name.rstrip("/").rpartition("/")[2] for name in (first, second))
    before, after = read_figures(workspace, first), read_figures(workspace, second)
    reference, test_set = first, ""
    if any(not comparable(before[key], after[key]) for key in before.keys() & after.keys()):
        reference, test_set = _reference(workspace, config, first, second)
        before = read_figures(workspace, reference)
        print(f"compare  {test_set}", flush=True)
    spaces = list(dict.fromkeys(method for _, method, _ in after if method in TITLES))
    rows = [row for method in spaces for row in differences(after, before, method, method)]
    if not rows:
        raise MismatchError(
            f"reports {first} and {second} have no figure in common; expected two evaluations of the same kind of data"
        )
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in (IMPROVED, WORSE, NOT_SHOWN, NOT_COMPARABLE)
    }
    inputs = {"first": first, "second": second}
    described = {name: workspace.read_json(f"reports/{run}/manifest.json")["inputs"] for name, run in inputs.items()}
    path = f"reports/comparison-{fingerprint(first, second, reference)}"
    manifest = build_manifest("comparison", config=config.model_dump(mode="json"), inputs=inputs, quality=counts)
    tree = {
        "reports": inputs,
        "reference": reference,
        "test_set": test_set,
        "inputs": described,
        "created": manifest["created"],
        "differences": rows,
    }
    workspace.write_json(f"{path}/report.json", tree)
    workspace.write_bytes(f"{path}/report.html", comparison_html(tree).encode())
    workspace.finish(path, manifest)
    Console().print(_table(rows, first, second))
    summary = ", ".join(f"{count} {verdict}" for verdict, count in counts.items() if count or verdict != NOT_COMPARABLE)
    return StepResult(
        "compare", workspace.uri_of(path), f"from {first} to {second}: {summary}", time.monotonic() - started
    )


def _reference(workspace: Workspace, config: Config, first: str, second: str) -> tuple[str, str]:
    """The report of the models of `first` on the test set of `second`, or `first` when there can be none, and a
    sentence about it.
    """
    try:
        inputs = inputs_of(workspace, second)
        theirs = Config.model_validate(workspace.read_json(f"reports/{second}/manifest.json")["config"])
        evaluated = workspace.read_json(f"reports/{first}/manifest.json")["inputs"]
        models = artifacts.named_models(workspace, evaluated["preference"] or evaluated["semantic"])
        run = evaluate_reference(theirs.with_overrides({"workspace": config.workspace}), models, inputs)
    except (InputError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        failed = f"its models cannot be evaluated on the test set of {second} ({reason}), so the figures of both are not comparable"
        return first, f"report {first} asked other questions than {second}, and {failed}"
    return (
        run,
        f"report {first} asked other questions than {second}, so its models were evaluated on the test set of {second}: report {run}",
    )


def _table(rows: list[dict[str, Any]], first: str, second: str) -> Table:
    result = Table("figure", "method", first[:8], second[:8], "difference", "", box=rich.box.SIMPLE, show_edge=False)
    for row in rows:
        name = row["figure"]
        low, high = row["low"], row["high"]
        between = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
        figures = (number(row["second"], name), number(row["first"], name), f"{row['value']:+.3f}{between}")
        result.add_row(
            f"{row['task']} {figure_title(name)}", TITLES.get(row["method"], row["method"]), *figures, row["verdict"]
        )
    return result
