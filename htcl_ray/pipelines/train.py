"""Both training stages on Ray Train: from features, pairs and a stage-1 model to a model in the workspace.

A run is named by the fingerprint of everything that determines its model, so the same command continues the same run:
a finished run is skipped, and an interrupted one resumes from its last checkpoint, made at the end of an epoch or
within one.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from htcl_ray import errors
from htcl_ray.cluster import connection
from htcl_ray.cluster.capacity import capacity, check_fits, use_gpu, worker_resources
from htcl_ray.cluster.ray_internals import torch_trainer
from htcl_ray.config import Config
from htcl_ray.config.sections import StageSettings
from htcl_ray.errors import ConfigError, MismatchError, StepError
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.publish_joint_space import publish_joint_space
from htcl_ray.training.runs import CHECKPOINT_LIST, best_epoch, is_resumable, score_order
from htcl_ray.training.stage_run import StageRun, check_data, check_parent
from htcl_ray.training.trackers import check_tracking
from htcl_ray.training.warm_start import find_source
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace


def pretrain(config: Config) -> StepResult:
    """Stage 1: train the semantic model on the configured features. Raises InputError before Ray starts."""
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    version = inputs.semantic_version(config, features.version)
    if config.pretrain.use_joint_space:
        return publish_joint_space(workspace, config, features, version)
    return _run(workspace, config, StageRun("pretrain", "semantic", config.pretrain, features, None, None, version))


def finetune(config: Config, model: str | None = None) -> StepResult:
    """Stage 2: train the preference model from the semantic model `inputs.parent`.

    With `pretrain.use_joint_space` that is made now, if it does not exist. Raises InputError before Ray starts.
    """
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    pairs = preference_pairs(workspace, config, features)
    if config.pretrain.use_joint_space and model is None:
        model = publish_joint_space(
            workspace, config, features, inputs.semantic_version(config, features.version)
        ).version
    parent = inputs.parent(workspace, config, features.version, model)
    check_parent(workspace, parent, config)
    _check_same_parent(workspace, config, parent)
    version = inputs.preference_version(config, features.version, pairs.version, parent.version)
    return _run(
        workspace, config, StageRun("finetune", "preference", config.finetune, features, pairs, parent, version)
    )


def _check_same_parent(workspace: Workspace, config: Config, parent: Artifact) -> None:
    """Raise MismatchError when the earlier preference model was fine-tuned from another semantic model."""
    if config.finetune.warm_start is None:
        return
    source = find_source(workspace, config.finetune.warm_start)
    known = None if source.artifact is None else source.artifact.manifest["inputs"].get("model")
    if known not in (None, parent.version):
        raise MismatchError(
            f"{source.name} was fine-tuned from the semantic model {known}, but this run belongs to {parent.version}; "
            f"give --model {known}, or train stage 2 without --from"
        )


def preference_pairs(workspace: Workspace, config: Config, features: Artifact) -> Artifact:
    """Return the configured pairs of these features. Raises InputError without any."""
    pairs = inputs.pairs(workspace, config, features.version)
    if pairs is None:
        raise ConfigError(
            "finetune learns from preference pairs, but data.interactions is empty; "
            "name the log table(s) in it and run 'htcl preprocess'"
        )
    return pairs


def _run(workspace: Workspace, config: Config, stage: StageRun) -> StepResult:
    started = time.monotonic()
    manifest = workspace.manifest(stage.model_path)
    if manifest is not None:
        return StepResult(
            stage.step, workspace.uri_of(stage.model_path), _summary(manifest), time.monotonic() - started, skipped=True
        )
    workspace.check_writable()
    connection.refuse_relative_paths(config)
    check_cpus(config, stage.step, stage.settings)
    config = config.model_copy(update={"tracking": check_tracking(config.tracking)})
    vocabulary = check_data(workspace, config, stage)
    connection.connect(config)
    check_fits(stage.step, stage.settings, capacity())
    with connection.progress_lines() as lines:
        checkpoint, metrics = fit_stage(workspace, config, stage, vocabulary, lines)
    manifest = publish(workspace, config, stage, checkpoint, metrics)
    if stage.settings.warm_start is not None:
        print(
            f"{stage.step}  later steps use this model with --model {stage.version}, or with {stage.step}.warm_start in"
            " their configuration too",
            flush=True,
        )
    return StepResult(stage.step, workspace.uri_of(stage.model_path), _summary(manifest), time.monotonic() - started)


def check_cpus(config: Config, step: str, settings: StageSettings) -> None:
    """Raise ConfigError when the workers do not fit a private cluster, which never grows, and would wait forever."""
    if connection.address_of(config) != "local":
        return
    needed = settings.num_workers * settings.cpus_per_worker
    available = config.ray.num_cpus or max(4, os.cpu_count() or 1)
    if needed > available:
        raise ConfigError(
            f"{step}.num_workers × {step}.cpus_per_worker is {needed:g} CPUs, but the private cluster has {available}; "
            f"lower one of them, or raise ray.num_cpus"
        )


def fit_stage(
    workspace: Workspace,
    config: Config,
    stage: StageRun,
    vocabulary: str | None,
    lines: Any,
    *,
    label: str = "",
    callbacks: Sequence[Any] = (),
) -> tuple[Any, dict[str, Any]]:
    """Run Ray Train to the end, from the last checkpoint if any; return the checkpoint to publish and its metrics.

    `lines`: see `connection.progress_lines`; `label`: see TrainJob. `callbacks`: of Ray Train.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    from htcl_ray.pipelines.train_worker import TrainJob, train_worker

    for name, value in connection.TRAIN_VARIABLES.items():
        os.environ.setdefault(name, value)
    settings = stage.settings
    gpu = use_gpu(settings, capacity())
    config = config.with_absolute_paths()  # workers run in a folder of their own
    run = f"{stage.runs_path}/{stage.version}"
    job = TrainJob(config, workspace, stage.features, run, vocabulary, stage.pairs, stage.parent, label)
    print(
        f"{stage.step}  {settings.num_workers} worker(s) on {'GPU' if gpu else 'CPU'}; run {workspace.uri_of(run)}",
        flush=True,
    )
    discard_unusable_checkpoints(workspace, run, stage.step)
    with _own_interrupt_handler():
        trainer = torch_trainer()(
            train_worker,
            train_loop_config={"job": job, "lines": lines},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
            scaling_config=ScalingConfig(
                num_workers=settings.num_workers, use_gpu=gpu, resources_per_worker=worker_resources(settings, gpu)
            ),
            run_config=RunConfig(
                name=stage.version,
                storage_path=workspace.location_of(stage.runs_path),
                callbacks=list(callbacks) or None,
                checkpoint_config=_checkpoint_config(settings),
                failure_config=FailureConfig(
                    max_failures=settings.max_failures, controller_failure_limit=settings.max_failures
                ),
            ),
        )
        try:
            result = trainer.fit()
        except TrainingFailedError as error:
            reason = str(error).strip().splitlines()[-1][:200]
            raise StepError(
                f"{stage.step} failed after {settings.max_failures} restart(s): {reason}; Ray's logs say more, "
                "and the same command continues from the last checkpoint"
            ) from error
    if result.return_value is not None:
        failure = result.return_value
        raise getattr(errors, failure["error"])(failure["message"])
    if result.checkpoint is None or result.metrics is None:
        raise StepError(
            f"{stage.step} ended without a checkpoint in {workspace.uri_of(run)}; remove that folder and try again"
        )
    checkpoint, metrics = result.checkpoint, result.metrics
    if settings.best_metric is not None:
        checkpoint, metrics = best_epoch(result.best_checkpoints, settings.best_metric)
        print(
            f"{stage.step}  epoch {metrics['epoch']} had the best {settings.best_metric}: "
            f"{metrics[settings.best_metric]:.4g}",
            flush=True,
        )
    return checkpoint, metrics


