"""Pretrained encoders of the library `transformers`: one class for each kind of model, with its own processor.

Classes are named here and never taken from a model's files, so no code of a model is run.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from htcl_ray.errors import MismatchError
from htcl_ray.extractors.base import FloatArray, Inputs, PretrainedExtractor


class TransformersExtractor(PretrainedExtractor):
    """An audio model of transformers."""

    model_class: ClassVar[str]
    processor_class: ClassVar[str]
    model: Any
    """Typed by no stubs."""

    def load(self, folder: Path) -> nn.Module:
        """The model and its processor. Raises MismatchError for weights that are damaged or do not fit."""
        processor = getattr(transformers, self.processor_class)
        model_class = getattr(transformers, self.model_class)
        try:
            self.processor = processor.from_pretrained(folder, local_files_only=True)
            model, info = model_class.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                dtype=torch.float32,
            )
        except Exception as error:  # of damaged files: OSError, ValueError, RuntimeError and others  # noqa: BLE001
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise MismatchError(
                f"the audio model {self.record.name_or_path} cannot be loaded ({reason}); copy it again"
            ) from None
        missing = sorted(info["missing_keys"])
        if missing:
            raise MismatchError(
                f"the weights of the audio model {self.record.name_or_path} lack {missing[0]}; expected those of a "
                f"{self.model_class}"
            )
        for name, tensor in model.state_dict().items():
            if not torch.isfinite(tensor).all():
                raise MismatchError(
                    f"the audio model {self.record.name_or_path} holds NaN or infinity under {name}; copy it again"
                )
        part: nn.Module = self.audio_part(model)
        return part

    def audio_part(self, model: Any) -> Any:
        """The part of the model that is needed for audio."""
        return model

    def prepare(self, window: FloatArray) -> Inputs:
        """The output of the processor for one window."""
        processed = self.processor(window, sampling_rate=self.record.sample_rate, return_tensors="np")
        return {name: np.asarray(value)[0] for name, value in processed.items()}


class ClapExtractor(TransformersExtractor):
    """CLAP (Wu et al. 2023): the vector of the space that its audio and text share, of unit norm."""

    model_class, processor_class = "ClapModel", "ClapFeatureExtractor"

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, projection_dim]."""
        output: Tensor = self.model.get_audio_features(**inputs).pooler_output
        return output


class AstExtractor(TransformersExtractor):
    """Audio Spectrogram Transformer (Gong et al. 2021): its pooled output."""

    model_class, processor_class = "ASTModel", "ASTFeatureExtractor"

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, hidden_size]."""
        output: Tensor = self.model(**inputs).pooler_output
        return output


class WhisperExtractor(TransformersExtractor):
    """The encoder of Whisper (Radford et al. 2023): the mean of the tokens that the window covers."""

    model_class, processor_class = "WhisperModel", "WhisperFeatureExtractor"

    def audio_part(self, model: Any) -> Any:
        """The encoder."""
        return model.encoder

    def prepare(self, window: FloatArray) -> Inputs:
        """The log-mel, padded to the length that the encoder always takes, and the number of its tokens with audio."""
        inputs = super().prepare(window)
        stride = self.processor.hop_length * self.model.conv2.stride[0] * self.model.conv1.stride[0]
        return {**inputs, "tokens": np.array(-(-len(window) // stride))}

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, d_model]."""
        hidden: Tensor = self.model(inputs["input_features"]).last_hidden_state
        covered = torch.arange(hidden.shape[1], device=hidden.device) < inputs["tokens"][:, None]
        return (hidden * covered[:, :, None]).sum(dim=1) / covered.sum(dim=1, keepdim=True)


class Wav2Vec2Extractor(TransformersExtractor):
    """wav2vec 2.0 (Baevski et al. 2020): the mean of its last hidden states."""

    model_class, processor_class = "Wav2Vec2Model", "Wav2Vec2FeatureExtractor"

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, hidden_size]. Windows of a batch are equally long, so none is padded."""
        output: Tensor = self.model(inputs["input_values"]).last_hidden_state.mean(dim=1)
        return output


class HubertExtractor(Wav2Vec2Extractor):
    """HuBERT (Hsu et al. 2021): the mean of its last hidden states."""

    model_class = "HubertModel"


class PeAudioExtractor(TransformersExtractor):
    """Perception Encoder for audio (Vyas et al. 2025): the vector of the space that its audio and text share."""

    model_class, processor_class = "PeAudioModel", "PeAudioFeatureExtractor"

    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Vectors [batch, hidden size of its text model]. Windows of a batch are equally long."""
        output: Tensor = self.model.get_audio_embeds(inputs["input_values"])
        return output
