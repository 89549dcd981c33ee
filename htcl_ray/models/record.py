"""The `config.json` of a model folder: everything that is needed to rebuild the model and to prepare its inputs."""

from __future__ import annotations

from enum import StrEnum
from typing import Any, Literal

from pydantic import Field, ValidationError

from htcl_ray.config.sections import AudioSettings, ModelSettings, Settings, TextSettings
from htcl_ray.errors import MismatchError, first_fault
from htcl_ray.extractors.families import ExtractorRecord
from htcl_ray.losses.registry import LossName
from htcl_ray.schemas import FORMAT_VERSION


class InputRecipe(StrEnum):
    """How a log-mel spectrogram is padded, normalised and masked before the audio encoder."""

    MASKED = "masked"
    """Statistics, attention and mean over the clip's own frames; see `transformer.masked_input`."""
    OFFICIAL = "official"
    """The authors' recipe: padded to a full clip, normalised whole, no mask; see `transformer.official_input`."""


class TextRecord(Settings):
    """The text tower."""

    settings: TextSettings
    """As configured when it was made. `name_or_path` tells where the weights came from; it is read again only for the
    tokenizer of a model folder that brings none."""
    transformer: dict[str, Any]
    """Configuration of the transformers model, with `model_type`."""
    joint: Literal["clap", "pe_audio"] | None = None
    """Family of the audio-text model whose text tower and projection it is. None: a text model."""


class ModelRecord(Settings):
    """Content of `config.json`."""

    format_version: int = FORMAT_VERSION
    stage: Literal[1, 2]
    """1: semantic space (audio ↔ text); 2: preference space, with a fusion network and three temperatures."""
    input: InputRecipe = InputRecipe.MASKED
    loss: LossName = "softmax"
    """Contrastive loss that it was trained with, a key of `htcl_ray.losses.registry.LOSSES`."""
    audio: AudioSettings
    feature_width: int | None = Field(None, gt=0)
    """Size of the vector of one frame of features. None: `audio.n_mels`, of log-mel frames."""
    extractor: ExtractorRecord | None = None
    """The pretrained encoder whose vectors are the features. None: no encoder, or given vectors of unknown origin."""
    model: ModelSettings
    text: TextRecord | None
    """None: an audio encoder alone. Its vectors are the encoder's own, without a head, and `model.dim` is its width."""
    license: str = "unknown"
    """An identifier of the hub's list of licenses, for the model card."""

    @property
    def feature_licence(self) -> str | None:
        """Licence of the pretrained encoder whose vectors are the features. None: no encoder, or it is unknown."""
        return None if self.extractor is None else self.extractor.licence

    @property
    def input_width(self) -> int:
        """Size of the vector of one frame of features."""
        return self.feature_width or self.audio.n_mels


def parse_record(tree: Any, where: str) -> ModelRecord:
    """Check the JSON of a `config.json`. Raises MismatchError naming the first wrong key, or a newer format version."""
    version = tree.get("format_version") if isinstance(tree, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise MismatchError(
            f"{where} has format version {version}, but this htcl-ray reads up to {FORMAT_VERSION}; "
            "expected an HTCL model's"
        )
    try:
        return ModelRecord.model_validate(tree)
    except ValidationError as error:
        fault = first_fault(error)
        raise MismatchError(
            f"{where} is not the config.json of an HTCL model: key '{fault.key}': {fault.message}"
        ) from None
