"""The text tower of a pretrained audio-text model, with its projection: text → the space that it shares with audio.

Classes are named here and never taken from a model's files, so no code of a model is run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from htcl_ray.config.sections import TextSettings
from htcl_ray.errors import ConfigError
from htcl_ray.extractors.families import JOINT_FAMILIES
from htcl_ray.models.record import TextRecord
from htcl_ray.models.towers.text import TextEncoder, Tokens, check_tokenizer, transformer_from_config, unusable
from htcl_ray.models.weights import check_numbers

JointFamily = Literal["clap", "pe_audio"]


class JointTextEncoder(TextEncoder):
    """Text tower of a joint space: its vector is that of the library, before it is brought to unit norm."""

    def __init__(
        self, family: JointFamily, tokenizer: Any | None, settings: TextSettings, text: dict[str, Any]
    ) -> None:
        """Draw the weights at random. `text`: the configuration of the text model, with its `model_type`."""
        if settings.pooling != "pooler":
            raise ConfigError(
                f"text.pooling is {settings.pooling}, but the text tower of {settings.name_or_path} has a pooling of "
                "its own; set text.pooling=pooler"
            )
        transformer, projection = _modules(family, text)
        for module in transformer.modules():  # position numbers, which are no weights
            for name, buffer in list(module.named_buffers(recurse=False)):
                if not buffer.is_floating_point():
                    module.register_buffer(name, buffer, persistent=False)
        super().__init__(transformer, tokenizer, settings)
        self.family = family
        self.projection = projection

    @property
    def width(self) -> int:
        """Size of the joint space."""
        last = [module for module in self.projection.modules() if isinstance(module, nn.Linear)][-1]
        return last.out_features

    @property
    def record(self) -> TextRecord:
        """The record of this tower in `config.json`."""
        return super().record.model_copy(update={"joint": self.family})

    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens [B, S] → [B, width]."""
        output = self.transformer(**tokens)
        pooled: Tensor = output.pooler_output if self.family == "clap" else output.last_hidden_state[:, 0]
        projected: Tensor = self.projection(pooled)
        return projected


def joint_text_from_record(record: TextRecord, tokenizer: Any | None) -> JointTextEncoder:
    """Build the tower that a record describes, with random weights."""
    assert record.joint is not None
    return JointTextEncoder(record.joint, tokenizer, record.settings, record.transformer)


def joint_family(config: Any) -> JointFamily | None:
    """The family of an audio-text model with this configuration of transformers; None for a text model."""
    kind = getattr(config, "model_type", None)
    return kind if kind in JOINT_FAMILIES else None


def max_tokens(text: Any) -> int | None:
    """Number of tokens that a text model with this configuration takes; None without a limit."""
    limit = getattr(text, "max_position_embeddings", None)
    # Positions of RoBERTa, the text model of CLAP, begin after the padding id.
    return limit - text.pad_token_id - 1 if limit is not None and text.model_type == "clap_text_model" else limit


def joint_text_from_name(settings: TextSettings, family: JointFamily) -> JointTextEncoder:
    """Load the text tower and its projection from the audio-text model `settings.name_or_path`.

    Raises ConfigError or MismatchError, also when a weight is missing.
    """
    import transformers
    from transformers import AutoTokenizer

    name = settings.name_or_path
    model_class = {"clap": transformers.ClapModel, "pe_audio": transformers.PeAudioModel}[family]
    try:
        model, loading = model_class.from_pretrained(
            name, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # a damaged file makes transformers and safetensors raise any error  # noqa: BLE001
        raise unusable(name, error) from None
    text = model.config.text_config.to_dict()
    check_tokenizer(tokenizer, text, f"the tokenizer of the audio-text model '{name}'")
    encoder = JointTextEncoder(family, tokenizer, settings, text)
    projection = model.text_projection if family == "clap" else model.text_audio_head
    used = ("text_model.", "text_projection.", "text_audio_head.")
    missing = sorted(key for key in loading["missing_keys"] if key.startswith(used))
    if missing:
        raise ConfigError(f"the audio-text model '{name}' has no weights for {missing[0]}; expected those of its text")
    own = encoder.transformer.state_dict()
    encoder.transformer.load_state_dict(
        {key: value for key, value in model.text_model.state_dict().items() if key in own}
    )
    encoder.projection.load_state_dict(projection.state_dict())
    check_numbers(encoder.state_dict(), f"the text tower of '{name}'")
    return encoder


def _modules(family: JointFamily, text: Mapping[str, Any]) -> tuple[nn.Module, nn.Module]:
    """The text model and its projection, with random weights."""
    if family == "clap":
        from transformers import ClapTextConfig
        from transformers.models.clap.modeling_clap import ClapProjectionLayer, ClapTextModel

        config = ClapTextConfig(**{key: value for key, value in text.items() if key != "model_type"})
        return ClapTextModel(config), ClapProjectionLayer(config)
    from transformers.models.pe_audio.modeling_pe_audio import PeAudioContrastiveHead

    transformer = transformer_from_config(dict(text))
    width = int(text["hidden_size"])
    return transformer, PeAudioContrastiveHead(width, width)
