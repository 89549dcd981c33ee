"""Artifacts of the workspace: by version when one is named, otherwise the newest whose gate allows it."""

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
    """A finished artifact: where it lies below the workspace's root, its version, and its manifest."""

    path: str
    version: str
    manifest: dict[str, Any]

    @property
    def verdict(self) -> bool | None:
        """Whether an evaluation's gate passed; None when none has judged it. As its manifest says, unchecked."""
        gate = self.manifest.get("gate")
        return bool(gate.get("passed")) if isinstance(gate, dict) else None

    def refusal(self, require: Require) -> str | None:
        """Why `gate.require` forbids it; None when it does not."""
        if require != "off" and self.verdict is False:
            return "its gate failed"
        return "no gate has judged it" if require == "unjudged" and self.verdict is None else None


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


@dataclass(frozen=True)
class Models:
    """The model(s) that embed a catalogue: the semantic one and, after stage 2, the preference one that grew from
    it.
    """

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
    """The semantic model `first` if there is one, else the newest, of those that the gate allows.

    Raises WorkspaceError when there is none, and GateError when the gate allows none.
    """
    found = _models(workspace, "semantic")
    if not found:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no model; run 'htcl pretrain' first")
    chosen = _newest(found, lambda item: item.refusal(asked_of_semantic(workspace, item, require)), first)
    if chosen is None:
        raise none_allowed(workspace, "semantic model", found, require)
    return chosen


def asked_of_semantic(workspace: Workspace, semantic: Artifact, require: Require) -> Require:
    """`require` of a semantic model: one from which a preference model grew that passed was judged with it."""
    judged = any(
        item.verdict and item.manifest["inputs"]["model"] == semantic.version
        for item in _models(workspace, "preference")
    )
    return "failed" if require == "unjudged" and judged else require


def newest_preference(
    workspace: Workspace, semantic: Artifact, require: Require, *, first: str | None = None
) -> Artifact | None:
    """The preference model `first`, else the newest, of those that grew from `semantic` and that the gate allows; None
    without any.
    """
    children = [
        item for item in _models(workspace, "preference") if item.manifest["inputs"]["model"] == semantic.version
    ]
    return _newest(children, lambda item: item.refusal(require), first)


def named_models(workspace: Workspace, version: str) -> Models:
    """That preference model and its parent, or that semantic model alone, whatever their gates say. Raises
    WorkspaceError.
    """
    semantic = {item.version: item for item in _models(workspace, "semantic")}
    preference = {item.version: item for item in _models(workspace, "preference")}
    if version in semantic:
        return Models(semantic[version], None)
    if version in preference:
        parent = preference[version].manifest["inputs"]["model"]
        if parent not in semantic:
            raise WorkspaceError(
                f"model {version} was fine-tuned from semantic model {parent}, which is missing from {workspace.uri}/models"
            )
        return Models(semantic[parent], preference[version])
    known = ", ".join([*semantic, *preference]) or "none: the workspace holds no model; run 'htcl pretrain' first"
    raise WorkspaceError(f"there is no model '{version}' in {workspace.uri}/models; expected one of {known}")


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


def index(workspace: Workspace, version: str | None = None, *, require: Require = "failed") -> Artifact:
    """An index by version, whatever its gate says, or the newest that its gate and those of its models allow.

    Raises WorkspaceError when there is none, and GateError when the gates allow none.
    """
    found = [Artifact(f"index/{name}", name, manifest) for name, manifest in workspace.finished("index")]
    if not found:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no index; run 'htcl index' first")
    if version is None:
        newest = _newest(found, lambda item: item.refusal(require) or _refusal_of_models(workspace, item, require))
        if newest is None:
            raise none_allowed(workspace, "index", found, require)
        return newest
    for item in found:
        if item.version == version:
            return item
    raise WorkspaceError(
        f"there is no index '{version}' in {workspace.uri}/index; expected one of {', '.join(item.version for item in found)}"
    )


def _newest(
    found: list[Artifact], refusal: Callable[[Artifact], str | None], first: str | None = None
) -> Artifact | None:
    """The one of version `first`, else the last, of those that are not refused. Says so when that is not the last."""
    passed_over: list[str] = []
    for item in sorted(reversed(found), key=lambda item: item.version != first):
        reason = refusal(item)
        if reason is None:
            if item is not found[-1] and not passed_over:
                passed_over = [f"{found[-1].path} is newer, but {item.path} is what this configuration makes"]
            _say(*passed_over, *([f"using {item.path}"] if passed_over else []))
            return item
        newest = ", the newest," if item is found[-1] else ""
        passed_over.append(f"{item.path}{newest} is passed over: {reason}")
    _say(*passed_over, *(["there is no other"] if passed_over else []))
    return None


def _say(*parts: str) -> None:
    if parts:
        print("; ".join(parts), file=sys.stderr, flush=True)


def _refusal_of_models(workspace: Workspace, made: Artifact, require: Require) -> str | None:
    """Why the gate of a model that made this index forbids it. The model of the last stage is the one that is
    judged.
    """
    stages = [stage for stage in ("preference", "semantic") if made.manifest["inputs"].get(stage)]
    for number, stage in enumerate(stages):
        path = f"models/{stage}/{made.manifest['inputs'][stage]}"
        reason = Artifact(path, "", workspace.manifest(path) or {}).refusal(
            require if number == 0 or require == "off" else "failed"
        )
        if reason:
            return f"of its {stage} model, {reason}"
    return None


def none_allowed(workspace: Workspace, kind: str, found: Iterable[Artifact], require: Require) -> GateError:
    """The error of a gate that allows none of several artifacts."""
    listed = ", ".join(
        f"{item.version} {'passed' if item.verdict else 'failed' if item.verdict is False else 'unjudged'}"
        for item in found
    )
    return GateError(
        f"gate.require={require} allows no {kind} in {workspace.uri} ({listed}); improve one and run 'htcl evaluate --gate' again, "
        "or use one all the same with gate.require=off"
    )
