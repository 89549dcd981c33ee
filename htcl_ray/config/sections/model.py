"""Sections `text` and `model`: the text and audio towers, projection heads and fusion."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from htcl_ray.config.sections.base import Settings


class TextSettings(Settings):
    """Text tower: a pretrained model, or a small one that is trained from scratch."""

    name_or_path: str | None = None
    """BERT-like model: a name of the Hugging Face Hub or a local folder. Null: a small BERT and its WordPiece
    vocabulary are trained from the texts of the catalogue."""
    pooling: Literal["pooler", "cls", "mean"] = "pooler"
    """Pooling of tokens to one vector. `pooler`: BERT's pooler over the first token, as in the paper (the first token
    in models without a pooler); `cls`: the first token; `mean`: the mean over tokens, for sentence encoders such as
    MiniLM."""
    max_tokens: int = Field(128, gt=2)
    """Maximum number of tokens of a text. Longer texts are truncated."""
    vocab_size: int = Field(2000, gt=10)
    """Number of WordPieces of a text model that is trained from scratch."""
    width: int = Field(128, gt=0)
    """Hidden size of a text model that is trained from scratch; a multiple of `heads`."""
    layers: int = Field(2, gt=0)
    """Number of Transformer layers of a text model that is trained from scratch."""
    heads: int = Field(4, gt=0)
    """Number of attention heads of a text model that is trained from scratch."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of a text model that is trained from scratch, in layers and attention."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        return self


class ModelSettings(Settings):
    """Audio tower, projection heads and fusion. The defaults are those of the paper."""

    conv_channels: int = Field(512, gt=0)
    """Number of channels of the three convolutions over log-mel frames."""
    width: int = Field(768, gt=0)
    """Hidden size of the audio Transformer; a multiple of `heads` and of `position_groups`."""
    layers: int = Field(12, gt=0)
    """Number of Transformer layers of the audio tower."""
    heads: int = Field(12, gt=0)
    """Number of attention heads of each Transformer layer."""
    feed_forward: int = Field(3072, gt=0)
    """Hidden size of the feed-forward part of each Transformer layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of the audio tower, in layers and attention."""
    position_kernel: int = Field(31, gt=0)
    """Kernel size, in tokens, of the convolutional position embedding; an odd number."""
    position_groups: int = Field(16, gt=0)
    """Number of groups of the convolutional position embedding."""
    head_hidden: tuple[int, ...] = (384, 192)
    """Sizes of the hidden layers of the audio and text projection heads. Empty: linear heads."""
    dim: int = Field(100, gt=0)
    """Dimension of the joint embedding space."""
    window_seconds: float | None = Field(None, gt=0)
    """Length in seconds of the crops on which longer clips are trained, at random positions; such a clip is embedded as
    the mean of evenly spaced windows. Null: whole clips."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        if self.width % self.position_groups:
            raise ValueError(f"width is {self.width}; expected a multiple of position_groups ({self.position_groups})")
        if self.position_kernel % 2 == 0:
            raise ValueError(f"position_kernel is {self.position_kernel}; expected an odd number")
        return self
