"""Both training stages on Ray Train: features (and pairs, and a stage-1 model) in, an accepted model in the workspace
out.

A run is named by the fingerprint of everything that determines its model, so the same command finds the same run:
finished, it is skipped; interrupted, it goes on after its last checkpoint: of the last completed epoch, or a later one
within it.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htcl_ray import errors
from htcl_ray.cluster import connection
from htcl_ray.cluster.capacity import capacity, check_fits, use_gpu, worker_resources
from htcl_ray.config import Config
from htcl_ray.config.sections import FinetuneSettings, StageSettings
from htcl_ray.errors import ConfigError, MismatchError, StepError, WorkspaceError
from htcl_ray.evaluation.metrics import lower_is_better
from htcl_ray.pipelines import inputs
from htcl_ray.training.trackers import check_tracking
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.training.song_numbers import Pairs, Songs

PAPER_ROWS_PER_WORKER = 32
CHECKPOINT_LIST = "checkpoint_manager_snapshot.json"
"""Ray Train's own record, in the folder of the run."""


@dataclass(frozen=True)
class StageRun:
    """One stage to run: what it reads, and where its model and its run go."""

    step: str
    space: str
    """`semantic` or `preference`: the folder below models/."""
    settings: StageSettings
    features: Artifact
    pairs: Artifact | None
    parent: Artifact | None
    version: str
    folder: str = ""
    """Prefix of the two paths below: empty, or the folder of a search's trial, with a slash at its end."""

    @property
    def model_path(self) -> str:
        """Folder of the model, below the workspace's root."""
        return f"{self.folder}models/{self.space}/{self.version}"

    @property
    def runs_path(self) -> str:
        """Folder that holds the stage's runs."""
        return f"{self.folder}runs/{self.step}"

    @property
    def inputs(self) -> dict[str, str]:
        """Versions for the manifest."""
        named = {"features": self.features, "pairs": self.pairs, "model": self.parent}
        return {name: artifact.version for name, artifact in named.items() if artifact is not None}


def pretrain(config: Config) -> StepResult:
    """Stage 1: train the semantic model on the configured features. Raises InputError before Ray starts."""
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    version = inputs.semantic_version(config, features.version)
    return _run(workspace, config, StageRun("pretrain", "semantic", config.pretrain, features, None, None, version))


def finetune(config: Config, model: str | None = None) -> StepResult:
    """Stage 2: train the preference model from the semantic model of `inputs.parent`. Raises InputError before Ray
    starts.
    """
    workspace = Workspace(config.workspace)
    features = inputs.features(workspace, config)
    pairs = preference_pairs(workspace, config, features)
    parent = inputs.parent(workspace, config, features.version, model)
    check_parent(workspace, parent, config)
    version = inputs.preference_version(config, features.version, pairs.version, parent.version)
    return _run(
        workspace, config, StageRun("finetune", "preference", config.finetune, features, pairs, parent, version)
    )


def preference_pairs(workspace: Workspace, config: Config, features: Artifact) -> Artifact:
    """The configured pairs of these features. Raises InputError when there are none."""
    pairs = inputs.pairs(workspace, config, features.version)
    if pairs is None:
        raise ConfigError(
            "finetune learns from preference pairs, but data.interactions is empty; name the log table(s) there and run 'htcl preprocess'"
        )
    return pairs


def check_parent(workspace: Workspace, parent: Artifact, config: Config) -> None:
    """Raise MismatchError when the stage-1 model is of another recipe, size or text tower than the configuration
    says.
    """
    from htcl_ray.models.record import parse_record

    file = f"{parent.path}/config.json"
    record = parse_record(workspace.read_json(file), workspace.uri_of(file))
    if record.text is None:
        raise MismatchError(
            f"the semantic model {parent.version} is an audio encoder alone, without heads or a text tower; stage 2 needs a model that "
            "'htcl pretrain' made or that was imported from a whole stage-1 file"
        )
    if workspace.is_local:  # of a remote one, a worker checks it before it trains
        from htcl_ray.models.folder import read_tokenizer
        from htcl_ray.models.towers.text import tokenizer_from_name

        if read_tokenizer(workspace.local_copy(parent.path), record.text) is None:
            tokenizer_from_name(record.text.settings.name_or_path, record.text.transformer)
    theirs = {"audio": record.audio, "model": record.model, "text": record.text.settings}
    for section, made in theirs.items():
        ours = getattr(config, section).model_dump(mode="json")
        for key, value in made.model_dump(mode="json").items():
            if value != ours[key] and not (
                key == "name_or_path" and value and ours[key] and canonical(value) == canonical(ours[key])
            ):
                raise MismatchError(
                    f"the semantic model {parent.version} was made with {section}.{key}={value}, but the configuration says {ours[key]}; "
                    "run 'htcl pretrain' with this configuration or give the one that it was made with"
                )


