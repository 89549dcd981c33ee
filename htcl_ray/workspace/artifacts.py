"""Selection of artifacts of the workspace: by version, or the newest that its gate allows."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from htcl_ray.config.sections import Require
from htcl_ray.errors import GateError, WorkspaceError
from htcl_ray.workspace.storage import Workspace


@dataclass(frozen=True)
class Artifact:
    """A finished artifact: its path in the workspace, its version, and its manifest."""

    path: str
    version: str
    manifest: dict[str, Any]

    @property
    def verdict(self) -> bool | None:
        """Whether the gate of an evaluation passed, as the manifest states; None when no gate has judged it."""
        gate = self.manifest.get("gate")
        return bool(gate.get("passed")) if isinstance(gate, dict) else None

    def refusal(self, require: Require) -> str | None:
        """The reason why `gate.require` forbids the artifact; None when it allows it."""
        if require != "off" and self.verdict is False:
            return "its gate failed"
        return "no gate has judged it" if require == "unjudged" and self.verdict is None else None


@dataclass(frozen=True)
class StepResult:
    """The result of a step, for people: one line of output and one row of the demo's summary."""

    step: str
    location: str
    """Path or URI of the artifact."""
    summary: str
    """Content of the artifact, in one phrase."""
    seconds: float
    skipped: bool = False
    """Whether the artifact already existed."""

    @property
    def version(self) -> str:
        """Version of the artifact: the last part of its location."""
        return self.location.rstrip("/").rpartition("/")[2]


@dataclass(frozen=True)
class Models:
    """The models that embed a catalogue: a semantic one and, after stage 2, the preference one fine-tuned from it."""

    semantic: Artifact
    preference: Artifact | None

    @property
    def paths(self) -> tuple[str, str | None]:
        """Folders of the semantic and the preference model, below the workspace's root."""
        return self.semantic.path, None if self.preference is None else self.preference.path


def _models(workspace: Workspace, space: str) -> list[Artifact]:
    return [
        Artifact(f"models/{space}/{name}", name, manifest) for name, manifest in workspace.finished(f"models/{space}")
    ]


def newest_semantic(workspace: Workspace, require: Require, *, first: str | None = None) -> Artifact:
    """The semantic model `first` if the gate allows it, else the newest that the gate allows.

    Raises WorkspaceError when no semantic model exists, and GateError when the gate allows none.
    """
    models = _models(workspace, "semantic")
    if not models:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no model; run 'htcl pretrain' first")
    chosen = _newest(models, lambda item: item.refusal(required_of_semantic(workspace, item, require)), first)
    if chosen is None:
        raise none_allowed(workspace, "semantic model", models, require)
    return chosen


def required_of_semantic(workspace: Workspace, semantic: Artifact, require: Require) -> Require:
    """The requirement on a semantic model: `failed` once a preference model fine-tuned from it has passed a gate."""
    judged = any(
        item.verdict and item.manifest["inputs"]["model"] == semantic.version
        for item in _models(workspace, "preference")
    )
    return "failed" if require == "unjudged" and judged else require


def newest_preference(
    workspace: Workspace, semantic: Artifact, require: Require, *, first: str | None = None
) -> Artifact | None:
    """The newest preference model fine-tuned from `semantic` that the gate allows; `first` takes precedence.

    Returns None when no such model exists.
    """
    children = [
        item for item in _models(workspace, "preference") if item.manifest["inputs"]["model"] == semantic.version
    ]
    return _newest(children, lambda item: item.refusal(require), first)


def named_models(workspace: Workspace, version: str) -> Models:
    """The preference model of a version with its parent, or the semantic model of a version, regardless of gates.

    Raises WorkspaceError when the version or the parent does not exist.
    """
    semantic = {item.version: item for item in _models(workspace, "semantic")}
    preference = {item.version: item for item in _models(workspace, "preference")}
    if version in semantic:
        return Models(semantic[version], None)
    if version in preference:
        parent = preference[version].manifest["inputs"]["model"]
        if parent not in semantic:
            raise WorkspaceError(
                f"model {version} was fine-tuned from semantic model {parent}, "
                f"which is missing from {workspace.uri}/models"
            )
        return Models(semantic[parent], preference[version])
    known = ", ".join([*semantic, *preference]) or "none: the workspace holds no model; run 'htcl pretrain' first"
    raise WorkspaceError(f"the workspace has no model '{version}' in {workspace.uri}/models; expected one of {known}")


