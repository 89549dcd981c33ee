"""`htcl tune`: a search with Ray Tune and Optuna, each trial a run of Ray Train, on a cluster that grows with it.

A study is a folder below runs/tune/: what it is about (study.json), one line a trial (trials.jsonl), and at its end
best.yaml and report.html. The same command continues it: trials that have ended are kept, and one that was running goes
on after its last checkpoint.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from typing import Any

from htcl_ray.cluster import connection
from htcl_ray.cluster.capacity import HEAD_RESOURCE, capacity, check_fits, use_gpu
from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, Dimension
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.train import StageRun, check_data, check_parent, preference_pairs
from htcl_ray.pipelines.tuning.trial import TrialJob, run_trial, trial_folder
from htcl_ray.training.song_numbers import Pairs, Songs, read_pairs, read_songs
from htcl_ray.training.trackers import check_tracking
from htcl_ray.tuning.budget import Budget, stage_budget
from htcl_ray.tuning.search_report import StudyReport, report_html
from htcl_ray.tuning.space import Space, configured_point, distributions, search_space, with_parameters
from htcl_ray.tuning.trials import Trial, read_trials, winners
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import build_manifest, fingerprint
from htcl_ray.workspace.storage import Workspace

ABOUT = "study.json"
BEST = "best.yaml"
METRICS = {"semantic": "validation", "preference": "validation_pair"}


def tune(config: Config, model: str | None = None) -> StepResult:
    """Run the search, or what is left of it. Raises InputError before any trial starts, StepError when every trial
    failed.
    """
    started = time.monotonic()
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
    about = _about(config, space, budgets, _gallery(config, songs, mined), features, pairs, parent)
    trials = [_to_run_again(workspace, study, trial) for trial in read_trials(workspace, study)]
    _check_same_study(workspace, study, about)
    done = workspace.manifest(study)
    left = config.tune.trials - sum(trial.ended for trial in trials)
    if left <= 0 and done is not None:
        return StepResult("tune", workspace.uri_of(f"{study}/report.html"), _summary(trials, config), 0.0, skipped=True)
    if left > 0:
        connection.refuse_relative_paths(config)
        vocabulary = _check_stages(workspace, config, space, features, pairs, parent)
        connection.connect(config)
        shared = _on_this_cluster(config)
        for name, budget in budgets.items():
            print(f"tune  every trial of {name} sees {budget.rows:,} rows, measured {budget.reports} times", flush=True)
        workspace.write_json(f"{study}/{ABOUT}", about)
        job = TrialJob(shared, study, budgets, features, pairs, parent, vocabulary)
        trials = _search(workspace, job, space, trials)
    if not any(trial.history for trial in trials):
        errors = [trial.error for trial in trials if trial.error]
        raise StepError(
            f"all {len(trials)} trials failed; the first one: {errors[0] if errors else 'without a measurement'}"
        )
    _write_results(workspace, config, study, space, about, budgets, trials, model)
    return StepResult(
        "tune", workspace.uri_of(f"{study}/report.html"), _summary(trials, config), time.monotonic() - started
    )


def _inputs(
    workspace: Workspace, config: Config, model: str | None
) -> tuple[Artifact, Artifact | None, Artifact | None]:
    features = inputs.features(workspace, config)
    pairs = preference_pairs(workspace, config, features) if "finetune" in config.tune.stages else None
    if config.tune.stage != "finetune":
        if model is not None:
            raise ConfigError(
                f"--model names the model that stage 2 starts from, but tune.stage is {config.tune.stage}; leave one of them out"
            )
        return features, pairs, None
    parent = inputs.parent(workspace, config, features.version, model)
    check_parent(workspace, parent, config)
    return features, pairs, parent


def _to_run_again(workspace: Workspace, study: str, trial: Trial) -> Trial:
    """A trial that failed, as one to be run from its beginning; any other as it is."""
    if trial.state != "failed":
        return trial
    print(f"tune  trial {trial.number} failed before and is tried again: {trial.error}", flush=True)
    workspace.remove(trial_folder(study, trial.number))
    return Trial(trial.number, trial.parameters, attempts=trial.attempts)


def _check_stages(
    workspace: Workspace,
    config: Config,
    space: Space,
    features: Artifact,
    pairs: Artifact | None,
    parent: Artifact | None,
) -> str | None:
    """Refuse what cannot be trained on. Returns the vocabulary of the configured text tower, if stage 1 makes one from
    scratch.
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


