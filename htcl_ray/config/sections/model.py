"""Sections `audio`, `text` and `model`: features, the text and audio towers, projection heads and fusion."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from htcl_ray.config.sections.base import Settings
from htcl_ray.models.towers.registry import DEFAULT_TOWERS, TOWERS, Extractor, TowerName

LOG_MEL_ONLY = ("sample_rate", "n_fft", "hop_length", "n_mels", "f_min", "f_max", "top_db")
"""Keys that change log-mel frames only; a pretrained encoder has a sample rate of its own."""
ENCODER_ONLY = ("name_or_path", "window_seconds", "hop_seconds")
"""Keys that change the vectors of a pretrained encoder only."""
UNUSED: dict[Extractor, tuple[str, ...]] = {
    "log_mel": ENCODER_ONLY,
    "pretrained": LOG_MEL_ONLY,
    "vectors": (*LOG_MEL_ONLY, *ENCODER_ONLY, "clip_seconds", "min_seconds"),
}
"""Keys of the recipe that do not change the features of an extractor."""


class AudioRecipe(Settings):
    """Conversion of a song to features. Models with different recipes cannot share features."""

    extractor: Extractor = "log_mel"
    """Source of the features of a song. `log_mel`: log-mel frames of its audio; `pretrained`: vectors of windows of its
    audio, computed by a pretrained encoder; `vectors`: the vector that the catalogue brings."""
    sample_rate: int = Field(16000, gt=0)
    """Sample rate in Hz. Audio is averaged to mono and then resampled to this rate."""
    clip_seconds: float = Field(120.0, gt=0)
    """Length in seconds of the decoded clip, from the start of the song. The rest of the song is ignored."""
    min_seconds: float = Field(0.1, gt=0)
    """Minimum length in seconds. Shorter audio is quarantined as `too_short`."""
    n_fft: int = Field(2048, gt=0)
    """Length of the Hann window and of the Fourier transform, in samples."""
    hop_length: int = Field(1536, gt=0)
    """Distance between frames, in samples."""
    n_mels: int = Field(128, gt=0)
    """Number of mel bands."""
    f_min: float = Field(0.0, ge=0)
    """Lower edge of the lowest mel band, in Hz."""
    f_max: float | None = None
    """Upper edge of the highest mel band, in Hz, at most half the sample rate. Null: half the sample rate."""
    top_db: float = Field(80.0, gt=0)
    """Dynamic range in dB. Values further below the maximum of the clip are raised to this floor."""
    name_or_path: str | None = None
    """Pretrained encoder of `extractor: pretrained`: a name of the Hugging Face Hub or a local folder, with weights in
    safetensors and an architecture that is listed in docs/own-data.md. Its own sample rate and normalisation are
    used."""
    window_seconds: float | None = Field(None, gt=0)
    """Length in seconds of a window of audio from which the pretrained encoder computes one vector. Null: the length
    that suits the encoder."""
    hop_seconds: float | None = Field(None, gt=0)
    """Distance in seconds between the starts of windows of the pretrained encoder. Null: `window_seconds`."""

    @property
    def determining(self) -> dict[str, Any]:
        """The settings that change the features of this extractor, as JSON."""
        unused = set(UNUSED[self.extractor])
        return {
            name: value
            for name, value in self.model_dump(mode="json").items()
            if name in AudioRecipe.model_fields and name not in unused
        }

    @property
    def max_samples(self) -> int:
        """The number of samples of a full clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def max_frames(self) -> int:
        """The number of log-mel frames of a full clip, with centred windows; 1 for given vectors."""
        if self.extractor == "vectors":
            return 1
        return self.frames_of(self.clip_seconds)

    def frames_of(self, seconds: float) -> int:
        """The number of frames of a clip of this length."""
        return 1 + round(seconds * self.sample_rate) // self.hop_length

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.f_max is not None and not self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_max is {self.f_max} Hz; expected more than f_min ({self.f_min}) and at most sample_rate / 2"
            )
        if self.clip_seconds < self.min_seconds:
            raise ValueError(f"clip_seconds is {self.clip_seconds}; expected at least min_seconds ({self.min_seconds})")
        return self


