"""`htcl run`: every step in order, from the catalogue to the report, each only where its result does not exist yet."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from htcl_ray.pipelines.apply_gate import evaluate_and_judge
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.evaluate import check_columns, evaluate
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import check_cpus, finetune, pretrain
from htcl_ray.training.joint_space import joint_space
from htcl_ray.training.warm_start import check_source
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.storage import Workspace

STEPS = ("preprocess", "pretrain", "finetune", "embed", "index", "evaluate")
"""The steps in their order."""
T = TypeVar("T")


def run(
    config: Config, *, until: str = "evaluate", gate: str | None = None, report: Callable[[StepResult], None]
) -> StepResult:
    """Run the steps up to `until`; a finished one is skipped, and an interrupted one resumes.

    Stage 2 is left out without `data.interactions`, and the evaluation when no song is held out; both are printed.
    Earlier verdicts of gates do not stop a step, since the models of this configuration are built to be judged.
    `gate`: YAML or `default`, applied by the evaluation. `report` gets the result of each step. All steps share one
    connection to Ray. Raises InputError before Ray starts; StepError when a step or, after everything is written, the
    gate fails.
    """
    started = time.monotonic()
    _check(config, until, gate)
    config = config.with_overrides({"gate.require": "off"})
    results = build(config, until=until, report=report)
    if until == "evaluate" and (gate is not None or _has_held_out_songs(config, results["preprocess"])):
        model = (results.get("finetune") or results["pretrain"]).version
        if gate is None:
            results["evaluate"] = headed("evaluate", lambda: evaluate(config, model))
        else:
            results["evaluate"] = headed("evaluate", lambda: evaluate_and_judge(config, model, gate))
        report(results["evaluate"])
    last = results.get("index") or list(results.values())[-1]
    skipped = sum(result.skipped for result in results.values())
    made = f"{len(results)} steps, {skipped} of them already done"
    return StepResult("run", last.location, made, time.monotonic() - started)


def build(config: Config, *, until: str, report: Callable[[StepResult], None]) -> dict[str, StepResult]:
    """Run the steps that make the index, up to `until`; return their results by step."""
    results: dict[str, StepResult] = {}

    def model() -> str:
        return (results.get("finetune") or results["pretrain"]).version

    steps: dict[str, Callable[[], StepResult]] = {
        "preprocess": lambda: preprocess(config),
        "pretrain": lambda: pretrain(config),
        "finetune": lambda: finetune(config, model()),
        "embed": lambda: embed(config, model()),
        "index": lambda: build_index(config, model()),
    }
    for name, step in steps.items():
        if name == "finetune" and not config.data.interactions:
            print(
                "\nfinetune is left out: data.interactions names no log, so the models are those of stage 1", flush=True
            )
        else:
            results[name] = headed(name, step)
            report(results[name])
        if name == until:
            break
    return results


def headed(name: str, step: Callable[[], T]) -> T:
    """Print a heading, then run a step."""
    print(f"\n── {name} " + "─" * (60 - len(name)), flush=True)
    return step()


def _check(config: Config, until: str, gate: str | None) -> None:
    """Raise InputError for faults of the configuration that a later step would find after hours."""
    from htcl_ray.evaluation.gate import read_gate
    from htcl_ray.models.towers.text import check_text_settings

    reached = STEPS[: STEPS.index(until) + 1]
    if until == "finetune" and not config.data.interactions:
        raise ConfigError(
            "--until finetune needs preference pairs, but data.interactions is empty; name the log table(s) in it, or "
            "stop with --until pretrain"
        )
    if gate is not None:
        if until != "evaluate":
            raise ConfigError(
                f"--gate judges the evaluation, and --until {until} stops before it; leave one of them out"
            )
        read_gate(gate)
    if "evaluate" in reached:
        check_columns(config.evaluate.probe_columns)
    if "pretrain" in reached and config.pretrain.use_joint_space:
        joint_space(config)
    elif "pretrain" in reached:
        check_cpus(config, "pretrain", config.pretrain)
        check_text_settings(config.text)
        check_source(Workspace(config.workspace), config, "pretrain")
    if "finetune" in reached and config.data.interactions:
        check_cpus(config, "finetune", config.finetune)
        check_source(Workspace(config.workspace), config, "finetune")


def _has_held_out_songs(config: Config, features: StepResult) -> bool:
    """Whether the features have a song of `evaluate.split`; prints a sentence when they have none."""
    manifest = Workspace(config.workspace).manifest(f"features/{features.version}") or {}
    if manifest["quality"]["splits"].get(config.evaluate.split):
        return True
    print(
        f"\nevaluate is left out: no song is in the {config.evaluate.split} split; data.split_shares or "
        "data.split_column hold songs out",
        flush=True,
    )
    return False
