"""`htcl preprocess`: catalogue → features; logs → events → preference pairs and negatives.

Rejected rows go to the quarantine tables. Input that a user has to correct is reported before Ray starts.
"""

from __future__ import annotations

import time

from htcl_ray.catalog.quarantine import describe
from htcl_ray.config import Config
from htcl_ray.pipelines.estimate_tags import check_auto_tags, described, estimates_version, make_estimates
from htcl_ray.pipelines.events import LogPlan, check_all_renames, check_log, make_events, plan_log
from htcl_ray.pipelines.make_features import FeaturesPlan, check_rejected, make_features, plan_features
from htcl_ray.pipelines.mine_pairs import make_pairs
from htcl_ray.workspace.artifacts import StepResult
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.storage import Workspace


def preprocess(config: Config) -> StepResult:
    """Make features of `data.catalog` and, when `data.interactions` is given, events, preference pairs and negatives.

    With `catalog.auto_tags` the genre, mood and tags of songs without them are estimated from the features.

    Finished artifacts are kept and unfinished ones completed. Raises InputError for input that cannot be used.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    workspace.check_writable()
    if config.data.catalog:
        tables = without_credentials(", ".join(config.data.catalog))
        given = config.audio.extractor == "vectors"
        print(
            f"preprocess  reading {tables} and {'its vectors' if given else 'the sizes of its audio files'}", flush=True
        )
    check_auto_tags(config)
    plan = plan_features(config)
    quarantine = f"quarantine/{plan.version}"
    if plan.rejected.num_rows:
        workspace.write_table(f"{quarantine}/catalog.parquet", plan.rejected)
    check_rejected(config, plan, plan.rejected, plan.songs.num_rows, workspace.uri_of(quarantine))
    log = plan_log(config, plan.version) if config.data.interactions else None
    check_all_renames(config)
    needs_features = workspace.manifest(f"features/{plan.version}") is None
    estimates = f"estimates/{estimates_version(config, plan.version)}" if config.catalog.auto_tags else None
    needs_estimates = estimates is not None and workspace.manifest(estimates) is None
    needs_events = log is not None and workspace.manifest(f"events/{log.events_version}") is None
    needs_pairs = log is not None and any(
        workspace.manifest(f"{kind}/{log.pairs_version}") is None for kind in ("pairs", "negatives")
    )
    if log is not None and needs_events:
        check_log(config, log, plan.songs["song_id"].combine_chunks())
    if needs_features:
        if plan.catalog.null_cells.counts:
            print(f"preprocess  catalogue: {plan.catalog.null_cells}", flush=True)
        make_features(workspace, config, plan)
    if needs_estimates:
        make_estimates(workspace, config, plan.version)
    if log is not None and needs_events:
        make_events(workspace, config, log, plan.version)
    if log is not None and (needs_events or needs_pairs):
        make_pairs(workspace, config, log, plan.version)
    summary = _summary(workspace, plan, estimates, log)
    skipped = not (needs_features or needs_estimates or needs_events or needs_pairs)
    location = workspace.uri_of(f"features/{plan.version}")
    return StepResult("preprocess", location, summary, time.monotonic() - started, skipped)


def _summary(workspace: Workspace, plan: FeaturesPlan, estimates: str | None, log: LogPlan | None) -> str:
    features = (workspace.manifest(f"features/{plan.version}") or {})["quality"]
    text = f"{features['songs']:,} songs, {describe(features['rejected'])}"
    if features["partly_decoded"]:
        text += f", {features['partly_decoded']:,} decoded only in part"
    if estimates is not None:
        text += f", estimated: {described((workspace.manifest(estimates) or {})['auto_tags']['songs'])}"
    if log is None:
        return text
    events, pairs = (
        (workspace.manifest(path) or {})["quality"]
        for path in (f"events/{log.events_version}", f"pairs/{log.pairs_version}")
    )
    return f"{text}; {events['events']:,} events, {describe(events['rejected'])}; {pairs['pairs']:,} pairs"