def discard_unusable_checkpoints(workspace: Workspace, run: str, step: str) -> None:
    """Delete Ray Train's list of checkpoints in the folder `run` when it cannot be resumed from; see `is_resumable`."""
    record = f"{run}/{CHECKPOINT_LIST}"
    if not workspace.exists(record):
        return
    if is_resumable(workspace.read_bytes(record), lambda name: workspace.exists(f"{run}/{name}")):
        return
    print(
        f"{step}  the list of checkpoints in {workspace.uri_of(record)} is damaged or names missing ones; "
        "training starts again from its first step",
        flush=True,
    )
    workspace.fs.delete_file(workspace.full(record))


def _checkpoint_config(settings: StageSettings) -> Any:
    from ray.train import CheckpointConfig

    if settings.best_metric is None:
        return CheckpointConfig(num_to_keep=settings.keep_checkpoints)
    return CheckpointConfig(
        num_to_keep=settings.keep_checkpoints,
        checkpoint_score_attribute=settings.best_metric,
        checkpoint_score_order=score_order(settings.best_metric),
    )


class _own_interrupt_handler:
    """Restore the caller's handler of Ctrl-C after the run, during which Ray Train installs its own."""

    def __enter__(self) -> None:
        self.handler = signal.getsignal(signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.handler)


def publish(
    workspace: Workspace, config: Config, stage: StageRun, checkpoint: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Publish a checkpoint of Ray Train as a model of the workspace; return its manifest."""
    from htcl_ray.training.checkpoint import TRAINING_STATE

    with tempfile.TemporaryDirectory() as scratch, checkpoint.as_directory() as trained:
        folder = Path(scratch) / "model"
        shutil.copytree(trained, folder, ignore=shutil.ignore_patterns(TRAINING_STATE, ".*"))
        files = {
            path.relative_to(folder).as_posix(): file_sha256(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        quality = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
        manifest = build_manifest(
            stage.space,
            config=config.model_dump(mode="json"),
            inputs=stage.inputs,
            quality=quality,
            files=files,
            run=f"{stage.runs_path}/{stage.version}",
        )
        workspace.publish(folder, stage.model_path, manifest)
    return manifest


def _summary(manifest: dict[str, Any]) -> str:
    quality = manifest["quality"]
    recall = (
        f", validation recall@10 {quality['validation_recall@10']:.2f}" if "validation_recall@10" in quality else ""
    )
    return f"{manifest['kind']} model: {quality['epoch']} epochs, loss {quality['loss']:.3f}{recall}"
