"""The artifacts that a step reads: those that the configuration determines, by the fingerprints with which they are
made.

A configuration that names no catalogue, or no log, determines none; then the workspace must hold exactly one that fits.
Models that the configuration does not determine are the newest accepted ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, Require, StageSettings
from htcl_ray.errors import ConfigError, InputError, MismatchError, WorkspaceError
from htcl_ray.evaluation.release_gate import check_gates
from htcl_ray.pipelines.events import plan_log
from htcl_ray.pipelines.make_features import plan_features
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, Models
from htcl_ray.workspace.manifest import file_sha256, fingerprint
from htcl_ray.workspace.storage import Workspace

PREPROCESS = "run 'htcl preprocess' with this configuration first"


def features(workspace: Workspace, config: Config) -> Artifact:
    """The features of `data.catalog` as it is now. Raises InputError when there are none, or without a catalogue
    several.
    """
    if config.data.catalog:
        for version in plan_features(config).versions:
            if (manifest := workspace.manifest(f"features/{version}")) is not None:
                return Artifact(f"features/{version}", version, manifest)
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no features of {', '.join(config.data.catalog)} with its present content and audio files "
            f"and these settings of audio and data; {PREPROCESS}"
        )
    found = _finished(workspace, "features")
    if not found:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no features; run 'htcl preprocess' first")
    return _only(workspace, "features", _made_with(found, config, "audio"), "data.catalog", "catalog")


def pairs(workspace: Workspace, config: Config, features_version: str) -> Artifact | None:
    """The preference pairs of these features and `data.interactions`; None when there is no log, and none were ever
    mined.

    Raises InputError when they are missing, or without a log in the configuration several.
    """
    if config.data.interactions:
        return _of_log(workspace, config, features_version, "pairs", plan_log(config, features_version).pairs_version)
    found = [
        item for item in _finished(workspace, "pairs") if item.manifest["inputs"].get("features") == features_version
    ]
    return (
        _only(workspace, "pairs", _made_with(found, config, "pairs"), "data.interactions", "interactions")
        if found
        else None
    )


def events(workspace: Workspace, config: Config, features_version: str) -> Artifact | None:
    """The log rows that `pairs` are mined from, by the same rules."""
    if config.data.interactions:
        return _of_log(workspace, config, features_version, "events", plan_log(config, features_version).events_version)
    mined = pairs(workspace, config, features_version)
    found = [
        item for item in _finished(workspace, "events") if item.manifest["inputs"].get("features") == features_version
    ]
    if mined is not None and "events" in mined.manifest["inputs"]:
        found = [item for item in found if item.version == mined.manifest["inputs"]["events"]]
    return _only(workspace, "events", found, "data.interactions", "interactions") if found else None


def models(
    workspace: Workspace,
    config: Config,
    features_version: str,
    version: str | None = None,
    *,
    require: Require | None = None,
) -> Models:
    """The models to use: `version` and its parent, else those that this configuration trains, else the newest accepted.

    Says so when the newest is not taken. `require`: what is asked of their gates, `gate.require` unless given. Raises
    WorkspaceError when there is no model, GateError when a gate forbids the one that was named, or all.
    """
    require = config.gate.require if require is None else require
    if version is not None:
        chosen = artifacts.named_models(workspace, version)
    else:
        semantic = _semantic(workspace, config, features_version, require)
        wanted = _preference_of(workspace, config, features_version, semantic)
        chosen = Models(semantic, artifacts.newest_preference(workspace, semantic, require, first=wanted))
    check_gates(workspace, chosen, None, require)
    return chosen


def parent(workspace: Workspace, config: Config, features_version: str, version: str | None = None) -> Artifact:
    """The semantic model that stage 2 starts from; see `models`."""
    require = config.gate.require
    if version is not None:
        semantic = artifacts.named_models(workspace, version).semantic
    else:
        semantic = _semantic(workspace, config, features_version, require)
    check_gates(workspace, Models(semantic, None), None, artifacts.asked_of_semantic(workspace, semantic, require))
    return semantic


def _semantic(workspace: Workspace, config: Config, features_version: str, require: Require) -> Artifact:
    wanted = semantic_version(config, features_version)
    chosen = artifacts.newest_semantic(workspace, require, first=wanted)
    if workspace.manifest(f"models/semantic/{wanted}") is None:
        print(
            f"using semantic model {chosen.version}, the newest accepted: the workspace does not hold {wanted}, which this configuration "
            "trains ('htcl pretrain' makes it)",
            file=sys.stderr,
            flush=True,
        )
    return chosen


def semantic_version(config: Config, features_version: str) -> str:
    """Fingerprint of the model of stage 1 that this configuration trains."""
    settings = {name: getattr(config, name).model_dump(mode="json") for name in ("audio", "text", "model")}
    weights = _text_weights(config)
    if weights:  # the folder's content says what it is, not its name
        settings["text"]["name_or_path"] = None
    return fingerprint("semantic", FORMAT_VERSION, features_version, settings, weights, _determining(config.pretrain))


def preference_version(config: Config, features_version: str, pairs_version: str, parent_version: str) -> str:
    """Fingerprint of the model of stage 2 that this configuration trains."""
    return fingerprint(
        "preference", FORMAT_VERSION, features_version, pairs_version, parent_version, _determining(config.finetune)
    )


def _preference_of(workspace: Workspace, config: Config, features_version: str, semantic: Artifact) -> str | None:
    try:
        mined = pairs(workspace, config, features_version)
    except InputError:  # a log that cannot be read, or was not mined yet, determines no model
        return None
    return None if mined is None else preference_version(config, features_version, mined.version, semantic.version)


def _of_log(workspace: Workspace, config: Config, features_version: str, kind: str, version: str) -> Artifact:
    manifest = workspace.manifest(f"{kind}/{version}")
    if manifest is None:
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no {kind} of {', '.join(config.data.interactions)} for the features {features_version} "
            f"and these settings of data and pairs; {PREPROCESS}"
        )
    return Artifact(f"{kind}/{version}", version, manifest)


def _finished(workspace: Workspace, kind: str) -> list[Artifact]:
    return [Artifact(f"{kind}/{name}", name, manifest) for name, manifest in workspace.finished(kind)]


def _made_with(found: list[Artifact], config: Config, section: str) -> list[Artifact]:
    """Those that were made with the configured section. Raises MismatchError with both values when none was."""
    ours = getattr(config, section).model_dump(mode="json")
    fitting = [item for item in found if item.manifest["config"][section] == ours]
    if fitting:
        return fitting
    newest = found[-1]
    theirs = newest.manifest["config"][section]
    key = next(key for key in (*ours, *theirs) if theirs.get(key) != ours.get(key))
    raise MismatchError(
        f"the {newest.path.partition('/')[0]} {newest.version} were made with {section}.{key}={theirs.get(key)}, but the configuration "
        f"says {ours.get(key)}; run 'htcl preprocess' with this configuration or give the one they were made with"
    )


def _only(workspace: Workspace, kind: str, found: list[Artifact], key: str, field: str) -> Artifact:
    if len(found) > 1:
        listed = "; ".join(f"{item.version} of {', '.join(item.manifest['config']['data'][field])}" for item in found)
        raise ConfigError(
            f"the workspace {workspace.uri} holds several {kind} ({listed}); say which by {key}, as for 'htcl preprocess'"
        )
    return found[0]


def _text_weights(config: Config) -> dict[str, str]:
    """What a local pretrained text model holds; a hub name stands for itself."""
    folder = Path(config.text.name_or_path or "")
    if config.text.name_or_path is None or not folder.is_dir():
        return {}
    return {
        file.name: file_sha256(file)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json", ".txt", ".model")
    }


def _determining(settings: StageSettings) -> dict[str, Any]:
    return {
        name: value for name, value in settings.resolved().model_dump(mode="json").items() if name not in NOT_IN_MODEL
    }
