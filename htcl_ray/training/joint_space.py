"""Stage 1 without training: the joint space of a pretrained audio-text model as the semantic model.

The features of a song are the vectors of its windows in that space, so the audio side adds nothing but their mean; the
text side is the model's text tower with its projection. Both heads are the identity, which stage 2 may change. See
docs/decisions/0034-joint-space.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, MismatchError
from htcl_ray.extractors.families import JOINT_FAMILIES, ExtractorRecord, find_extractor

if TYPE_CHECKING:
    from htcl_ray.models import HTCL

KEY = "pretrain.use_joint_space"


def joint_space(config: Config) -> ExtractorRecord:
    """Check that the configuration names a joint space, and return the record of its audio encoder.

    Raises ConfigError for other extractors, encoders without a text tower, and other sizes; MismatchError for a text
    tower of another joint space. Loads no weights.
    """
    if config.pretrain.warm_start is not None:
        raise ConfigError(f"{KEY} trains nothing, so pretrain.warm_start has no use; set one of them back")
    if config.audio.extractor != "pretrained":
        raise ConfigError(
            f"{KEY} needs vectors of a pretrained encoder, but audio.extractor is {config.audio.extractor}; set "
            "audio.extractor=pretrained and audio.name_or_path"
        )
    record = find_extractor(config.audio.recipe)[1]
    if record.family not in JOINT_FAMILIES:
        raise ConfigError(
            f"{KEY} needs an audio-text model, but {record.name_or_path} is of the kind '{record.family}', which has "
            f"no text tower; choose one of the kinds {', '.join(JOINT_FAMILIES)}, or train stage 1"
        )
    if config.text.name_or_path is None:
        raise ConfigError(
            f"{KEY} needs the text tower of {record.name_or_path}, but text.name_or_path is not set; set it to the "
            "same model"
        )
    if config.text.name_or_path != config.audio.name_or_path:
        _check_same_model(config, record)
    expected = {"audio.tower": "residual", "model.head_hidden": (), "model.dim": record.width}
    actual = {
        "audio.tower": config.audio.tower_name,
        "model.head_hidden": config.model.head_hidden,
        "model.dim": config.model.dim,
    }
    different = [key for key in expected if actual[key] != expected[key]]
    if different:
        wanted = ", ".join(f"{key}={_value(expected[key])}" for key in different)
        raise ConfigError(
            f"the joint space of {record.name_or_path} is used as it is, which needs {wanted}, but the configuration "
            f"says {', '.join(_value(actual[key]) for key in different)}; set {wanted}"
        )
    return record


def joint_model(config: Config) -> HTCL:
    """The stage-1 model that gives the vectors of the pretrained audio-text model itself. Raises as `joint_space`.

    Raises ConfigError or MismatchError also for weights that are missing or damaged.
    """
    import torch
    from torch import nn

    from htcl_ray.models import HTCL
    from htcl_ray.models.towers.text import text_encoder_from_name

    record = joint_space(config)
    model = HTCL.untrained(
        config,
        feature_width=record.width,
        text_encoder=text_encoder_from_name(config.text),
        extractor=record,
    )
    with torch.no_grad():
        for head in (model.audio_head, model.text_head):
            (layer,) = head.children()
            assert isinstance(layer, nn.Linear)
            nn.init.eye_(layer.weight)
            nn.init.zeros_(layer.bias)
    return model


def refuse_joint_space(config: Config, command: str) -> None:
    """Raise ConfigError for a command that trains stage 1 itself."""
    if config.pretrain.use_joint_space:
        raise ConfigError(f"{command} trains stage 1, which {KEY} leaves out; set it to false")


def _check_same_model(config: Config, record: ExtractorRecord) -> None:
    """Raise MismatchError unless `text.name_or_path` holds the same model as `audio.name_or_path`."""
    name = config.text.name_or_path
    try:
        other = find_extractor(config.audio.recipe.model_copy(update={"name_or_path": name}))[1].fingerprint
    except (ConfigError, MismatchError):  # no audio-text model at all
        other = None
    if other != record.fingerprint:
        raise MismatchError(
            f"text.name_or_path is {name}, whose texts are not in the joint space of the audio model "
            f"{record.name_or_path}; set it to the same model, or train stage 1 to join the two"
        )


def _value(value: object) -> str:
    return "[" + ", ".join(map(str, value)) + "]" if isinstance(value, tuple) else str(value)
