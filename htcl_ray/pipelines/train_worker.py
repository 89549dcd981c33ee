"""A worker of Ray Train: reads its inputs from the workspace, trains, and hands checkpoints to Ray."""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from htcl_ray.config import Config
from htcl_ray.errors import HtclError
from htcl_ray.extractors.families import check_encoder, recorded_extractor
from htcl_ray.losses.collectives import prepared_together
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import BatchLoader
from htcl_ray.training.checkpoint import TrainingState, load_state
from htcl_ray.training.features import open_frames
from htcl_ray.training.loop import SaveCheckpoint, train
from htcl_ray.training.metrics_log import MetricsLog
from htcl_ray.training.progress_lines import Metrics
from htcl_ray.training.runs import worst_score
from htcl_ray.training.song_numbers import read_songs
from htcl_ray.training.song_text import TextVariation
from htcl_ray.training.stage_tasks import finetune_task, pretrain_task
from htcl_ray.training.trackers import open_trackers
from htcl_ray.training.warm_start import find_source, preference_start, semantic_start, training_pairs
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.filesystem import storage_failure
from htcl_ray.workspace.local_copies import private_folder
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class TrainJob:
    """The arguments of a worker."""

    config: Config
    workspace: Workspace
    features: Artifact
    run: str
    """Folder of the run, below the workspace's root."""
    vocabulary: str | None
    """Stage 1 with a text tower from scratch: its tokenizer."""
    pairs: Artifact | None
    """Stage 2."""
    parent: Artifact | None
    """Stage 2: the semantic model that it starts from."""
    label: str = ""
    """Prefix of every printed line, for runs that share a terminal; progress lines are then left out."""


def train_worker(arguments: dict[str, Any]) -> dict[str, str] | None:
    """Train one stage in one worker of Ray Train; return the error that ends the run, if it would repeat, or None."""
    try:
        with contextlib.ExitStack() as opened:
            _train(arguments["job"], arguments["lines"].put_nowait, opened)
    except HtclError as error:
        return {"error": type(error).__name__, "message": str(error)}
    except Exception as error:
        failure = storage_failure(error, f"{arguments['job'].workspace.uri} or {tempfile.gettempdir()}")
        if failure is None:
            raise
        return {"error": type(failure).__name__, "message": str(failure)}
    return None


def _train(job: TrainJob, say: Callable[[str], None], opened: contextlib.ExitStack) -> None:
    started = time.time()
    say = functools.partial(_labelled, say, job.label)
    settings = job.config.pretrain if job.parent is None else job.config.finetune
    torch.set_num_threads(max(1, int(settings.cpus_per_worker)))
    device = ray.train.torch.get_device()
    with prepared_together():
        songs = read_songs(job.workspace, job.features.path, job.config.data.text_columns)
        frames = opened.enter_context(open_frames(job.workspace, job.features.path, job.features.manifest, songs))
        if job.pairs is None:
            task = pretrain_task(songs, job.config.pretrain)
        else:
            pairs = training_pairs(job.workspace, job.config.finetune, job.pairs.path, songs)
            task = finetune_task(pairs, songs.train, job.config.finetune, device)
        model, resume = _model(job, frames.width)
    first = ray.train.get_context().get_world_rank() == 0
    log = _log(job, resume, say) if first else None
    finished = False

    def on_checkpoint(metrics: Metrics | None, step: int, save: SaveCheckpoint) -> None:
        checkpoint = None
        if log is not None:
            if metrics is not None:
                log.write(metrics)
            folder = private_folder() / f"checkpoint-{uuid.uuid4().hex}"
            save(folder)
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        # Checkpoints within an epoch have no metrics, but Ray Train needs a score to rank them by.
        best = settings.best_metric
        unranked: Metrics = {"step": float(step), **({best: worst_score(best)} if best else {})}
        work = {"started": started, "seconds": time.time() - started, "nodes": _nodes()}
        ray.train.report(
            {**(metrics or unranked), "work": work},
            checkpoint=checkpoint,
            # Training continues meanwhile; the local copy is removed when it is stored.
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        )

    augmentation = Augmentation(settings, model.window_frames, model.recipe.extractor)
    loader = BatchLoader(songs, frames, model.text_encoder, augmentation, TextVariation(settings))
    try:
        train(
            model,
            task,
            loader,
            settings,
            device,
            on_checkpoint=on_checkpoint,
            say=say,
            resume=resume,
            show_progress=not job.label,
        )
        finished = True
    finally:
        if log is not None:
            log.close(finished)


def _labelled(say: Callable[[str], None], label: str, line: str) -> None:
    say(f"{label}{line}")


def _nodes() -> float:
    """Number of nodes of the run, if each has as many workers as this worker's node."""
    context = ray.train.get_context()
    return float(-(-context.get_world_size() // context.get_local_world_size()))


def _log(job: TrainJob, resume: TrainingState | None, say: Callable[[str], None]) -> MetricsLog:
    stage = "pretrain" if job.parent is None else "finetune"
    sections = {name: getattr(job.config, name) for name in ("audio", "text", "model")} | {
        stage: getattr(job.config, stage).resolved()
    }
    parameters = {name: section.model_dump(mode="json") for name, section in sections.items()}
    trackers = open_trackers(job.config.tracking, job.workspace, job.run, parameters, say)
    return MetricsLog(job.workspace, job.run, resume.step if resume else 0, trackers)


def _model(job: TrainJob, feature_width: int) -> tuple[HTCL, TrainingState | None]:
    """Load the model: from the run's last checkpoint (resume), an earlier model (warm start), or the stage's start.

    Stage 1 starts from random weights, stage 2 from the parent.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            return HTCL.from_pretrained(folder), load_state(Path(folder))
    stage = job.config.pretrain if job.parent is None else job.config.finetune
    extractor = recorded_extractor(job.features.manifest)
    if stage.warm_start is not None:
        folder = find_source(job.workspace, stage.warm_start).folder
        if job.parent is not None:
            model = preference_start(job.config, folder)
            check_encoder(model.record.extractor, extractor, str(folder))
            return model, None
        return semantic_start(job.config, folder, job.vocabulary, feature_width, extractor)[0], None
    if job.parent is None:
        return HTCL.untrained(job.config, job.vocabulary, feature_width=feature_width, extractor=extractor), None
    parent = HTCL.from_pretrained(job.workspace.local_copy(job.parent.path))
    check_encoder(parent.record.extractor, extractor, f"model {job.parent.version}")
    settings = job.config.finetune
    model = parent.to_stage_2(
        settings.temperature, settings.seed, loss=settings.loss, batch_size=settings.global_batch_size
    )
    model.record = model.record.model_copy(update={"license": job.config.license})
    return model, None
