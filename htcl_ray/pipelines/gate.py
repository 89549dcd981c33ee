"""`htcl evaluate --gate`: the newest model is evaluated, held against bounds, and the verdict recorded where serving looks for it."""

from __future__ import annotations

import dataclasses

import rich.box
from rich.console import Console
from rich.table import Table

from htcl_ray.artifacts import StepResult
from htcl_ray.config import Config
from htcl_ray.errors import StepError
from htcl_ray.evaluation.bootstrap import Estimate
from htcl_ray.evaluation.gate import DEFAULT, Verdict, judge, read_gate
from htcl_ray.evaluation.report import number
from htcl_ray.evaluation.report_page import html
from htcl_ray.evaluation.saved import Key
from htcl_ray.paths import absolute
from htcl_ray.pipelines.evaluate import Inputs, evaluate, find_inputs, read_figures
from htcl_ray.storage import Workspace
from htcl_ray.verdicts import record_verdicts


def evaluate_and_judge(config: Config, model: str | None, gate_file: str) -> StepResult:
    """Evaluate, judge, and record the verdict in the model, in its index, and in the report.

    `gate_file`: YAML, or `default` for the shipped gate. Raises ConfigError for a gate that cannot be used, before anything is measured,
    and StepError when a bound does not hold, after everything is written.
    """
    result, verdict = judged_evaluation(config, model, gate_file)
    if not verdict.passed:
        raise StepError(result.summary)
    return result


def judged_evaluation(config: Config, model: str | None, gate_file: str) -> tuple[StepResult, Verdict]:
    """As `evaluate_and_judge`, but a gate that failed is a result whose summary says so."""
    gate_file = gate_file if gate_file == DEFAULT else absolute(gate_file)
    gate = read_gate(gate_file)
    workspace = Workspace(config.workspace)
    inputs = find_inputs(workspace, config, model)
    result = evaluate(config, model, inputs)
    run = result.location.rstrip("/").rpartition("/")[2]
    verdict = judge(gate, read_figures(workspace, run), _served(workspace, inputs))
    record_verdicts(workspace, inputs.models, inputs.index, verdict, run)
    tree = {"passed": verdict.passed, "gate": gate_file, "results": [found.as_json() for found in verdict.results]}
    workspace.write_json(f"reports/{run}/gate.json", tree)
    workspace.write_bytes(f"reports/{run}/report.html", html(workspace.read_json(f"reports/{run}/report.json"), tree).encode())
    Console().print(_table(verdict))
    if verdict.passed:
        summary = f"all {len(verdict.results)} bounds hold; {result.summary}"
    else:
        first = verdict.failed[0]
        summary = (
            f"the gate failed: {len(verdict.failed)} of {len(verdict.results)} bounds do not hold, first {first.bound.asked}"
            f"{'' if first.value is None else f' (found {first.value:.4g})'}; {result.location}/report.html has all of them"
        )
    return dataclasses.replace(result, step="gate", skipped=False, summary=summary), verdict


def _served(workspace: Workspace, inputs: Inputs) -> dict[Key, Estimate] | None:
    """The figures of the newest other index that a gate let through: what `htcl serve` would take without this one."""
    for name, manifest in reversed(workspace.finished("index")):
        gate = manifest.get("gate") or {}
        if gate.get("passed") and manifest["inputs"].get("embeddings") != inputs.embeddings.version:
            print(f"gate  compared with index {name}, the newest accepted", flush=True)
            return read_figures(workspace, gate["report"])
    return None


def _table(verdict: Verdict) -> Table:
    result = Table("bound", "found", "", box=rich.box.SIMPLE, show_edge=False, pad_edge=False)
    for found in verdict.results:
        between = "" if found.low is None else f" ({number(found.low)} to {number(found.high)})"
        value = found.note if found.value is None else number(found.value, found.bound.figure) + between
        result.add_row(found.bound.asked, value, "holds" if found.passed else "fails", style=None if found.passed else "bold")
    return result
