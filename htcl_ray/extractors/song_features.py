"""Features of songs from their audio, by the extractor of a recipe: the same in preprocessing, queries and checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError, MismatchError, QueryError
from htcl_ray.extractors.families import ExtractorRecord
from htcl_ray.schemas import Reason

if TYPE_CHECKING:
    from htcl_ray.extractors.base import PretrainedExtractor

FloatArray = npt.NDArray[np.float32]
NO_AUDIO = (
    "this model takes no audio, because it was trained on given vectors of songs (audio.extractor=vectors); "
    "send a text, a song of the index, or a vector"
)


class AudioFeatures:
    """Waveforms → features, each [frames, width]. Loads the pretrained encoder when it is first needed."""

    def __init__(self, recipe: AudioRecipe, extractor: ExtractorRecord | None, device: str = "cpu") -> None:
        """`extractor`: the record of the pretrained encoder. Raises QueryError for a recipe of given vectors."""
        if recipe.extractor == "vectors":
            raise QueryError(NO_AUDIO)
        if recipe.extractor == "pretrained" and extractor is None:
            raise MismatchError(
                "the model does not say which pretrained encoder made its features; train it again with this version"
            )
        self.recipe, self._extractor, self._device = recipe, extractor, device
        self._loaded: PretrainedExtractor | None = None

    @property
    def decoding(self) -> AudioRecipe:
        """The recipe with the sample rate at which waveforms are expected."""
        rate = self.recipe.sample_rate if self._extractor is None else self._extractor.sample_rate
        return self.recipe.model_copy(update={"sample_rate": rate})

    def load(self) -> None:
        """Load the pretrained encoder, if the recipe has one. Raises ConfigError or MismatchError."""
        if self._extractor is not None and self._loaded is None:
            from htcl_ray.extractors.base import load_extractor  # imports torch

            self._loaded = load_extractor(self.recipe, self._extractor, self._device)

    def __call__(self, waveforms: Sequence[FloatArray], batch_size: int = 16) -> list[FloatArray]:
        """Features of mono waveforms at `decoding.sample_rate`, which are not longer than a clip."""
        if self._extractor is None:
            from htcl_ray.audio import log_mel  # imports audio libraries

            rate = self.recipe.sample_rate
            return [log_mel(waveform, rate, self.recipe)[: self.recipe.max_frames] for waveform in waveforms]
        self.load()
        assert self._loaded is not None
        # Rounded as in the store, since standardisation enlarges the rounding of numbers that hardly vary.
        with np.errstate(over="ignore"):
            vectors = [rows.astype(np.float16).astype(np.float32) for rows in self._loaded.embed(waveforms, batch_size)]
        for rows in vectors:
            if not np.isfinite(rows).all():
                raise AudioError(
                    Reason.NOT_FINITE, f"the pretrained encoder {self._extractor.name_or_path} gives NaN or infinity"
                )
        return vectors
