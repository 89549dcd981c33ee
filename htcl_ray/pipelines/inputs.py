"""Input artifacts of a step: those with the fingerprints that the configuration determines.

Without a catalogue or a log in the configuration, the workspace must hold exactly one artifact that fits. Models that
the configuration does not determine are the newest accepted ones.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from htcl_ray.config import Config
from htcl_ray.config.sections import NOT_IN_MODEL, PretrainSettings, Require, StageSettings
from htcl_ray.errors import ConfigError, InputError, MismatchError, WorkspaceError
from htcl_ray.evaluation.release_gate import check_gates
from htcl_ray.pipelines.events import plan_log
from htcl_ray.pipelines.make_features import plan_features
from htcl_ray.schemas import FORMAT_VERSION
from htcl_ray.training.warm_start import source_identity
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.artifacts import Artifact, Models
from htcl_ray.workspace.manifest import file_sha256, fingerprint
from htcl_ray.workspace.storage import Workspace

PREPROCESS = "run 'htcl preprocess' with this configuration first"


def features(workspace: Workspace, config: Config) -> Artifact:
    """The features of `data.catalog` with its present content, or the only features when no catalogue is configured.

    Raises InputError when they do not exist, or when several do and no catalogue is configured.
    """
    if config.data.catalog:
        for version in plan_features(config).versions:
            if (manifest := workspace.manifest(f"features/{version}")) is not None:
                return Artifact(f"features/{version}", version, manifest)
        raise WorkspaceError(
            f"the workspace {workspace.uri} holds no features of {', '.join(config.data.catalog)} with its present "
            f"content and audio files and these settings of audio and data; {PREPROCESS}"
        )
    finished = _finished(workspace, "features")
    if not finished:
        raise WorkspaceError(f"the workspace {workspace.uri} holds no features; run 'htcl preprocess' first")
    return _only(workspace, "features", _made_with(finished, config, "audio"), "data.catalog", "catalog")


def pairs(workspace: Workspace, config: Config, features_version: str) -> Artifact | None:
    """The preference pairs of these features and `data.interactions`; None without a log and without mined pairs.

    Raises InputError when they do not exist, or when several do and no log is configured.
    """
    if config.data.interactions:
        return _of_log(workspace, config, features_version, "pairs", plan_log(config, features_version).pairs_version)
    mined = _of_features(workspace, "pairs", features_version)
    if not mined:
        return None
    return _only(workspace, "pairs", _made_with(mined, config, "pairs"), "data.interactions", "interactions")


def events(workspace: Workspace, config: Config, features_version: str) -> Artifact | None:
    """The events that `pairs` are mined from, chosen by the same rules."""
    if config.data.interactions:
        return _of_log(workspace, config, features_version, "events", plan_log(config, features_version).events_version)
    mined = pairs(workspace, config, features_version)
    candidates = _of_features(workspace, "events", features_version)
    if mined is not None and "events" in mined.manifest["inputs"]:
        candidates = [item for item in candidates if item.version == mined.manifest["inputs"]["events"]]
    return _only(workspace, "events", candidates, "data.interactions", "interactions") if candidates else None


def models(
    workspace: Workspace,
    config: Config,
    features_version: str,
    version: str | None = None,
    *,
    require: Require | None = None,
) -> Models:
    """The models to use: `version` and its parent, else those that this configuration trains, else the newest accepted.

    Reports on standard error when the newest model is not used. `require`: in place of `gate.require`. Raises
    WorkspaceError without a model, and GateError when a gate forbids the named model or all models.
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
    check_gates(workspace, Models(semantic, None), None, artifacts.required_of_semantic(workspace, semantic, require))
    return semantic


def _semantic(workspace: Workspace, config: Config, features_version: str, require: Require) -> Artifact:
    wanted = semantic_version(config, features_version)
    chosen = artifacts.newest_semantic(workspace, require, first=wanted)
    if workspace.manifest(f"models/semantic/{wanted}") is None:
        print(
            f"using semantic model {chosen.version}, the newest accepted: the workspace does not hold {wanted}, "
            "which this configuration trains ('htcl pretrain' makes it)",
            file=sys.stderr,
            flush=True,
        )
    return chosen