def _about(
    config: Config,
    space: Space,
    budgets: Mapping[str, Budget],
    gallery: Mapping[str, Any],
    features: Artifact,
    pairs: Artifact | None,
    parent: Artifact | None,
) -> dict[str, Any]:
    """What the study is about, which must not change while it lasts."""
    return {
        "stage": config.tune.stage,
        "space": {
            key: dimension.model_dump(mode="json", exclude_defaults=True) for key, dimension in sorted(space.items())
        },
        "objectives": list(config.tune.judged_by),
        "metric": config.tune.metric,
        "rows": {name: [budget.rows_per_report, budget.reports] for name, budget in budgets.items()},
        "inputs": {
            kind: item.version
            for kind, item in (("features", features), ("pairs", pairs), ("model", parent))
            if item is not None
        },
        "gallery": dict(gallery),
        "configuration": _compared(config, space),
    }


def _gallery(config: Config, songs: Songs, mined: Pairs | None) -> dict[str, Any]:
    """The validation songs, and pairs, that every trial is measured on. Raises ConfigError when an objective has
    none.
    """
    from htcl_ray.training.validation import validation_gallery

    gallery = validation_gallery(songs.validation, None if mined is None else mined.validation)
    if not len(gallery.songs):
        raise ConfigError(
            "tune compares trials on validation songs, but no song is in the validation split; give data.split_shares a validation share "
            "and run 'htcl preprocess'"
        )
    if "preference" in config.tune.judged_by and not len(gallery.pairs):
        raise ConfigError(
            "tune.objectives asks for preference, but no pair has both songs in the validation gallery; choose semantic, or give more "
            "interactions between validation songs"
        )
    named = [[songs.song_ids[row], songs.texts[row]] for row in gallery.songs.tolist()]
    asked = gallery.pairs.tolist()
    return {"songs": len(named), "pairs": len(asked), "fingerprint": fingerprint(named, asked)}


def _compared(config: Config, space: Mapping[str, Dimension]) -> dict[str, Any]:
    """The configured values that every trial has: those that determine a model and are not searched."""
    sections = {name: getattr(config, name) for name in ("audio", "model", "text")}
    sections |= {name: getattr(config, name).resolved() for name in config.tune.stages}
    tree = {name: section.model_dump(mode="json") for name, section in sections.items()}
    return {
        f"{section}.{key}": value
        for section, values in tree.items()
        for key, value in values.items()
        if f"{section}.{key}" not in space
        and not (section in config.tune.stages and key in (*NOT_IN_MODEL, "epochs", "best_metric"))
    }


def _check_same_study(workspace: Workspace, study: str, about: Mapping[str, Any]) -> None:
    if not workspace.exists(f"{study}/{ABOUT}"):
        return
    before, now = _flat(workspace.read_json(f"{study}/{ABOUT}")), _flat(about)
    for name in {**before, **now}:
        if before.get(name) != now.get(name):
            raise ConfigError(
                f"the study in {workspace.uri_of(study)} was begun with {name} {before.get(name)}, and this command says "
                f"{now.get(name)}; name another study with tune.study, or search as before"
            )


def _flat(about: Mapping[str, Any]) -> dict[str, Any]:
    """What a study is about, a line each; the space as a whole."""
    flat: dict[str, Any] = {}
    for name, value in about.items():
        inner = value if isinstance(value, dict) and name != "space" else {"": value}
        flat |= {" ".join(filter(None, (name, key))): of_key for key, of_key in inner.items()}
    return flat


