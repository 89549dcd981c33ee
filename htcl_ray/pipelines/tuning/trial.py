"""One trial of a search: the training stages on Ray Train, inside a function of Ray Tune.

The function only waits for Ray Train, so it reserves a minimal share of the head node, where it survives the loss of
its workers' nodes. A trial with the number of an earlier one resumes from that trial's last checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from htcl_ray.config import Config
from htcl_ray.pipelines.train import fit_stage, publish
from htcl_ray.training.stage_run import StageRun, check_data
from htcl_ray.tuning.budget import Budget, trial_config
from htcl_ray.tuning.space import Parameters
from htcl_ray.tuning.study_folder import read_trials, trial_folder, trial_version
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class TrialJob:
    """Configuration and inputs that all trials of a study share."""

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
    """Vocabulary of the configured text tower, if stage 1 trains one from scratch."""


def run_trial(point: Mapping[str, Any], job: TrialJob, lines: Any) -> None:
    """Train the stages with the parameters of one point, and report the epochs of the last stage to Ray Tune.

    `point`: `number` and `parameters`. `lines`: see `connection.progress_lines`.
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
    """Whether the search stopped this trial and therefore ended its controller."""
    return any(trial.number == number and trial.state == "stopped" for trial in read_trials(workspace, study))


def _vocabulary(
    workspace: Workspace, job: TrialJob, config: Config, parameters: Parameters, stage: StageRun
) -> str | None:
    """Vocabulary of the trial's text tower; that of the study unless the trial changes the section `text`."""
    changed = any(key.startswith("text.") for key in parameters)
    return check_data(workspace, config, stage) if changed else job.vocabulary
