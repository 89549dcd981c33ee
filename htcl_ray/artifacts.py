"""Which artifact of the workspace a step works on: by version when one is named, otherwise the newest that fits the configuration."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from htcl_ray.config import Config
from htcl_ray.errors import GateError, MismatchError, WorkspaceError
from htcl_ray.storage import Workspace


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: where it lies below the workspace's root, its version, and its manifest."""

    path: str
    version: str
    manifest: dict[str, Any]

    @property
    def gate_failed(self) -> bool:
        """Whether an evaluation's gate did not let it through; False when none has judged it. As its manifest says, unchecked."""
        gate = self.manifest.get("gate")
        return isinstance(gate, dict) and gate.get("passed") is False


@dataclass(frozen=True)
class StepResult:
    """What a step did, for a person: one row of the demo's summary table."""

    step: str
    location: str
    """Path or URI of what came out."""
    summary: str
    """What came out, in a phrase."""
    seconds: float
    skipped: bool = False
    """The artifact was already there."""


def features(workspace: Workspace, config: Config) -> Artifact:
    """The newest features of this catalogue, or of any when the configuration names none. Raises when their recipe is another."""
    found = [Artifact(f"features/{name}", name, manifest) for name, manifest in workspace.finished("features")]
    if config.data.catalog:
        wanted = list(config.data.catalog)
        found = [item for item in found if item.manifest["config"]["data"]["catalog"] == wanted]
    if not found:
        of = f" of {', '.join(config.data.catalog)}" if config.data.catalog else ""
        raise WorkspaceError(f"the workspace {workspace.uri} holds no features{of}; run 'htcl preprocess' first")
    newest = found[-1]
    theirs, ours = newest.manifest["config"]["audio"], config.audio.model_dump(mode="json")
    for key, value in ours.items():
        if theirs.get(key) != value:
            raise MismatchError(
                f"the features {newest.version} were made with audio.{key}={theirs.get(key)}, but the configuration says {value}; "
                "run 'htcl preprocess' with this configuration or give the one they were made with"
            )
    return newest


def pairs(workspace: Workspace, features_version: str) -> Artifact | None:
    """The newest preference pairs mined on these features, or None."""
    return _newest_from(workspace, "pairs", "features", features_version)


def events(workspace: Workspace, features_version: str) -> Artifact | None:
    """The newest accepted log rows on these features, or None."""
    return _newest_from(workspace, "events", "features", features_version)


def _newest_from(workspace: Workspace, kind: str, input_name: str, version: str) -> Artifact | None:
    for name, manifest in reversed(workspace.finished(kind)):
        if manifest["inputs"].get(input_name) == version:
            return Artifact(f"{kind}/{name}", name, manifest)
    return None


@dataclass(frozen=True)
class Models:
    """The model(s) that embed a catalogue: the semantic one and, after stage 2, the preference one that grew from it."""

    semantic: Artifact
    preference: Artifact | None


def models(workspace: Workspace, version: str | None = None, *, accepted: bool = True) -> Models:
    """The models to use.

    Without `version`: the newest semantic model, with the newest preference model fine-tuned from it, if there is one; those whose gate
    failed are passed over, with a line that says so, unless not `accepted`. With one: that preference model and its parent, or that
    semantic model alone, whatever their gate says. Raises WorkspaceError when there is none, GateError when all semantic models failed.
    """
    semantic = {name: Artifact(f"models/semantic/{name}", name, m) for name, m in workspace.finished("models/semantic")}
    preference = {name: Artifact(f"models/preference/{name}", name, m) for name, m in workspace.finished("models/preference")}
    if not semantic:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no model; run 'htcl pretrain' first")
    if version is None:
        newest = _newest(list(semantic.values()), accepted)
        if newest is None:
            raise _all_failed(workspace, "semantic model", semantic)
        children = [item for item in preference.values() if item.manifest["inputs"]["model"] == newest.version]
        return Models(newest, _newest(children, accepted))
    if version in semantic:
        return Models(semantic[version], None)
    if version in preference:
        parent = preference[version].manifest["inputs"]["model"]
        if parent not in semantic:
            raise WorkspaceError(
                f"model {version} was fine-tuned from semantic model {parent}, which is missing from {workspace.uri}/models"
            )
        return Models(semantic[parent], preference[version])
    known = ", ".join([*semantic, *preference])
    raise WorkspaceError(f"there is no model '{version}' in {workspace.uri}/models; expected one of {known}")