def _run(workspace: Workspace, config: Config, stage: StageRun) -> StepResult:
    started = time.monotonic()
    manifest = workspace.manifest(stage.model_path)
    if manifest is not None:
        return StepResult(
            stage.step, workspace.uri_of(stage.model_path), _summary(manifest), time.monotonic() - started, skipped=True
        )
    workspace.check_writable()
    connection.refuse_relative_paths(config)
    _check_cpus(config, stage)
    config = config.model_copy(update={"tracking": check_tracking(config.tracking)})
    vocabulary = check_data(workspace, config, stage)
    connection.connect(config)
    check_fits(stage.step, stage.settings, capacity())
    with connection.progress_lines() as lines:
        checkpoint, metrics = fit_stage(workspace, config, stage, vocabulary, lines)
    manifest = publish(workspace, config, stage, checkpoint, metrics)
    return StepResult(stage.step, workspace.uri_of(stage.model_path), _summary(manifest), time.monotonic() - started)


def _check_cpus(config: Config, stage: StageRun) -> None:
    """A private cluster never grows, so workers that do not fit would wait for ever."""
    if connection.address_of(config) != "local":
        return
    wanted, there = (
        stage.settings.num_workers * stage.settings.cpus_per_worker,
        config.ray.num_cpus or max(4, os.cpu_count() or 1),
    )
    if wanted > there:
        raise ConfigError(
            f"{stage.step}.num_workers × {stage.step}.cpus_per_worker is {wanted:g} CPUs, but the private cluster has {there}; "
            f"lower one of them, or raise ray.num_cpus"
        )


def check_data(workspace: Workspace, config: Config, stage: StageRun) -> str | None:
    """Read what training will read, and refuse what cannot be trained on. Returns the vocabulary of a text tower from
    scratch.
    """
    from htcl_ray.training.order import global_batch
    from htcl_ray.training.song_numbers import read_songs

    songs = read_songs(workspace, stage.features.path)
    pairs = None if stage.pairs is None else _check_pairs(workspace, config.finetune, stage.pairs, songs)
    rows = len(songs.train) if pairs is None else config.finetune.pairs_per_epoch or len(pairs.train)
    wanted, workers = stage.settings.global_batch_size, stage.settings.num_workers
    batch = global_batch(rows, wanted, workers)
    _check_best_metric(stage, songs, pairs)
    if batch < wanted:
        print(
            f"{stage.step}  {rows} training rows are fewer than a batch of {wanted}; batches have {batch}", flush=True
        )
    elif wanted // workers < PAPER_ROWS_PER_WORKER:
        print(
            f"{stage.step}  WARNING: each of {workers} worker(s) has {wanted // workers} of the {wanted} rows of a batch; the paper has "
            f"{PAPER_ROWS_PER_WORKER} per GPU, which {stage.step}.batch_size_per_worker={PAPER_ROWS_PER_WORKER} would give",
            flush=True,
        )
    if stage.parent is not None:
        return None
    from htcl_ray.models.towers.text import check_song_texts, check_text_settings, fast_tokenizer
    from htcl_ray.models.towers.vocabulary import train_wordpiece
    from htcl_ray.training.health import distinct_texts

    tower = check_text_settings(config.text)
    if tower is not None:
        check_song_texts(tower.tokenizer, distinct_texts(songs), config.text)
    if config.text.name_or_path is not None:
        return None
    vocabulary = train_wordpiece([songs.texts[row] for row in songs.train.tolist()], config.text.vocab_size)
    check_song_texts(fast_tokenizer(vocabulary), distinct_texts(songs), config.text)
    return vocabulary


def _check_best_metric(stage: StageRun, songs: Songs, pairs: Pairs | None) -> None:
    """Raise ConfigError when no epoch would have the metric."""
    metric = stage.settings.best_metric or ""
    if metric.startswith("validation") and not len(songs.validation):
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but no song is in the validation split; give data.split_shares a validation share "
            "and run 'htcl preprocess', or choose loss"
        )
    if not metric.startswith("validation_pair"):
        return
    if pairs is None:
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but stage 1 has no pairs; expected loss or validation_recall@10"
        )
    from htcl_ray.training.validation import validation_gallery

    if not len(validation_gallery(songs.validation, pairs.validation).pairs):
        raise ConfigError(
            f"{stage.step}.best_metric is {metric}, but no pair has both songs in the validation gallery; "
            "expected loss or validation_recall@10, or more interactions between validation songs"
        )


