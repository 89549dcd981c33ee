"""`htcl tune`: a search with Ray Tune and Optuna in which each trial is a run of Ray Train.

A study is a folder below runs/tune/: its record (study.json), the table of trials (trials.jsonl), and at its end
best.yaml and report.html. The same command resumes it: trials that have ended are kept, and running ones resume from
their last checkpoints.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from htcl_ray.cluster import connection
from htcl_ray.cluster.capacity import Capacity, capacity, check_fits, use_gpu
from htcl_ray.cluster.ray_internals import HEAD_RESOURCE
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.train import preference_pairs
from htcl_ray.pipelines.tuning.trial import TrialJob, run_trial
from htcl_ray.progress import print_line
from htcl_ray.training.joint_space import refuse_joint_space
from htcl_ray.training.song_numbers import Pairs, Songs, read_pairs, read_songs
from htcl_ray.training.stage_run import StageRun, check_data, check_parent
from htcl_ray.training.trackers import check_tracking
from htcl_ray.tuning.budget import Budget, stage_budget
from htcl_ray.tuning.search_report import StudyReport, report_html
from htcl_ray.tuning.space import Space, configured_point, distributions, search_space, with_parameters
from htcl_ray.tuning.study_folder import RECORD, TrialTable, check_same_study, read_trials, study_record, trial_folder
from htcl_ray.tuning.trials import Trial, remaining, same_point, winners
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

BEST = "best.yaml"
METRIC_PREFIXES = {"semantic": "validation", "preference": "validation_pair"}
"""Prefix of the workers' validation metrics for each objective."""


def tune(config: Config, model: str | None = None) -> StepResult:
    """Run the search, or the remaining part of it.

    Raises InputError before any trial starts, and StepError when every trial failed.
    """
    started = time.monotonic()
    if "pretrain" in config.tune.stages:
        refuse_joint_space(config, "htcl tune")
    workspace = Workspace(config.workspace)
    study = f"runs/tune/{config.tune.name}"
    features, pairs, parent = _inputs(workspace, config, model)
    songs = read_songs(workspace, features.path)
    mined = (
        None if pairs is None else read_pairs(workspace, pairs.path, songs, rejected=config.finetune.explicit_negatives)
    )
    rows = {
        "pretrain": len(songs.train),
        "finetune": 0 if mined is None else config.finetune.pairs_per_epoch or len(mined.train),
    }
    space = search_space(config, rows)
    budgets: dict[str, Budget] = {name: stage_budget(config, space, name, rows[name]) for name in config.tune.stages}
    artifacts = {"features": features, "pairs": pairs, "model": parent}
    versions = {kind: artifact.version for kind, artifact in artifacts.items() if artifact is not None}
    record = study_record(config, space, budgets, _gallery(config, songs, mined), versions)
    trials = [_restart_if_failed(workspace, study, trial) for trial in read_trials(workspace, study)]
    if workspace.exists(f"{study}/{RECORD}"):
        check_same_study(workspace.read_json(f"{study}/{RECORD}"), record, workspace.uri_of(study))
    left = remaining(trials, config.tune.trials)
    if not left and workspace.manifest(study) is not None:
        return StepResult("tune", workspace.uri_of(f"{study}/report.html"), _summary(trials, config), 0.0, skipped=True)
    if left:
        connection.refuse_relative_paths(config)
        vocabulary = _check_stages(workspace, config, space, features, pairs, parent)
        connection.connect(config)
        shared = fit_to_cluster(config, capacity())
        for name, budget in budgets.items():
            print(f"tune  every trial of {name} sees {budget.rows:,} rows, measured {budget.reports} times", flush=True)
        workspace.write_json(f"{study}/{RECORD}", record)
        job = TrialJob(shared, study, budgets, features, pairs, parent, vocabulary)
        trials = _search(workspace, job, space, trials)
    if not any(trial.history for trial in trials):
        errors = [trial.error for trial in trials if trial.error]
        raise StepError(
            f"all {len(trials)} trials failed; the first one: {errors[0] if errors else 'without a measurement'}"
        )
    _write_results(workspace, config, study, space, record, budgets, trials, model)
    return StepResult(
        "tune", workspace.uri_of(f"{study}/report.html"), _summary(trials, config), time.monotonic() - started
    )


