"""Encoder of audio and text, used for embedding a catalogue, serving queries, and evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray

from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import MismatchError, QueryError
from htcl_ray.extractors.song_features import AudioFeatures
from htcl_ray.index.vectors import ModelVersions, Vectors
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.models.htcl import EMBED_BATCH
from htcl_ray.workspace.storage import Workspace


class SongEncoder:
    """A semantic model (stage 1) and, optionally, a preference model (stage 2) with the same input.

    The vectors of an item do not depend on the batch. `encode_*` returns unit-norm vectors or raises InputError.
    """

    def __init__(self, semantic: HTCL, preference: HTCL | None, model_versions: ModelVersions) -> None:
        if preference is not None:
            _check_same_input(semantic, preference)
        self._models = [model.eval() for model in (semantic, preference) if model is not None]
        self.model_versions = model_versions
        """Fingerprints of the models' weights."""

    @classmethod
    def load(cls, semantic: str | Path, preference: str | Path | None = None, device: str = "cpu") -> Self:
        """Load the models of one or two checkpoint folders.

        On a GPU, matrix products of this process are in TF32 from now on: unit vectors change by less than 1e-3, which
        the release gate accepts, and songs take half the time of fp32; bf16 is beyond the gate. Raises MismatchError
        when their audio recipes or dimensions differ.
        """
        if torch.device(device).type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
        folders = [folder for folder in (semantic, preference) if folder is not None]
        models = [HTCL.from_pretrained(str(folder)).to(device) for folder in folders]
        versions = [model.fingerprint for model in models]
        both = len(folders) == 2
        return cls(
            models[0],
            models[1] if both else None,
            {"semantic": versions[0], "preference": versions[1] if both else None},
        )

    @classmethod
    def from_workspace(
        cls, workspace: Workspace, semantic: str, preference: str | None = None, *, device: str = "cpu"
    ) -> Self:
        """Load the models in one or two folders of a workspace, which are first copied to this machine if it is remote.

        `semantic` and `preference`: see `Models.paths`. Raises WorkspaceError or MismatchError.
        """
        return cls.load(
            workspace.local_copy(semantic), None if preference is None else workspace.local_copy(preference), device
        )

    def check_versions(self, expected: ModelVersions) -> None:
        """Raise MismatchError unless the models have these fingerprints."""
        for stage, version in expected.items():
            if self.model_versions[stage] != version:
                raise MismatchError(
                    f"the {stage} model that was loaded is {self.model_versions[stage]}; expected {version}"
                )

    @property
    def recipe(self) -> AudioRecipe:
        """Recipe of the features that the models take."""
        return self._models[0].recipe

    @property
    def dim(self) -> int:
        """Dimension of one space."""
        return self._models[0].dim

    @property
    def takes_audio(self) -> bool:
        """Whether audio can be encoded: not by models of given vectors."""
        return self.recipe.extractor != "vectors"

    @property
    def audio_features(self) -> AudioFeatures:
        """Waveforms → features. Raises QueryError for models of given vectors."""
        return self._models[0].audio_features

    def encode_features(
        self, features: NDArray[np.floating], valid_frames: NDArray[np.integer], batch_size: int = EMBED_BATCH
    ) -> Vectors:
        """Encode features [n, frames, width]; the first `valid_frames` [n] frames of each row are the song's.

        `batch_size`: clips that are encoded at a time.
        """
        device = self._models[0].device
        dtype = torch.float16 if features.dtype == np.float16 else torch.float32
        inputs = torch.empty(features.shape, dtype=dtype, pin_memory=device.type == "cuda")
        np.copyto(inputs.numpy(), features)
        inputs = inputs.to(device, non_blocking=True)
        counts = torch.from_numpy(np.ascontiguousarray(valid_frames, dtype=np.int64))
        return _vectors([model.embed_features(inputs, counts, batch_size) for model in self._models])

    def encode_songs(self, songs: Sequence[NDArray[np.floating]]) -> Vectors:
        """Encode features of different lengths, each [frames, width]."""
        padded = np.zeros((len(songs), max(len(frames) for frames in songs), songs[0].shape[1]), dtype=np.float32)
        for row, frames in zip(padded, songs, strict=True):
            row[: len(frames)] = frames
        return self.encode_features(padded, np.array([len(frames) for frames in songs]))

    def encode_given(self, vector: Sequence[float]) -> Vectors:
        """Encode the given vector of a song, one row.

        Raises QueryError for another width, numbers that are not finite, and models that take audio.
        """
        width = self._models[0].record.input_width
        if self.takes_audio:
            raise QueryError("this model takes the audio of a song and no vector; send a file")
        if len(vector) != width:
            raise QueryError(f"the vector has {len(vector)} numbers; this model was trained on vectors of {width}")
        with np.errstate(over="ignore"):
            stored = np.asarray(vector, dtype=np.float16)  # as for songs of the catalogue
        if not np.isfinite(stored).all():
            raise QueryError(f"the vector holds NaN, or numbers beyond ±{np.finfo(np.float16).max:,.0f}")
        return self.encode_songs([stored[None]])

    def encode_waveforms(self, waveforms: Sequence[NDArray[np.float32]]) -> Vectors:
        """Encode mono waveforms at `audio_features.decoding.sample_rate`, each [samples].

        Raises QueryError for models of given vectors.
        """
        return self.encode_songs(self.audio_features(waveforms))

    def encode_decoded(self, clips: Sequence[NDArray[np.float32]]) -> Vectors:
        """Encode what the decoder processes return: log-mels, or waveforms [samples, 1] for a pretrained encoder."""
        if self.recipe.extractor == "log_mel":
            return self.encode_songs(clips)
        return self.encode_waveforms([np.ascontiguousarray(clip[:, 0]) for clip in clips])

    def encode_texts(self, texts: Sequence[str]) -> Vectors:
        """Encode texts, with their coverage by the vocabulary of the semantic model, which stage 2 shares."""
        vectors = _vectors([model.embed_text(list(texts)) for model in self._models])
        return replace(vectors, text_coverage=self._models[0].text_encoder.coverage(texts))


def model_versions(workspace: Workspace, semantic: str, preference: str | None = None) -> ModelVersions:
    """Fingerprints of the weights in one or two folders of a workspace; see `SongEncoder.from_workspace`."""
    return {
        "semantic": weights_fingerprint(workspace.local_copy(semantic)),
        "preference": None if preference is None else weights_fingerprint(workspace.local_copy(preference)),
    }


def _vectors(per_model: list[torch.Tensor]) -> Vectors:
    arrays = [vectors.numpy() for vectors in per_model]
    return Vectors(arrays[0], arrays[1] if len(arrays) == 2 else None)


def _check_same_input(semantic: HTCL, preference: HTCL) -> None:
    if semantic.dim != preference.dim:
        raise MismatchError(
            f"the semantic model has {semantic.dim} dimensions and the preference model {preference.dim}; "
            "expected two stages of one model"
        )
    if semantic.record.extractor != preference.record.extractor:
        raise MismatchError(
            "the semantic model and the preference model were trained on vectors of different pretrained encoders; "
            "expected two stages of one model"
        )
    other = preference.recipe.model_dump()
    for key, value in semantic.recipe.model_dump().items():
        if other[key] != value:
            raise MismatchError(
                f"the semantic model was trained with audio.{key}={value} and the preference model with "
                f"audio.{key}={other[key]}; expected two stages of one model"
            )