def _check_pairs(workspace: Workspace, settings: FinetuneSettings, artifact: Artifact, songs: Songs) -> Pairs:
    from htcl_ray.training.song_numbers import read_pairs

    pairs = read_pairs(workspace, artifact.path, songs, rejected=settings.explicit_negatives)
    if pairs.missing:
        print(f"finetune  {pairs.missing} pairs are left out: a song has no features in the pair's split", flush=True)
    if pairs.rejected_left_out:
        print(
            f"finetune  {pairs.rejected_left_out} negatives are left out: a song has no training features, or the two are a pair",
            flush=True,
        )
    if len(pairs.train) < 2:
        raise WorkspaceError(
            f"{workspace.uri_of(artifact.path)} has {len(pairs.train)} usable training pair(s); expected at least 2: "
            "give more interactions, or lower pairs.min_support, and run 'htcl preprocess' again"
        )
    return pairs


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
    """Run Ray Train to the end, from its last checkpoint if there is one; returns the checkpoint to publish and its
    epoch's figures.

    `lines`: see `connection.progress_lines`; `label`: see TrainJob. `callbacks`: of Ray Train.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    from htcl_ray.pipelines.train_worker import TrainJob, train_worker

    # Ray Train takes reports when it polls its workers, by default every 2 s: longer than an epoch of a small
    # catalogue.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
    # It gives up on workers that have no node after a minute; a cloud takes several to start one, and spot nodes may be
    # gone for longer.
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "3600")
    settings = stage.settings
    gpu = use_gpu(settings, capacity())
    config = config.with_absolute_paths()  # workers run in a folder of their own
    run = f"{stage.runs_path}/{stage.version}"
    job = TrainJob(config, workspace, stage.features, run, vocabulary, stage.pairs, stage.parent, label)
    print(
        f"{stage.step}  {settings.num_workers} worker(s) on {'GPU' if gpu else 'CPU'}; run {workspace.uri_of(run)}",
        flush=True,
    )
    _forget_unusable_checkpoints(workspace, run, stage.step)
    with _own_interrupt_handler():
        trainer = TorchTrainer(
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
        checkpoint, metrics = _best(result.best_checkpoints, settings.best_metric)
        print(
            f"{stage.step}  epoch {metrics['epoch']} had the best {settings.best_metric}: {metrics[settings.best_metric]:.4g}",
            flush=True,
        )
    return checkpoint, metrics


def _forget_unusable_checkpoints(workspace: Workspace, run: str, step: str) -> None:
    """Ray Train refuses to start on a list of checkpoints that a kill has cut short, or whose folders were removed."""
    record = f"{run}/{CHECKPOINT_LIST}"
    if not workspace.exists(record):
        return
    try:
        listed = json.loads(workspace.read_bytes(record))["checkpoint_results"]
        if all(workspace.exists(f"{run}/{item['checkpoint_dir_name']}") for item in listed):
            return
    except (ValueError, KeyError, TypeError):
        pass
    print(
        f"{step}  the list of checkpoints in {workspace.uri_of(record)} is damaged or names missing ones; training begins anew",
        flush=True,
    )
    workspace.fs.delete_file(workspace.full(record))


def _checkpoint_config(settings: StageSettings) -> Any:
    from ray.train import CheckpointConfig

    if settings.best_metric is None:
        return CheckpointConfig(num_to_keep=settings.keep_checkpoints)
    order = "min" if lower_is_better(settings.best_metric) else "max"
    return CheckpointConfig(
        num_to_keep=settings.keep_checkpoints,
        checkpoint_score_attribute=settings.best_metric,
        checkpoint_score_order=order,
    )


def _best(checkpoints: list[tuple[Any, dict[str, Any]]], metric: str) -> tuple[Any, dict[str, Any]]:
    """The checkpoint of the epoch that was best; of equals the first."""
    epochs = [
        (checkpoint, metrics) for checkpoint, metrics in checkpoints if not math.isnan(metrics.get(metric, math.nan))
    ]
    sign = 1 if lower_is_better(metric) else -1
    return min(epochs, key=lambda item: (sign * item[1][metric], item[1]["epoch"]))


class _own_interrupt_handler:
    """Ray Train installs a handler of Ctrl-C for the run; the caller's comes back afterwards."""

    def __enter__(self) -> None:
        self.handler = signal.getsignal(signal.SIGINT)

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, self.handler)


def publish(
    workspace: Workspace, config: Config, stage: StageRun, checkpoint: Any, metrics: dict[str, Any]
) -> dict[str, Any]:
    """Make a checkpoint of Ray Train a model of the workspace; returns its manifest."""
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
    found = f", validation recall@10 {quality['validation_recall@10']:.2f}" if "validation_recall@10" in quality else ""
    return f"{manifest['kind']} model: {quality['epoch']} epochs, loss {quality['loss']:.3f}{found}"