def _inputs(
    workspace: Workspace, config: Config, model: str | None
) -> tuple[Artifact, Artifact | None, Artifact | None]:
    """Features, pairs where stage 2 is searched, and the parent model where stage 2 is searched alone."""
    features = inputs.features(workspace, config)
    pairs = preference_pairs(workspace, config, features) if "finetune" in config.tune.stages else None
    if config.tune.stage != "finetune":
        if model is not None:
            raise ConfigError(
                f"--model names the model that stage 2 starts from, but tune.stage is {config.tune.stage}; "
                "leave one of them out"
            )
        return features, pairs, None
    parent = inputs.parent(workspace, config, features.version, model)
    check_parent(workspace, parent, config)
    return features, pairs, parent


def _restart_if_failed(workspace: Workspace, study: str, trial: Trial) -> Trial:
    """Reset a failed trial, so that it runs again from the beginning; return any other trial unchanged."""
    if trial.state != "failed":
        return trial
    print(f"tune  trial {trial.number} failed before and is tried again: {trial.error}", flush=True)
    workspace.remove(trial_folder(study, trial.number))
    return trial.restarted()


def _check_stages(
    workspace: Workspace,
    config: Config,
    space: Space,
    features: Artifact,
    pairs: Artifact | None,
    parent: Artifact | None,
) -> str | None:
    """Check that every stage can train on its data. Raises InputError.

    Returns the vocabulary of the configured text tower, if stage 1 trains one from scratch.
    """
    vocabulary = None
    for name in config.tune.stages:
        settings = getattr(config, name).model_copy(update={"best_metric": None})
        if name == "pretrain":
            stage = StageRun(name, "semantic", settings, features, None, None, config.tune.name)
            vocabulary = check_data(workspace, config, stage)
            for value in space["text.name_or_path"].values or () if "text.name_or_path" in space else ():
                check_data(workspace, with_parameters(config, {"text.name_or_path": value}), stage)
        else:
            check_data(
                workspace,
                config,
                StageRun(name, "preference", settings, features, pairs, parent or features, config.tune.name),
            )
    return vocabulary


def _gallery(config: Config, songs: Songs, mined: Pairs | None) -> dict[str, Any]:
    """Describe the validation songs and pairs of every trial. Raises ConfigError when an objective has none."""
    from htcl_ray.training.validation import validation_gallery

    gallery = validation_gallery(songs.validation, None if mined is None else mined.validation)
    if not len(gallery.songs):
        raise ConfigError(
            "tune compares trials on validation songs, but no song is in the validation split; give data.split_shares "
            "a validation share and run 'htcl preprocess'"
        )
    if "preference" in config.tune.judged_by and not len(gallery.pairs):
        raise ConfigError(
            "tune.objectives has preference, but no pair has both songs in the validation gallery; choose "
            "semantic, or give more interactions between validation songs"
        )
    gallery_songs = [[songs.song_ids[row], songs.texts[row]] for row in gallery.songs.tolist()]
    gallery_pairs = gallery.pairs.tolist()
    return {
        "songs": len(gallery_songs),
        "pairs": len(gallery_pairs),
        "fingerprint": fingerprint(gallery_songs, gallery_pairs),
    }


def fit_to_cluster(config: Config, cluster: Capacity) -> Config:
    """The configuration with the accelerator and the number of concurrent trials that fit on the cluster.

    Both are the same for every trial. Paths become absolute, since trials run in folders of their own. Raises
    ConfigError when the cluster can never hold a trial.
    """
    chosen: dict[str, Any] = {}
    fits = []
    for name in config.tune.stages:
        settings = getattr(config, name)
        fits.append(check_fits(name, settings, cluster))
        chosen[f"{name}.accelerator"] = "gpu" if use_gpu(settings, cluster) else "cpu"
    concurrent = config.tune.max_concurrent_trials or max(1, min(fits))
    if config.tune.max_concurrent_trials is None and cluster.grows is None:
        print_line(
            f"tune  how far this cluster can grow cannot be read here, so {concurrent} trial(s) run at a time, as many "
            f"as fit on its {cluster.max_nodes} node(s); set tune.max_concurrent_trials for another number"
        )
    else:
        print_line(f"tune  at most {concurrent} trial(s) at a time; the cluster is {cluster}")
    shared = config.with_overrides({**chosen, "tune.max_concurrent_trials": concurrent})
    shared = shared.with_absolute_paths()
    return shared.model_copy(update={"tracking": check_tracking(config.tracking)})


