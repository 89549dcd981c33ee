"""The towers, heads and fusion."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from htcl_ray.config.sections.base import Settings


class TextSettings(Settings):
    """The text tower."""

    name_or_path: str | None = None
    """A BERT-like model by hub name or local folder; null trains a small BERT and its WordPiece vocabulary from the
    song texts."""
    pooling: Literal["pooler", "cls", "mean"] = "pooler"
    """Tokens → one vector: BERT's pooler over the first token as the authors (models made without one: the first token
    itself), the first token, or the mean over tokens, which sentence encoders such as MiniLM were trained for."""
    max_tokens: int = Field(128, gt=2)
    """Longer song texts are cut."""
    vocab_size: int = Field(2000, gt=10)
    """From scratch: WordPieces."""
    width: int = Field(128, gt=0)
    """From scratch: hidden size."""
    layers: int = Field(2, gt=0)
    """From scratch: Transformer layers."""
    heads: int = Field(4, gt=0)
    """From scratch: attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """From scratch: dropout in layers and attention."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        return self


class ModelSettings(Settings):
    """Audio tower, heads and fusion. Defaults are the paper's."""

    conv_channels: int = Field(512, gt=0)
    width: int = Field(768, gt=0)
    """Hidden size of the audio Transformer."""
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    feed_forward: int = Field(3072, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    position_kernel: int = Field(31, gt=0)
    """Tokens that the convolutional position embedding sees; odd."""
    position_groups: int = Field(16, gt=0)
    head_hidden: tuple[int, ...] = (384, 192)
    """Hidden widths of the audio and text heads."""
    dim: int = Field(100, gt=0)
    """Width of the joint space."""
    window_seconds: float | None = Field(None, gt=0)
    """Longer clips are trained on in random crops of this length and embedded as the mean of evenly spaced windows;
    null: clips whole."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        if self.width % self.position_groups:
            raise ValueError(f"width is {self.width}; expected a multiple of position_groups ({self.position_groups})")
        if self.position_kernel % 2 == 0:
            raise ValueError(f"position_kernel is {self.position_kernel}; expected an odd number")
        return self
