"""The interface of pretrained encoders: a waveform → one vector for each of its windows."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import MismatchError
from htcl_ray.extractors.families import FAMILIES, ExtractorRecord, find_extractor

FloatArray = npt.NDArray[np.float32]
Inputs = dict[str, npt.NDArray[np.generic]]
"""Input of the model for one window, without a dimension for the batch."""


class PretrainedExtractor(ABC):
    """A frozen pretrained encoder of audio. The vector of a window does not depend on the other windows of a batch."""

    def __init__(self, folder: Path, record: ExtractorRecord, device: str = "cpu") -> None:
        """Load the weights of a folder whose record is `record`. Raises MismatchError for damaged ones."""
        self.record = record
        self.device = device
        self.model = self.load(folder).eval().requires_grad_(False).to(device)

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """The model with the weights of the folder, which is trusted no more than any other input."""

    @abstractmethod
    def prepare(self, window: FloatArray) -> Inputs:
        """Convert a window [samples] at the encoder's sample rate to the input of the model."""

    @abstractmethod
    def encode(self, inputs: dict[str, Tensor]) -> Tensor:
        """Inputs of a batch, each with the batch first → [batch, width]."""

    def tag_scores(self, vectors: FloatArray) -> FloatArray:
        """Probabilities of the tags of its family (`Family.tags`) in windows with these vectors.

        [windows, width] → [windows, tags], each from 0 to 1. Only families with tags implement it.
        """
        raise NotImplementedError

    def windows(self, waveform: FloatArray) -> list[Inputs]:
        """Inputs of the model for every window of a mono waveform [samples]; see `ExtractorRecord.starts`."""
        length = self.record.window_samples
        return [self.prepare(waveform[start : start + length]) for start in self.record.starts(len(waveform))]

    def embed(self, waveforms: Sequence[FloatArray], batch_size: int = 16) -> list[FloatArray]:
        """Vectors of the windows of mono waveforms at the encoder's sample rate, each [windows, width].

        Windows of several waveforms share a batch; only inputs of equal shapes do, so nothing is padded for a batch.
        Where a GPU is out of memory the batch is halved.
        """
        windows = [(song, inputs) for song, waveform in enumerate(waveforms) for inputs in self.windows(waveform)]
        by_shape: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for number, (_, inputs) in enumerate(windows):
            by_shape.setdefault(tuple(value.shape for value in inputs.values()), []).append(number)
        vectors = np.empty((len(windows), self.record.width), dtype=np.float32)
        for numbers in by_shape.values():
            start = 0
            while start < len(numbers):
                batch = numbers[start : start + batch_size]
                try:
                    vectors[batch] = self._encode([windows[number][1] for number in batch])
                except torch.cuda.OutOfMemoryError:
                    if batch_size == 1:
                        raise
                    batch_size = max(1, batch_size // 2)
                    torch.cuda.empty_cache()
                    continue
                start += len(batch)
        songs = np.array([song for song, _ in windows], dtype=np.int64)
        return [vectors[songs == song] for song in range(len(waveforms))]

    @torch.inference_mode()
    def _encode(self, windows: list[Inputs]) -> FloatArray:
        inputs = {
            name: torch.from_numpy(np.stack([window[name] for window in windows])).to(self.device)
            for name in windows[0]
        }
        encoded: FloatArray = self.encode(inputs).float().cpu().numpy()
        return encoded


def load_extractor(
    recipe: AudioRecipe, expected: ExtractorRecord | None = None, device: str = "cpu"
) -> PretrainedExtractor:
    """Load the encoder of a recipe.

    `expected`: the record of the encoder that features or a model were made with. Raises ConfigError when the encoder
    cannot be used and MismatchError when it is another one.
    """
    if expected is not None:
        recipe = recipe.model_copy(
            update={"window_seconds": expected.window_seconds, "hop_seconds": expected.hop_seconds}
        )
    folder, record = find_extractor(recipe)
    if expected is not None and record.fingerprint != expected.fingerprint:
        raise MismatchError(
            f"the audio model {record.name_or_path} has the fingerprint {record.fingerprint}, but the model was "
            f"trained on vectors of {expected.fingerprint}; put back that audio model, or train on the new one"
        )
    family = FAMILIES[record.family]
    extractor: type[PretrainedExtractor] = getattr(importlib.import_module(family.module), family.class_name)
    return extractor(folder, record, device)
