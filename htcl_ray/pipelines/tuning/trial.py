"""One trial of a search: the stages that it trains on Ray Train, inside a function of Ray Tune.

The function itself only waits for Ray Train, so it reserves nothing but a crumb of the head node, where it outlives the
nodes of its workers. A trial whose search was killed goes on after its last checkpoint when a new one gives it the same
number.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from htcl_ray.config import Config
from htcl_ray.pipelines.train import StageRun, check_data, fit_stage, publish
from htcl_ray.tuning.budget import Budget, trial_config
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.trials import read_trials
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class TrialJob:
    """What all trials of a study share."""

    config: Config
    study: str
    """Folder of the study, below the workspace's root."""
    budgets: Mapping[str, Budget]
    """By stage, in order."""
    features: Artifact
    pairs: Artifact | None
    """Stage 2."""
    parent: Artifact | None
    """Stage 2 alone: the semantic model that every trial starts from."""
    vocabulary: str | None
    """Of the configured text tower, if stage 1 makes one from scratch."""


def trial_folder(study: str, number: int) -> str:
    """Folder of a trial, below the workspace's root."""
    return f"{study}/trials/{number:04d}"


def trial_version(study: str, number: int) -> str:
    """Name of a trial's runs, also where MLflow and W&B show them."""
    return f"{study.rpartition('/')[2]}-{number:04d}"


def run_trial(point: Mapping[str, Any], job: TrialJob, lines: Any) -> None:
    """Train the stages of one point of the space: `number` and `parameters`. The last stage's epochs are reported to
    Ray Tune.

    `lines`: see `cluster.progress_lines`.
    """
    from ray.exceptions import RayActorError

    from htcl_ray.pipelines.tuning.report_to_tune import ReportToTune

    number, parameters = point["number"], point["parameters"]
    config = trial_config(job.config, parameters, job.budgets)
    workspace = Workspace(config.workspace)
    parent = job.parent
    cost: list[dict[str, float]] = []
    for name in job.budgets:
        second, last = name == "finetune", name == list(job.budgets)[-1]
        stage = StageRun(
            step=name,
            space="preference" if second else "semantic",
            settings=getattr(config, name),
            features=job.features,
            pairs=job.pairs if second else None,
            parent=parent if second else None,
            version=trial_version(job.study, number),
            folder=f"{trial_folder(job.study, number)}/",
        )
        manifest = workspace.manifest(stage.model_path)
        if manifest is None:
            try:
                checkpoint, metrics = fit_stage(
                    workspace,
                    config,
                    stage,
                    None if second else _vocabulary(workspace, job, config, parameters, stage),
                    lines,
                    label=f"trial {number}  ",
                    callbacks=[ReportToTune(cost)] if last else (),
                )
            except RayActorError:
                if _was_stopped(workspace, job.study, number):
                    return
                raise
            cost.append(metrics["work"])
            manifest = {} if last else publish(workspace, config, stage, checkpoint, metrics)
        parent = Artifact(stage.model_path, stage.version, manifest)


def _was_stopped(workspace: Workspace, study: str, number: int) -> bool:
    """Whether the search ended this trial, so that its controller is gone on purpose."""
    return any(trial.number == number and trial.state == "stopped" for trial in read_trials(workspace, study))


def _vocabulary(
    workspace: Workspace, job: TrialJob, config: Config, parameters: Parameters, stage: StageRun
) -> str | None:
    same = not any(key.startswith("text.") for key in parameters)
    return job.vocabulary if same else check_data(workspace, config, stage)
