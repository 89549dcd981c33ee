"""`htcl index --compact`: an index and its update log → a new index version and a log of one file. Needs no Ray."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from htcl_ray.config import Config
from htcl_ray.errors import StepError
from htcl_ray.index.live.activation import check_accepted, starting_pointer
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import UpdateLog
from htcl_ray.index.recall import build_measured
from htcl_ray.index.song_index import SongIndex
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.search.song_map import draw_map
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, StepResult
from htcl_ray.workspace.manifest import fingerprint
from htcl_ray.workspace.storage import Workspace


def compact(config: Config, version: str | None = None) -> StepResult:
    """Apply the update log to an index (default: the active one, else the newest accepted), and merge the log's files.

    The new version is not activated; `POST /v1/index/activate` does that. The merged log keeps all updates, since they
    also apply to other indexes: a removed song stays out of an index that is later built from the catalogue. Raises
    InputError when the index does not exist or its gate forbids it (`gate.require`), and StepError when the recall of
    the new version is below `index.min_recall`.
    """
    started = time.monotonic()
    workspace = Workspace(config.workspace)
    require = config.gate.require
    chosen = starting_pointer(workspace, version, require=require).version
    artifacts.index(workspace, chosen)
    source = check_accepted(workspace, chosen, require)
    index = SongIndex.load(workspace.local_copy(source.path))
    log = UpdateLog(workspace)
    replay = Replay(index, log)
    replay.catch_up()
    path, skipped = source.path, True
    if replay.changed:
        path = f"index/{fingerprint('compacted', FORMAT_VERSION, source.version, sorted(replay.names.items()))}"
        skipped = workspace.manifest(path) is not None
        if not skipped:
            _build(workspace, source, replay, path)
    merged = log.merge()
    changes = f"{len(replay.added)} songs added and {len(replay.removed)} removed since index {source.version}"
    summary = f"{len(index)} songs, {changes}" + (f"; {merged} files of the log became one" if merged else "")
    return StepResult("index", workspace.uri_of(path), summary, time.monotonic() - started, skipped)


def _build(workspace: Workspace, source: Artifact, replay: Replay, path: str) -> None:
    index = replay.index
    index.compact()
    song_ids = index.songs["song_id"].to_pylist()
    vectors = index.vectors_of(song_ids)
    built, recall = build_measured(
        song_ids, vectors, metadata=index.songs, settings=index.settings, model_versions=index.model_versions
    )
    if recall.worst < index.settings.min_recall:
        raise StepError(
            f"the compacted {built.kind} index finds {recall.worst:.3f} of the 10 nearest songs at its worst blend, "
            f"but index.min_recall was {index.settings.min_recall} when it was built; build one with 'htcl index' and "
            "other settings, and compact that"
        )
    built.song_map = draw_map(built)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "index"
        inputs = {**source.manifest["inputs"], "compacted_from": source.version, "updates_through": replay.last}
        built.save(
            folder,
            config=source.manifest["config"],
            inputs=inputs,
            quality=recall.quality(),
            auto_tags=source.manifest.get("auto_tags"),
        )
        workspace.publish(folder, path, built.manifest)
