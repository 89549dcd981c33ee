"""Warm start: a stage that continues from the weights of an earlier model instead of random ones.

Stage 1 takes every part of the earlier model that fits the configuration and says which parts it did not take. Stage 2
continues a whole preference model. See docs/decisions/0031-warm-start.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from htcl_ray.config import Config
from htcl_ray.config.sections import FinetuneSettings, Settings
from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import MANIFEST
from htcl_ray.workspace.paths import canonical
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.extractors.families import ExtractorRecord
    from htcl_ray.models import HTCL
    from htcl_ray.models.record import ModelRecord
    from htcl_ray.training.song_numbers import Pairs, Songs

STAGES = {"semantic": 1, "preference": 2}


@dataclass(frozen=True)
class WarmStart:
    """The earlier model: its name as the user gave it, and its folder on this machine."""

    name: str
    folder: Path
    artifact: Artifact | None
    """Of a model of the workspace."""


def find_source(workspace: Workspace, name: str) -> WarmStart:
    """The model folder `name`, or the model version `name` of the workspace. Raises WorkspaceError without either."""
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return WarmStart(name, folder, None)
    known = []
    for space in STAGES:
        for version, manifest in workspace.finished(f"models/{space}"):
            if version == name:
                path = f"models/{space}/{version}"
                return WarmStart(name, Path(workspace.local_copy(path)), Artifact(path, version, manifest))
            known.append(version)
    listed = ", ".join(known) or "none"
    raise WorkspaceError(
        f"'{name}' is neither a model folder nor a model of the workspace {workspace.uri}; its models: {listed}"
    )


def source_identity(name: str) -> str:
    """What stands for the earlier model in fingerprints: the content of a folder, or the version in a workspace."""
    from htcl_ray.models.folder import weights_fingerprint

    folder = Path(name).expanduser()
    return weights_fingerprint(folder) if (folder / "config.json").is_file() else name


def earlier_pairs(workspace: Workspace, settings: FinetuneSettings) -> Artifact | None:
    """The pairs that the earlier preference model was trained on; None when none are replayed.

    Raises WorkspaceError when the model's manifest names no pairs, or the workspace lacks them.
    """
    if settings.warm_start is None or settings.replay_share == 0:
        return None
    source = find_source(workspace, settings.warm_start)
    manifest = source.artifact.manifest if source.artifact else _manifest(source.folder)
    version = manifest.get("inputs", {}).get("pairs")
    path = f"pairs/{version}"
    mined = workspace.manifest(path) if version else None
    if mined is None:
        which = f"pairs {version}" if version else "no pairs"
        raise WorkspaceError(
            f"the manifest of {source.name} names {which}, which {workspace.uri} does not hold, so they cannot be "
            "replayed; train on newer pairs alone with finetune.replay_share=0"
        )
    return Artifact(path, version, mined)


def check_source(workspace: Workspace, config: Config, step: str) -> None:
    """Check the earlier model of a step against the configuration, before Ray starts. Raises InputError."""
    from htcl_ray.models.folder import read_record

    name = (config.pretrain if step == "pretrain" else config.finetune).warm_start
    if name is None:
        return
    source = find_source(workspace, name)
    record = read_record(source.folder)
    _check_recipe(record, name, config)
    if step == "pretrain":
        if record.stage != 1 and record.text is not None:
            raise MismatchError(
                f"{name} is a preference model of stage 2, but pretrain continues one of stage 1; give that"
            )
        return
    if record.stage != 2 or record.text is None:
        raise MismatchError(
            f"{name} is no whole preference model of stage 2, which finetune continues; a stage-1 model to start "
            "from is given with --model"
        )
    configured = {"audio": config.audio.resolved(), "model": config.model, "text": config.text}
    for section, settings in (("audio", record.audio), ("model", record.model), ("text", record.text.settings)):
        if difference := _difference(settings, configured[section]):
            key, of_model, wanted = difference
            raise MismatchError(
                f"{name} was made with {section}.{key}={of_model}, but the configuration says {wanted}; give the "
                "configuration that it was made with, or train stage 2 without --from"
            )
    if record.loss != config.finetune.loss:
        raise MismatchError(
            f"{name} was trained with the loss {record.loss}, but finetune.loss is {config.finetune.loss}; set it"
        )
    earlier_pairs(workspace, config.finetune)


def takes_text_tower(workspace: Workspace, config: Config) -> bool:
    """Whether stage 1 takes the text tower, and with it the tokenizer, of an earlier model."""
    from htcl_ray.models.folder import read_record

    if config.pretrain.warm_start is None:
        return False
    record = read_record(find_source(workspace, config.pretrain.warm_start).folder)
    return record.text is not None and _difference(record.text.settings, config.text) is None


def semantic_start(
    config: Config,
    folder: Path,
    vocabulary: str | None,
    feature_width: int | None = None,
    extractor: ExtractorRecord | None = None,
) -> tuple[HTCL, list[str], list[str]]:
    """The stage-1 model to train, the parts of it that have the earlier model's weights, and those that do not.

    A part is taken when all its tensors have the names and shapes of the earlier model's. The text head is taken with
    the text tower only, the audio head with the audio tower only, and the temperature with both heads. `vocabulary`:
    of a new text tower; `feature_width`: size of a feature vector (default: the earlier model's); `extractor`: the
    pretrained encoder that made the features. Raises MismatchError when no tower is taken, or the features have another
    size or are vectors of another encoder.
    """
    from htcl_ray.extractors.families import check_encoder
    from htcl_ray.models import HTCL

    earlier = HTCL.from_pretrained(folder)
    feature_width = feature_width or earlier.record.feature_width
    if (feature_width or earlier.record.input_width) != earlier.record.input_width:
        raise MismatchError(
            f"{folder} takes vectors of {earlier.record.input_width} numbers, but the features have {feature_width}; a "
            "warm start needs the same features"
        )
    check_encoder(earlier.record.extractor, extractor, str(folder))
    text = earlier.record.text
    same_text = text is not None and _difference(text.settings, config.text) is None
    same_tower = earlier.record.audio.tower_name == config.audio.tower_name
    model = HTCL.untrained(
        config,
        vocabulary,
        earlier.record.input if same_tower else earlier.record.input.MASKED,
        feature_width=feature_width,
        text_encoder=earlier.text_encoder if same_text else None,
        extractor=extractor,
    )
    weights, given = model.state_dict(), earlier.state_dict()
    parts = {"audio tower": "audio_encoder.", "text tower": "text_encoder."}
    parts |= {"audio head": "audio_head.", "text head": "text_head."}
    fitting = {
        part: [name for name in weights if name.startswith(prefix)]
        for part, prefix in parts.items()
        if _shapes(weights, prefix) == _shapes(given, prefix)
    }
    if not same_text:
        fitting.pop("text tower", None)
    for head, tower in (("audio head", "audio tower"), ("text head", "text tower")):
        if tower not in fitting:
            fitting.pop(head, None)
    if "audio tower" not in fitting and "text tower" not in fitting:
        raise MismatchError(
            f"neither the audio tower nor the text tower of {folder} fits the configuration (sections audio, model and "
            "text); give the configuration that it was made with, or train without --from"
        )
    prefixes = tuple(f"{name}." for name, _ in model.named_children() if name.startswith("logit_"))
    losses = [name for name in weights if name.startswith(prefixes)] if prefixes else []
    if {"audio head", "text head"} <= fitting.keys() and earlier.record.loss == config.pretrain.loss:
        fitting["temperature"] = losses
    model.load_state_dict({**weights, **{name: given[name] for names in fitting.values() for name in names}})
    return model, list(fitting), [part for part in (*parts, "temperature") if part not in fitting]


def training_pairs(workspace: Workspace, settings: FinetuneSettings, path: str, songs: Songs) -> Pairs:
    """The pairs that stage 2 draws from: the mined ones, and a share of replayed ones. See `read_pairs` for errors."""
    from htcl_ray.training.song_numbers import read_pairs, with_replayed

    pairs = read_pairs(workspace, path, songs, rejected=settings.explicit_negatives)
    earlier = earlier_pairs(workspace, settings)
    if earlier is None:
        return pairs
    return with_replayed(pairs, read_pairs(workspace, earlier.path, songs), settings.replay_share)


def preference_start(config: Config, folder: Path) -> HTCL:
    """The stage-2 model to train: the earlier one, as it is."""
    from htcl_ray.models import HTCL

    model = HTCL.from_pretrained(folder)
    model.record = model.record.model_copy(update={"license": config.license})
    return model


def _shapes(weights: dict[str, object], prefix: str) -> dict[str, object]:
    return {name: getattr(value, "shape", None) for name, value in weights.items() if name.startswith(prefix)}


def _check_recipe(record: ModelRecord, name: str, config: Config) -> None:
    if difference := _difference(record.audio.recipe, config.audio.recipe):
        key, of_model, wanted = difference
        raise MismatchError(
            f"{name} was trained on features with audio.{key}={of_model}, but the configuration says {wanted}; a warm "
            "start needs the same features"
        )


def _difference(own: Settings, configured: Settings) -> tuple[str, object, object] | None:
    """The first key in which two sections differ, with both values; two paths of one folder are equal."""
    wanted = configured.model_dump(mode="json")
    for key, value in own.model_dump(mode="json").items():
        other = wanted[key]
        same_folder = key == "name_or_path" and value and other and canonical(value) == canonical(other)
        if value != other and not same_folder:
            return key, value, other
    return None


def _manifest(folder: Path) -> dict[str, Any]:
    return Workspace(str(folder)).read_json(MANIFEST) if (folder / MANIFEST).is_file() else {}