def _search(workspace: Workspace, job: TrialJob, space: Space, trials: list[Trial]) -> list[Trial]:
    """Run trials until `tune.trials` have ended; returns all of them."""
    # Ray Tune and its processes read these variables when they import it.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune

    # Ray Tune prints the trace of a failed trial; the callback prints its reason, and Ray's logs keep the trace.
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    from htcl_ray.pipelines.tuning.study import StudyCallback, read_measurements, remove_checkpoints, resume

    config, settings = job.config, job.config.tune
    last_stage, last = list(job.budgets.items())[-1]
    metrics: dict[str, str] = {name: f"{METRIC_PREFIXES[name]}_{settings.metric}" for name in settings.judged_by}
    for trial in trials:
        if not trial.ended:
            read_measurements(workspace, job.study, trial, last_stage, metrics)
    table = TrialTable(workspace, job.study, trials)
    configured = configured_point(config, space)
    search, scheduler = resume(table, distributions(config, space), metrics, configured, settings, last)
    left = remaining(table.trials.values(), settings.trials)
    with connection.progress_lines() as lines, tempfile.TemporaryDirectory() as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(
                ray_tune.with_parameters(run_trial, job=job, lines=lines),
                ray_tune.PlacementGroupFactory([{HEAD_RESOURCE: 0.001}]),
            ),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=scheduler,
                num_samples=left,
                max_concurrent_trials=min(settings.max_concurrent_trials or 1, max(left, 1)),
                reuse_actors=True,
            ),
            run_config=ray_tune.RunConfig(
                name=settings.name,
                storage_path=scratch,
                callbacks=[StudyCallback(table, metrics, settings.trials, last.rows)],
                verbose=0,
            ),
        )
        if left:
            tuner.fit()
    for trial in table.trials.values():
        if trial.ended:  # workers of a stopped trial may have written after its end
            remove_checkpoints(workspace, job.study, trial)
    return list(table.trials.values())


def _write_results(
    workspace: Workspace,
    config: Config,
    study: str,
    space: Space,
    record: Mapping[str, Any],
    budgets: Mapping[str, Budget],
    trials: list[Trial],
    model: str | None,
) -> None:
    """Write the best configurations, the report and the manifest of the study."""
    objectives = config.tune.judged_by
    best = winners(trials, objectives)
    for number, trial in enumerate(best):
        chosen = with_parameters(config, trial.parameters).as_yaml().encode()
        if number == 0:
            workspace.write_bytes(f"{study}/{BEST}", chosen)
        if len(objectives) > 1:
            workspace.write_bytes(f"{study}/pareto/{trial.number:04d}.yaml", chosen)
    configured = configured_point(config, space)
    configured_trial = None if configured is None else same_point(trials, configured)
    command = _command(workspace.uri_of(f"{study}/{BEST}"), config, model)
    manifest = build_manifest(
        "study",
        config=config.model_dump(mode="json"),
        inputs=record["inputs"],
        quality={name: best[0].last[name] for name in objectives} if best else {},
        best=best[0].number if best else None,
        trials=len(trials),
    )
    report = StudyReport(
        name=config.tune.name,
        stage=config.tune.stage,
        objectives=tuple(objectives),
        metric=config.tune.metric,
        trials=trials,
        space=dict(space),
        distributions=distributions(config, space),
        budgets=dict(budgets),
        gallery=record["gallery"],
        configured=configured_trial.number if configured_trial else None,
        command=command,
        created=manifest["created"],
        config=manifest["config"],
        inputs=record["inputs"],
        libraries=manifest["libraries"],
    )
    workspace.write_bytes(f"{study}/report.html", report_html(report).encode())
    workspace.finish(study, manifest)
    if best:
        print(f"tune  to train the winner in full: {command}", flush=True)  # not folded, so that it can be copied


def _command(best: str, config: Config, model: str | None) -> str:
    """Command line that trains the configuration in the file `best` in full."""
    steps = [f"htcl {name} --config {best}" for name in config.tune.stages]
    return " && ".join(steps) + (f" --model {model}" if model else "")


def _summary(trials: list[Trial], config: Config) -> str:
    objectives = config.tune.judged_by
    best = winners(trials, objectives)
    if not best:
        return f"{len(trials)} trials, none saw all its rows"
    values = ", ".join(f"{name} {config.tune.metric} {best[0].last[name]:.4f}" for name in objectives)
    front = f" ({len(best)} on the Pareto front)" if len(objectives) > 1 else ""
    return f"{len(trials)} trials, best {values} in trial {best[0].number}{front}"
