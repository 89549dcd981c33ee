"""The Ray Serve deployments: encoder replicas that batch, and the ingress that holds the index and speaks HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass

import numpy as np
from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from htcl_ray.audio import decode, log_mel
from htcl_ray.errors import InputError
from htcl_ray.retrieval.index import SongIndex
from htcl_ray.retrieval.service import SearchService
from htcl_ray.retrieval.vectors import ModelVersions, Vectors
from htcl_ray.serving.routes import create_app
from htcl_ray.settings import ServeSettings
from htcl_ray.storage import Workspace

READY_SECONDS = 5.0


@dataclass(frozen=True)
class Served:
    """What is served, by place in the workspace, so that every replica loads the same."""

    workspace: Workspace
    index_version: str
    semantic: str
    preference: str | None
    model_versions: ModelVersions

    @property
    def index(self) -> str:
        """Folder of the index, below the workspace's root."""
        return f"index/{self.index_version}"


class Encoder:
    """Holds the models. Requests that arrive together are encoded together; nobody's vector depends on who else was there."""

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        import torch

        from htcl_ray.retrieval.encoder import SongEncoder

        torch.set_num_threads(max(1, int(settings.encoder_cpus)))
        workspace = served.workspace
        preference = workspace.local_copy(served.preference) if served.preference else None
        device = "cuda" if settings.encoder_gpus else "cpu"
        self._encoder = SongEncoder.load(workspace.local_copy(served.semantic), preference, device)
        self._encoder.check_versions(served.model_versions)
        for batched in (self._encode_texts, self._encode_mels):
            batched.set_max_batch_size(settings.max_batch_size)
            batched.set_batch_wait_timeout_s(settings.batch_wait_seconds)
        with contextlib.suppress(InputError):  # an imported model may have no text tower or no tokenizer at hand, and still answers sound
            self._encoder.encode_texts(["warm up"])
        self._encoder.encode_waveforms([np.zeros(self._encoder.recipe.sample_rate, dtype=np.float32)])

    async def encode_text(self, text: str) -> Vectors:
        """One row of vectors."""
        return await self._encode_texts(text)

    async def encode_audio(self, data: bytes) -> Vectors:
        """One row of vectors of an audio file's bytes. Decoded before it joins a batch, so that a bad file fails alone."""
        return await self._encode_mels(await asyncio.to_thread(self._mel, data))

    async def ready(self) -> bool:
        """Answers once the models are loaded."""
        return True

    def _mel(self, data: bytes) -> np.ndarray:
        recipe = self._encoder.recipe
        return log_mel(decode(data, recipe), recipe.sample_rate, recipe)

    @serve.batch
    async def _encode_texts(self, texts: list[str]) -> list[Vectors]:
        return _one_by_one(await asyncio.to_thread(self._encoder.encode_texts, texts))

    @serve.batch
    async def _encode_mels(self, mels: list[np.ndarray]) -> list[Vectors]:
        return _one_by_one(await asyncio.to_thread(self._encoder.encode_mels, mels))


@serve.ingress()
class Ingress:
    """Holds the index and answers HTTP; needs no torch."""

    def __init__(self, encoder: DeploymentHandle, served: Served, settings: ServeSettings) -> None:
        self._encoder = encoder
        self._settings = settings
        folder = served.workspace.local_copy(served.index)
        self.service = SearchService(SongIndex.load(folder, model_versions=served.model_versions))
        self.index_version = served.index_version

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        return create_app(self, self._settings)

    async def encode_text(self, text: str) -> Vectors:
        """See `routes.Backend`."""
        return await self._encoder.encode_text.remote(text)

    async def encode_audio(self, data: bytes) -> Vectors:
        """See `routes.Backend`."""
        return await self._encoder.encode_audio.remote(data)

    async def check_ready(self) -> None:
        """See `routes.Backend`."""
        await asyncio.wait_for(_wait(self._encoder), READY_SECONDS)


async def _wait(encoder: DeploymentHandle) -> None:
    await encoder.ready.remote()


def _one_by_one(vectors: Vectors) -> list[Vectors]:
    return [vectors.rows(slice(row, row + 1)) for row in range(len(vectors))]
