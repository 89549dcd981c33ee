"""`htcl evaluate --gate`: evaluate the newest model, apply a gate, and record the verdict for serving."""

from __future__ import annotations

import dataclasses

import rich.box
from rich.console import Console
from rich.table import Table

from htcl_ray.config import Config
from htcl_ray.errors import InputError, StepError
from htcl_ray.evaluation.gate import DEFAULT, GateVerdict, judge, read_gate
from htcl_ray.evaluation.release_gate import record_verdicts
from htcl_ray.evaluation.report.report_page import html
from htcl_ray.evaluation.report.report_tree import number
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import MetricKey, estimates
from htcl_ray.evaluation.vector_checks import index_task
from htcl_ray.pipelines.evaluate import evaluate, evaluate_reference, read_metrics
from htcl_ray.pipelines.evaluation_inputs import EvaluationInputs, find_inputs
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.paths import absolute
from htcl_ray.workspace.storage import Workspace

Metrics = dict[MetricKey, Estimate]


def evaluate_and_judge(config: Config, model: str | None, gate_file: str) -> StepResult:
    """Evaluate, apply the gate, and record the verdict in the model, in its index, and in the report.

    `gate_file`: YAML, or `default` for the shipped gate. Raises ConfigError for an invalid gate, before the evaluation,
    and StepError when a bound does not hold, after everything is written.
    """
    result, verdict = judged_evaluation(config, model, gate_file)
    if not verdict.passed:
        raise StepError(result.summary)
    return result


def judged_evaluation(config: Config, model: str | None, gate_file: str) -> tuple[StepResult, GateVerdict]:
    """Like `evaluate_and_judge`, but return a failed gate as a result with the failure in its summary."""
    gate_file = gate_file if gate_file == DEFAULT else absolute(gate_file)
    gate = read_gate(gate_file)
    workspace = Workspace(config.workspace)
    inputs = find_inputs(workspace, config, model)
    result = evaluate(config, model, inputs)
    run = result.location.rstrip("/").rpartition("/")[2]
    index = _served_index(workspace, inputs) if any(bound.over_served for bound in gate.bounds) else None
    served, against, unmeasured = (None, None, None) if index is None else _served(workspace, config, inputs, index)
    verdict = judge(gate, read_metrics(workspace, run), served, unmeasured=unmeasured)
    record_verdicts(workspace, inputs.models, inputs.index, verdict, run)
    compared = {"index": index.version if index else None, "report": against}
    tree = {
        "passed": verdict.passed,
        "gate": gate_file,
        "served": compared,
        "results": [result.as_json() for result in verdict.results],
    }
    workspace.write_json(f"reports/{run}/gate.json", tree)
    workspace.write_bytes(
        f"reports/{run}/report.html", html(workspace.read_json(f"reports/{run}/report.json"), tree).encode()
    )
    Console().print(_table(verdict))
    if verdict.passed:
        summary = f"all {len(verdict.results)} bounds hold; {result.summary}"
    else:
        first = verdict.failed[0]
        summary = (
            f"the gate failed: {len(verdict.failed)} of {len(verdict.results)} bounds do not hold, first "
            f"{first.bound.description} ({first.note if first.value is None else f'measured {first.value:.4g}'}); "
            f"{result.location}/report.html has all of them"
        )
    return dataclasses.replace(result, step="gate", skipped=False, summary=summary), verdict


def _served_index(workspace: Workspace, inputs: EvaluationInputs) -> Artifact | None:
    """The index that `htcl serve` would load without this one: the newest other one that no gate has rejected."""
    for name, manifest in reversed(workspace.finished("index")):
        if manifest["inputs"].get("embeddings") == inputs.embeddings.version:
            continue
        index = Artifact(f"index/{name}", name, manifest)
        verdict = manifest.get("gate")
        if verdict is None:
            stages = [(stage, manifest["inputs"].get(stage)) for stage in ("semantic", "preference")]
            made_by = [
                Artifact(f"models/{stage}/{of}", of, workspace.manifest(f"models/{stage}/{of}") or {})
                for stage, of in stages
                if of
            ]
            if any(model.verdict is False for model in made_by):
                continue
        if index.verdict is not False:
            return index
    return None


def _served(
    workspace: Workspace, config: Config, inputs: EvaluationInputs, index: Artifact
) -> tuple[Metrics | None, str | None, str | None]:
    """Metrics of the models of this index on the test set of `inputs`, their report, or the reason for neither."""
    print(
        f"gate  compared with index {index.version}, whose models are evaluated on the same songs, users and "
        "candidates",
        flush=True,
    )
    try:
        run = evaluate_reference(config, artifacts.models_of(workspace, index), inputs)
    except InputError as error:
        print(f"gate  the models of index {index.version} cannot be evaluated on this test set: {error}", flush=True)
        return None, None, str(error)
    metrics = read_metrics(workspace, run)
    own = index_task(index.manifest)  # of the index as it is served, independent of the test set
    return metrics | estimates([own]), run, None


def _table(verdict: GateVerdict) -> Table:
    result = Table("bound", "measured", "", box=rich.box.SIMPLE, show_edge=False, pad_edge=False)
    for item in verdict.results:
        between = "" if item.low is None else f" ({number(item.low)} to {number(item.high)})"
        value = item.note if item.value is None else number(item.value, item.bound.figure) + between
        style = None if item.passed else "bold"
        result.add_row(item.bound.description, value, "holds" if item.passed else "fails", style=style)
    return result