def semantic_version(config: Config, features_version: str) -> str:
    """Fingerprint of the stage-1 model that this configuration trains."""
    sections = {"audio": config.audio.resolved(), "text": config.text, "model": config.model}
    settings = {name: section.model_dump(mode="json") for name, section in sections.items()}
    weights = _text_weights(config)
    if weights:  # the content of the folder counts, not its name
        settings["text"]["name_or_path"] = None
    return fingerprint(
        "semantic", FORMAT_VERSION, features_version, settings, weights, determining_settings(config.pretrain)
    )


def preference_version(config: Config, features_version: str, pairs_version: str, parent_version: str) -> str:
    """Fingerprint of the stage-2 model that this configuration trains."""
    return fingerprint(
        "preference",
        FORMAT_VERSION,
        features_version,
        pairs_version,
        parent_version,
        determining_settings(config.finetune),
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
            f"the workspace {workspace.uri} holds no {kind} of {', '.join(config.data.interactions)} for the features "
            f"{features_version} and these settings of data and pairs; {PREPROCESS}"
        )
    return Artifact(f"{kind}/{version}", version, manifest)


def _finished(workspace: Workspace, kind: str) -> list[Artifact]:
    """Finished artifacts of a kind, oldest first."""
    return [Artifact(f"{kind}/{name}", name, manifest) for name, manifest in workspace.finished(kind)]


def _of_features(workspace: Workspace, kind: str, features_version: str) -> list[Artifact]:
    """Finished artifacts of a kind that were made from these features."""
    return [item for item in _finished(workspace, kind) if item.manifest["inputs"].get("features") == features_version]


def _made_with(candidates: list[Artifact], config: Config, section: str) -> list[Artifact]:
    """The artifacts that were made with the configured section. Raises MismatchError when none was.

    Of `audio`, only the settings that change the features count.
    """
    configured = config.audio.determining if section == "audio" else getattr(config, section).model_dump(mode="json")
    used = {item.version: {key: item.manifest["config"][section].get(key) for key in configured} for item in candidates}
    fitting = [item for item in candidates if used[item.version] == configured]
    if fitting:
        return fitting
    newest = candidates[-1]
    key = next(key for key in configured if used[newest.version][key] != configured[key])
    raise MismatchError(
        f"the {newest.path.partition('/')[0]} {newest.version} were made with {section}.{key}="
        f"{used[newest.version][key]}, but the configuration says {configured[key]}; run 'htcl preprocess' with this "
        "configuration or give the one they were made with"
    )


def _only(workspace: Workspace, kind: str, candidates: list[Artifact], key: str, field: str) -> Artifact:
    """The only artifact. Raises ConfigError with the key that selects one when there are several."""
    if len(candidates) > 1:
        listed = "; ".join(
            f"{item.version} of {', '.join(item.manifest['config']['data'][field])}" for item in candidates
        )
        raise ConfigError(
            f"the workspace {workspace.uri} holds several {kind} ({listed}); say which by {key}, as for 'htcl "
            "preprocess'"
        )
    return candidates[0]


def _text_weights(config: Config) -> dict[str, str]:
    """File → SHA-256 of a local pretrained text model; empty for a model of the Hugging Face Hub."""
    folder = Path(config.text.name_or_path or "")
    if config.text.name_or_path is None or not folder.is_dir():
        return {}
    return {
        file.name: file_sha256(file)
        for file in sorted(folder.iterdir())
        if file.suffix in (".safetensors", ".json", ".txt", ".model")
    }


def determining_settings(settings: StageSettings) -> dict[str, Any]:
    """Settings of a stage that determine its model; those that only change where and how it runs are left out."""
    if isinstance(settings, PretrainSettings) and settings.use_joint_space:  # then nothing is trained
        return {name: getattr(settings, name) for name in ("use_joint_space", "loss", "temperature", "seed")}
    values = {
        name: value for name, value in settings.resolved().model_dump(mode="json").items() if name not in NOT_IN_MODEL
    }
    if settings.warm_start is None:  # then nothing is replayed
        values.pop("replay_share", None)
        return values
    return {**values, "warm_start": source_identity(settings.warm_start)}