def models_of(workspace: Workspace, made: Artifact) -> Models:
    """The models that computed embeddings, or the embeddings of an index."""
    models: dict[str, Artifact | None] = {"semantic": None, "preference": None}
    for stage in models:
        version = made.manifest["inputs"][stage]
        if version is not None:
            path = f"models/{stage}/{version}"
            manifest = workspace.manifest(path)
            if manifest is None:
                raise WorkspaceError(
                    f"{workspace.uri_of(made.path)} was made with {stage} model {version}, "
                    f"which {workspace.uri_of(path)} lacks"
                )
            models[stage] = Artifact(path, version, manifest)
    semantic = models["semantic"]
    if semantic is None:
        raise WorkspaceError(f"{workspace.uri_of(made.path)} names no semantic model; make it again")
    return Models(semantic, models["preference"])


def index(workspace: Workspace, version: str | None = None, *, require: Require = "failed") -> Artifact:
    """The index of a version, regardless of gates, or the newest that its gate and those of its models allow.

    Raises WorkspaceError when no such index exists, and GateError when the gates allow none.
    """
    indexes = [Artifact(f"index/{name}", name, manifest) for name, manifest in workspace.finished("index")]
    if not indexes:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no index; run 'htcl index' first")
    if version is None:
        newest = _newest(indexes, lambda item: item.refusal(require) or _refusal_of_models(workspace, item, require))
        if newest is None:
            raise none_allowed(workspace, "index", indexes, require)
        return newest
    for item in indexes:
        if item.version == version:
            return item
    known = ", ".join(item.version for item in indexes)
    raise WorkspaceError(f"the workspace has no index '{version}' in {workspace.uri}/index; expected one of {known}")


def _newest(
    artifacts: list[Artifact], refusal: Callable[[Artifact], str | None], first: str | None = None
) -> Artifact | None:
    """Choose version `first`, else the newest, of the artifacts that are not refused; None when all are refused.

    Prints a note to standard error unless the choice is the newest artifact. `artifacts`: oldest first.
    """
    notes: list[str] = []
    for item in sorted(reversed(artifacts), key=lambda item: item.version != first):
        reason = refusal(item)
        if reason is None:
            if item is not artifacts[-1] and not notes:
                notes = [f"{artifacts[-1].path} is newer, but this configuration produces {item.path}"]
            _print_notes(*notes, *([f"using {item.path}"] if notes else []))
            return item
        newest = ", the newest," if item is artifacts[-1] else ""
        notes.append(f"{item.path}{newest} is passed over: {reason}")
    _print_notes(*notes, *(["no other exists"] if notes else []))
    return None


def _print_notes(*parts: str) -> None:
    if parts:
        print("; ".join(parts), file=sys.stderr, flush=True)


def _refusal_of_models(workspace: Workspace, made: Artifact, require: Require) -> str | None:
    """The reason why the gate of a model of this index forbids it; `unjudged` applies to the last stage's model."""
    stages = [stage for stage in ("preference", "semantic") if made.manifest["inputs"].get(stage)]
    for number, stage in enumerate(stages):
        path = f"models/{stage}/{made.manifest['inputs'][stage]}"
        reason = Artifact(path, "", workspace.manifest(path) or {}).refusal(
            require if number == 0 or require == "off" else "failed"
        )
        if reason:
            return f"of its {stage} model, {reason}"
    return None


def none_allowed(workspace: Workspace, kind: str, artifacts: Iterable[Artifact], require: Require) -> GateError:
    """The error for a gate that allows none of several artifacts."""
    listed = ", ".join(
        f"{item.version} {'passed' if item.verdict else 'failed' if item.verdict is False else 'unjudged'}"
        for item in artifacts
    )
    return GateError(
        f"gate.require={require} allows no {kind} in {workspace.uri} ({listed}); improve one and run "
        "'htcl evaluate --gate' again, or use one all the same with gate.require=off"
    )