def _on_this_cluster(config: Config) -> Config:
    """The configuration with what depends on the cluster decided: how many trials fit, and GPUs or not, the same for
    every trial.
    """
    found = capacity()
    chosen: dict[str, Any] = {}
    fits = []
    for name in config.tune.stages:
        settings = getattr(config, name)
        fits.append(check_fits(name, settings, found))
        chosen[f"{name}.accelerator"] = "gpu" if use_gpu(settings, found) else "cpu"
    concurrent = config.tune.max_concurrent_trials or max(1, min(fits))
    if config.tune.max_concurrent_trials is None and found.grows is None:
        print(
            f"tune  how far this cluster can grow cannot be read here, so {concurrent} trial(s) run at a time, as many as fit on the "
            f"{found.max_nodes} node(s) that are there; tune.max_concurrent_trials says otherwise",
            flush=True,
        )
    else:
        print(f"tune  at most {concurrent} trial(s) at a time; the cluster is {found}", flush=True)
    shared = config.with_overrides({**chosen, "tune.max_concurrent_trials": concurrent})
    shared = shared.with_absolute_paths()  # trials run in folders of their own
    return shared.model_copy(update={"tracking": check_tracking(config.tracking)})


def _search(workspace: Workspace, job: TrialJob, space: Space, trials: list[Trial]) -> list[Trial]:
    """Run trials until as many have ended as are wanted; returns all of them."""
    # Read when Tune is imported, or by the processes that it starts.
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune

    logging.getLogger("ray.tune").setLevel(
        logging.CRITICAL
    )  # a failed trial's trace; our line has its reason, and Ray's logs the trace
    from htcl_ray.pipelines.tuning.study import StudyCallback, StudyTable, catch_up, resume, tidy

    config, settings = job.config, job.config.tune
    last_stage, last = list(job.budgets.items())[-1]
    metrics: dict[str, str] = {name: f"{METRICS[name]}_{settings.metric}" for name in settings.judged_by}
    found = distributions(config, space)
    for trial in trials:
        if not trial.ended:
            catch_up(workspace, job.study, trial, last_stage, metrics)
    table = StudyTable(workspace, job.study, trials)
    ours = table.trials.values()
    search, scheduler = resume(table, found, metrics, configured_point(config, space), settings, last)
    left = settings.trials - sum(trial.ended for trial in ours)
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
        if left > 0:
            tuner.fit()
    for trial in ours:
        if trial.ended:  # workers of a stopped trial may have written after its end
            tidy(workspace, job.study, trial)
    return list(ours)


def _write_results(
    workspace: Workspace,
    config: Config,
    study: str,
    space: Space,
    about: Mapping[str, Any],
    budgets: Mapping[str, Budget],
    trials: list[Trial],
    model: str | None,
) -> None:
    objectives = config.tune.judged_by
    best = winners(trials, objectives)
    for number, trial in enumerate(best):
        chosen = with_parameters(config, trial.parameters).as_yaml().encode()
        if number == 0:
            workspace.write_bytes(f"{study}/{BEST}", chosen)
        if len(objectives) > 1:
            workspace.write_bytes(f"{study}/pareto/{trial.number:04d}.yaml", chosen)
    configured = configured_point(config, space)
    as_it_was = next((trial.number for trial in trials if trial.parameters == configured), None)
    command = _command(workspace.uri_of(f"{study}/{BEST}"), config, model)
    manifest = build_manifest(
        "study",
        config=config.model_dump(mode="json"),
        inputs=about["inputs"],
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
        gallery=about["gallery"],
        configured=as_it_was,
        command=command,
        created=manifest["created"],
        config=manifest["config"],
        inputs=about["inputs"],
        libraries=manifest["libraries"],
    )
    workspace.write_bytes(f"{study}/report.html", report_html(report).encode())
    workspace.finish(study, manifest)
    if best:
        print(f"tune  to train the winner in full: {command}", flush=True)


def _command(best: str, config: Config, model: str | None) -> str:
    steps = [f"htcl {name} --config {best}" for name in config.tune.stages]
    return " && ".join(steps) + (f" --model {model}" if model else "")


def _summary(trials: list[Trial], config: Config) -> str:
    objectives = config.tune.judged_by
    best = winners(trials, objectives)
    if not best:
        return f"{len(trials)} trials, none saw all its rows"
    figures = ", ".join(f"{name} {config.tune.metric} {best[0].last[name]:.4f}" for name in objectives)
    front = f" ({len(best)} on the Pareto front)" if len(objectives) > 1 else ""
    return f"{len(trials)} trials, best {figures} in trial {best[0].number}{front}"