class AudioSettings(AudioRecipe):
    """Conversion of a song to features, and the audio tower that encodes them."""

    tower: TowerName | None = None
    """Audio tower. Over log-mel frames: `transformer`, the paper's, for large catalogues, and `cnn`, 2-D convolutions
    that learn from far fewer songs. Over vectors: `mlp` (of several vectors of a song, their mean),
    `window_transformer`, a small Transformer over the windows of a song, and `residual`, the mean of unit-norm vectors
    and a learned correction, which starts in the space of the vectors (`pretrain.use_joint_space`). Null: `transformer`
    for `log_mel`, `window_transformer` for `pretrained` and `mlp` for `vectors`. Setting `extractor` without `tower`
    resets it to null."""

    @property
    def recipe(self) -> AudioRecipe:
        """The settings that determine the features: all but the tower."""
        return AudioRecipe(**{name: getattr(self, name) for name in AudioRecipe.model_fields})

    @property
    def tower_name(self) -> TowerName:
        """Name of the tower, also when it is chosen by the extractor."""
        return self.tower or DEFAULT_TOWERS[self.extractor]

    def resolved(self) -> Self:
        """Return these settings with the name of the tower: equal for models with equal towers."""
        return self.model_copy(update={"tower": self.tower_name})

    @model_validator(mode="after")
    def _check_tower(self) -> Self:
        if self.tower is not None and self.extractor not in TOWERS[self.tower].extractors:
            suited = [name for name, entry in TOWERS.items() if self.extractor in entry.extractors]
            raise ValueError(
                f"tower is {self.tower}, which does not take the features of extractor {self.extractor}; "
                f"expected one of {', '.join(suited)}"
            )
        return self


class TextSettings(Settings):
    """Text tower: a pretrained model, or a small one that is trained from scratch."""

    name_or_path: str | None = None
    """BERT-like model, or an audio-text model (CLAP, PE-Audio) whose text tower and projection are used: a name of the
    Hugging Face Hub or a local folder. Null: a small BERT and its WordPiece vocabulary are trained from the texts of
    the catalogue."""
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


class CnnSettings(Settings):
    """Sizes of the `cnn` tower."""

    channels: tuple[Annotated[int, Field(gt=0)], ...] = Field((16, 32, 64, 128), min_length=1)
    """Number of channels of each block; a block halves the number of frames and of mel bands."""
    width: int = Field(128, gt=0)
    """Size of the output of the tower."""

    @property
    def num_layers(self) -> int:
        """The number of blocks, and the linear layer after them."""
        return len(self.channels) + 1


class MlpSettings(Settings):
    """Sizes of the `mlp` tower."""

    hidden: tuple[Annotated[int, Field(gt=0)], ...] = (512,)
    """Sizes of the hidden layers. Empty: one linear layer."""
    width: int = Field(256, gt=0)
    """Size of the output of the tower."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout probability of the input, after standardisation, and of the hidden layers."""

    @property
    def num_layers(self) -> int:
        """The number of linear layers."""
        return len(self.hidden) + 1


class ResidualSettings(Settings):
    """Sizes of the `residual` tower, whose output has the size of a vector of its input."""

    hidden: tuple[Annotated[int, Field(gt=0)], ...] = (512,)
    """Sizes of the hidden layers of the correction that is added to the mean vector. Empty: one linear layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability of the correction: of its input and of its hidden layers."""

    @property
    def num_layers(self) -> int:
        """The number of linear layers."""
        return len(self.hidden) + 1


class WindowTransformerSettings(Settings):
    """Sizes of the `window_transformer` tower."""

    width: int = Field(256, gt=0)
    """Hidden size of the Transformer and size of the output of the tower; a multiple of `heads`."""
    layers: int = Field(2, gt=0)
    """Number of Transformer layers."""
    heads: int = Field(4, gt=0)
    """Number of attention heads of each layer."""
    feed_forward: int = Field(512, gt=0)
    """Hidden size of the feed-forward part of each layer."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout probability, in layers and attention."""

    @property
    def num_layers(self) -> int:
        """The number of Transformer layers."""
        return self.layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        return self


class ModelSettings(Settings):
    """Audio tower, projection heads and fusion. The defaults are those of the paper.

    `conv_channels` to `position_groups` are sizes of the `transformer` tower; other towers have sections of their own.
    """

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
    cnn: CnnSettings = CnnSettings()
    mlp: MlpSettings = MlpSettings()
    residual: ResidualSettings = ResidualSettings()
    window_transformer: WindowTransformerSettings = WindowTransformerSettings()

    def layers_of(self, tower: TowerName) -> int:
        """The number of layers of a tower, which `freeze_audio_layers` counts."""
        section = TOWERS[tower].settings
        layers: int = self.layers if section is None else getattr(self, section).num_layers
        return layers

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        if self.width % self.position_groups:
            raise ValueError(f"width is {self.width}; expected a multiple of position_groups ({self.position_groups})")
        if self.position_kernel % 2 == 0:
            raise ValueError(f"position_kernel is {self.position_kernel}; expected an odd number")
        return self
