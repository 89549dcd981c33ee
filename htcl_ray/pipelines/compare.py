"""`htcl evaluate --compare A B`: paired differences of the metrics of two finished reports."""

from __future__ import annotations

import time
from typing import Any

import rich.box
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from htcl_ray.config import Config
from htcl_ray.errors import InputError, MismatchError
from htcl_ray.evaluation.metrics import metric_label
from htcl_ray.evaluation.report.comparison_page import comparison_html
from htcl_ray.evaluation.report.report_tree import (
    IMPROVED,
    METHOD_LABELS,
    NOT_COMPARABLE,
    NOT_SIGNIFICANT,
    VERDICT_LABELS,
    WORSE,
    differences,
    number,
)
from htcl_ray.evaluation.stats.bootstrap import comparable
from htcl_ray.pipelines.evaluate import evaluate_reference, read_metrics
from htcl_ray.pipelines.evaluation_inputs import inputs_of_report
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace


def compare(config: Config, first: str, second: str) -> StepResult:
    """Write the metrics of report `second` minus those of `first`, by method, to reports/comparison-<fingerprint>/.

    Reports are given by the name or the path of their folder. Differences are paired, on the same songs, users and
    candidates. When the test set of `first` differs, as after songs or log rows were added, its models are evaluated on
    the test set and with the settings of `second`, and these metrics take its place; where that is impossible, the
    differences are not comparable. Raises WorkspaceError for an unknown report and MismatchError when the reports have
    no common metric.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    first, second = (name.rstrip("/").rpartition("/")[2] for name in (first, second))
    before, after = read_metrics(workspace, first), read_metrics(workspace, second)
    reference, test_set = first, ""
    if any(not comparable(before[key], after[key]) for key in before.keys() & after.keys()):
        reference, test_set = _reference(workspace, config, first, second)
        before = read_metrics(workspace, reference)
        print(f"compare  {test_set}", flush=True)
    spaces = list(dict.fromkeys(method for _, method, _ in after if method in METHOD_LABELS))
    rows = [row for method in spaces for row in differences(after, before, method, method)]
    if not rows:
        raise MismatchError(
            f"reports {first} and {second} have no metric in common; expected two evaluations of the same kind of data"
        )
    counts = {
        verdict: sum(row["verdict"] == verdict for row in rows)
        for verdict in (IMPROVED, WORSE, NOT_SIGNIFICANT, NOT_COMPARABLE)
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
    summary = ", ".join(
        f"{count} {VERDICT_LABELS[verdict]}" for verdict, count in counts.items() if count or verdict != NOT_COMPARABLE
    )
    return StepResult(
        "compare", workspace.uri_of(path), f"from {first} to {second}: {summary}", time.monotonic() - started
    )


def _reference(workspace: Workspace, config: Config, first: str, second: str) -> tuple[str, str]:
    """The report of the models of `first` on the test set of `second`, and a sentence about it.

    `first` itself when its models cannot be evaluated on that test set.
    """
    try:
        inputs = inputs_of_report(workspace, second)
        settings = Config.model_validate(workspace.read_json(f"reports/{second}/manifest.json")["config"])
        evaluated = workspace.read_json(f"reports/{first}/manifest.json")["inputs"]
        models = artifacts.named_models(workspace, evaluated["preference"] or evaluated["semantic"])
        run = evaluate_reference(settings.with_overrides({"workspace": config.workspace}), models, inputs)
    except (InputError, ValidationError) as error:
        reason = str(error).splitlines()[0]
        return first, (
            f"reports {first} and {second} have different test sets, and the models of {first} cannot be evaluated on "
            f"the test set of {second} ({reason}), so their metrics are not comparable"
        )
    return run, (
        f"reports {first} and {second} have different test sets, so the models of {first} were evaluated on the test "
        f"set of {second}: report {run}"
    )


def _table(rows: list[dict[str, Any]], first: str, second: str) -> Table:
    result = Table("metric", "method", first[:8], second[:8], "difference", "", box=rich.box.SIMPLE, show_edge=False)
    for row in rows:
        name = row["figure"]
        low, high = row["low"], row["high"]
        between = "" if low is None else f" ({low:+.3f} to {high:+.3f})"
        values = (number(row["second"], name), number(row["first"], name), f"{row['value']:+.3f}{between}")
        result.add_row(
            f"{row['task']} {metric_label(name)}",
            METHOD_LABELS.get(row["method"], row["method"]),
            *values,
            VERDICT_LABELS[row["verdict"]],
        )
    return result