def embeddings(workspace: Workspace, features_version: str, by: Models) -> Artifact:
    """The vectors that exactly these models gave these features."""
    wanted = {"features": features_version, "semantic": by.semantic.version, "preference": by.preference.version if by.preference else None}
    for name, manifest in reversed(workspace.finished("embeddings")):
        if all(manifest["inputs"].get(key) == value for key, value in wanted.items()):
            return Artifact(f"embeddings/{name}", name, manifest)
    made = f"semantic model {wanted['semantic']}" + (f" and preference model {wanted['preference']}" if by.preference else "")
    raise WorkspaceError(
        f"the workspace {workspace.uri} holds no embeddings of the features {features_version} by {made}; run 'htcl embed' first"
    )


def models_of(workspace: Workspace, made: Artifact) -> Models:
    """The models that made embeddings or an index."""
    found: dict[str, Artifact | None] = {"semantic": None, "preference": None}
    for stage in found:
        version = made.manifest["inputs"][stage]
        if version is not None:
            path = f"models/{stage}/{version}"
            manifest = workspace.manifest(path)
            if manifest is None:
                raise WorkspaceError(
                    f"{workspace.uri_of(made.path)} was made with {stage} model {version}, which {workspace.uri_of(path)} lacks"
                )
            found[stage] = Artifact(path, version, manifest)
    semantic = found["semantic"]
    if semantic is None:
        raise WorkspaceError(f"{workspace.uri_of(made.path)} names no semantic model; make it again")
    return Models(semantic, found["preference"])


def index(workspace: Workspace, version: str | None = None, *, accepted: bool = True) -> Artifact:
    """An index by version, whatever its gate says, or the newest.

    Of the newest, those are passed over whose gate failed, or that of one of their models, with a line that says so, unless not
    `accepted`. Raises WorkspaceError when there is none, GateError when all failed.
    """
    found = {name: Artifact(f"index/{name}", name, manifest) for name, manifest in workspace.finished("index")}
    if not found:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no index; run 'htcl index' first")
    if version is None:
        newest = _newest(list(found.values()), accepted, lambda item: item.gate_failed or _model_failed(workspace, item))
        if newest is None:
            raise _all_failed(workspace, "index", found)
        return newest
    if version not in found:
        raise WorkspaceError(f"there is no index '{version}' in {workspace.uri}/index; expected one of {', '.join(found)}")
    return found[version]


def index_of(workspace: Workspace, by: Models) -> Artifact | None:
    """The newest index of vectors that exactly these models made, or None."""
    wanted = (by.semantic.version, by.preference.version if by.preference else None)
    for name, manifest in reversed(workspace.finished("index")):
        if (manifest["inputs"].get("semantic"), manifest["inputs"].get("preference")) == wanted:
            return Artifact(f"index/{name}", name, manifest)
    return None


def _newest(found: list[Artifact], accepted: bool, failed: Callable[[Artifact], bool] = lambda item: item.gate_failed) -> Artifact | None:
    """The last, or the last that did not fail; what is passed over is printed."""
    for item in reversed(found):
        if not (accepted and failed(item)):
            return item
        print(f"{item.path} is passed over: its gate failed", file=sys.stderr, flush=True)
    return None


def _model_failed(workspace: Workspace, made: Artifact) -> bool:
    """Whether the gate of a model that made this index failed."""
    paths = [f"models/{stage}/{made.manifest['inputs'].get(stage)}" for stage in ("semantic", "preference")]
    return any(Artifact(path, "", workspace.manifest(path) or {}).gate_failed for path in paths)


def _all_failed(workspace: Workspace, kind: str, found: Iterable[str]) -> GateError:
    return GateError(
        f"the gate of every {kind} in {workspace.uri} failed ({', '.join(found)}); "
        "improve one and run 'htcl evaluate --gate' again, or name the one to use"
    )
