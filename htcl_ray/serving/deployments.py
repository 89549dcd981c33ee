"""Ray Serve deployments: encoder replicas that batch, and ingress replicas that hold the index and serve HTTP."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np
from fastapi import FastAPI
from numpy.typing import NDArray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from htcl_ray.audio.sandbox import Decoders
from htcl_ray.cluster.ray_internals import bind_grpc_to_loopback, serve_host, use_peer_addresses
from htcl_ray.config.sections import Require, ServeSettings
from htcl_ray.errors import QueryError
from htcl_ray.extractors.song_features import NO_AUDIO
from htcl_ray.index.live.activation import Pointer
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.vectors import ModelVersions, Vectors
from htcl_ray.search.recent_queries import QueryCache, QueryDrift, index_centroid
from htcl_ray.serving.api_keys import is_loopback
from htcl_ray.serving.haproxy import RETRY
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.observability import EncoderMetrics, IngressMetrics
from htcl_ray.serving.signed_urls import new_signing_key
from htcl_ray.workspace.storage import Workspace

READY_SECONDS = 5.0
ENCODER_RETRIES = 3
RETRY_SECONDS = 0.1
batched: Callable[[Callable[..., Any]], Any] = serve.batch


@dataclass(frozen=True)
class Served:
    """Index and models to serve, by path in the workspace, so that all replicas load the same."""

    workspace: Workspace
    index: Pointer
    """Index that the application was started with; a later activation replaces it."""
    semantic: str
    preference: str | None
    model_versions: ModelVersions
    require: Require = "failed"
    """`gate.require`."""
    takes_audio: bool = True
    """Whether the models encode audio: not those that were trained on given vectors."""
    signing_key: bytes = field(default_factory=new_signing_key, repr=False)
    """Key of signed URLs, see `signed_urls.py`."""
    front_token: str = field(default="", repr=False)
    """Secret of this application's HAProxy, see `client_address.py`; empty without HAProxy."""


class Encoder:
    """Replica that holds the models and encodes concurrent requests in batches.

    The vectors of a request do not depend on the other requests of its batch.
    """

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        import torch

        from htcl_ray.search.encoder import SongEncoder

        bind_grpc_to_loopback()
        torch.set_num_threads(max(1, int(settings.encoder_cpus)))
        workspace = served.workspace
        device = "cuda" if settings.encoder_gpus else "cpu"
        self._encoder = SongEncoder.from_workspace(workspace, served.semantic, served.preference, device=device)
        self._encoder.check_versions(served.model_versions)
        self._metrics = EncoderMetrics()
        self._decoders = self._start_decoders(settings) if self._encoder.takes_audio else None
        for method in (self._encode_texts, self._encode_clips):
            method.set_max_batch_size(settings.max_batch_size)
            method.set_batch_wait_timeout_s(settings.batch_wait_seconds)
        # The first call of a model is slow, so make it before the first request.
        self._encoder.encode_texts(["warm"])
        if self._encoder.takes_audio:
            decoding = self._encoder.audio_features.decoding
            self._encoder.encode_waveforms([np.zeros(decoding.sample_rate, dtype=np.float32)])

    def _start_decoders(self, settings: ServeSettings) -> Decoders:
        return Decoders(
            self._encoder.audio_features.decoding,
            processes=settings.decoders,
            seconds=settings.decode_seconds,
            cpu_seconds=settings.decode_cpu_seconds,
            memory_bytes=settings.decode_bytes,
            max_seconds=settings.max_upload_seconds,
            max_channels=settings.max_channels,
            max_sample_rate=settings.max_sample_rate,
        )

    async def encode_text(self, text: str) -> Vectors:
        """Vectors of a text, one row."""
        vectors: Vectors = await self._encode_texts(text)
        return vectors

    async def encode_audio(self, data: bytes) -> Vectors:
        """Vectors of the first clip of an audio file, one row, as for songs of the catalogue.

        The file is decoded before it joins a batch, so that an invalid file fails alone.
        """
        if self._decoders is None:
            raise QueryError(NO_AUDIO)
        with self._metrics.stage("decode"):
            clip = await asyncio.to_thread(self._decoders.decode, data)
        vectors: Vectors = await self._encode_clips(clip)
        return vectors

    async def encode_vector(self, vector: list[float]) -> Vectors:
        """Vectors of a song by its given vector, one row."""
        return await asyncio.to_thread(self._encoder.encode_given, vector)

    async def ready(self) -> bool:
        """Return once the models are loaded."""
        return True

    @batched
    async def _encode_texts(self, texts: list[str]) -> list[Vectors]:
        self._metrics.record_batch("text", len(texts))
        with self._metrics.stage("encode_text"):
            return _rows(await asyncio.to_thread(self._encoder.encode_texts, texts))

    @batched
    async def _encode_clips(self, clips: list[NDArray[np.float32]]) -> list[Vectors]:
        self._metrics.record_batch("audio", len(clips))
        with self._metrics.stage("encode_audio"):
            return _rows(await asyncio.to_thread(self._encoder.encode_decoded, clips))

    def __del__(self) -> None:
        """Called by Ray Serve when a replica stops; ends the decoder processes."""
        decoders = getattr(self, "_decoders", None)
        if decoders is not None:
            decoders.close()


@serve.ingress()
class Ingress:
    """Replica that holds the index and serves HTTP; does not import torch."""

    def __init__(self, encoder: DeploymentHandle, served: Served, settings: ServeSettings) -> None:
        use_peer_addresses()
        bind_grpc_to_loopback()
        self._encoder = encoder
        # Other machines reach serve.host behind this application's HAProxy, else the address of Ray Serve.
        self._settings = settings if served.front_token else with_exposed_host(settings)
        self._tokens = served.signing_key, served.front_token
        self._takes_audio = served.takes_audio
        self._most_encoding = settings.max_waiting_requests
        self._encoding = 0
        """Number of requests that wait for an encoder."""
        self._cache = QueryCache(settings.cache_entries)
        self._drift = {"text": QueryDrift(), "audio": QueryDrift()}
        self.metrics = IngressMetrics()
        self.live = LiveIndex(served.workspace, settings, served.model_versions, served.index, require=served.require)
        self._centre = self.live.version, index_centroid(self.live.service.index)
        """Version of an index, and the mean of its vectors."""
        self.live.start(self._measure_index)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        signing_key, front_token = self._tokens
        return create_app(self, self._settings, metrics=self.metrics, signing_key=signing_key, front_token=front_token)

    async def encode_text(self, text: str) -> Vectors:
        """See `backend.Backend`."""
        return await self._query(
            "text", text.encode("utf-8", "surrogatepass"), lambda: _encoded(self._encoder.encode_text.remote, text)
        )

    async def encode_audio(self, data: bytes) -> Vectors:
        """See `backend.Backend`."""
        self._check_takes_audio()
        return await self._query("audio", data, lambda: _encoded(self._encoder.encode_audio.remote, data))

    async def encode_song(self, data: bytes) -> Vectors:
        """See `backend.Backend`."""
        self._check_takes_audio()
        with self._one_encoding():
            return await _encoded(self._encoder.encode_audio.remote, data)

    async def encode_vector(self, vector: Sequence[float]) -> Vectors:
        """See `backend.Backend`."""
        with self._one_encoding():
            return await _encoded(self._encoder.encode_vector.remote, list(vector))

    def _check_takes_audio(self) -> None:
        if not self._takes_audio:
            raise QueryError(NO_AUDIO)

    async def check_ready(self) -> None:
        """See `backend.Backend`."""
        with contextlib.suppress(BackPressureError):  # an encoder that is too busy is ready
            await asyncio.wait_for(_wait(self._encoder), READY_SECONDS)

    async def _query(self, kind: str, content: bytes, encode: Callable[[], Awaitable[Vectors]]) -> Vectors:
        with contextlib.nullcontext() if self._cache.contains(kind, content) else self._one_encoding():
            vectors, hit = await self._cache.get(kind, content, encode)
        self.metrics.record_cache(hit)
        self.metrics.set_drift(kind, self._drift[kind].add(vectors.semantic[0], self._centre[1]))
        return vectors

    @contextlib.contextmanager
    def _one_encoding(self) -> Iterator[None]:
        """Count a request that waits for an encoder. Raises HTTPException (429) beyond `serve.max_waiting_requests`."""
        if self._encoding >= self._most_encoding:
            message = (
                f"{self._most_encoding} requests wait for an encoder, the most that this replica lets wait; try again"
            )
            raise HTTPException(429, message, RETRY)
        self._encoding += 1
        try:
            yield
        finally:
            self._encoding -= 1

    def _measure_index(self) -> None:
        """Update the gauges; called in the thread of the live index."""
        active = self.live.active
        index = active.service.index
        if self._centre[0] != active.version:
            self._centre = active.version, index_centroid(index)
        age = datetime.now(UTC) - datetime.fromisoformat(index.manifest["created"])
        self.metrics.set_state(len(index), age.total_seconds(), active.replay.applied)

    def __del__(self) -> None:
        """Called by Ray Serve when a replica stops."""
        live = getattr(self, "live", None)
        if live is not None:
            live.stop()


def with_exposed_host(settings: ServeSettings) -> ServeSettings:
    """The settings, with the address on which Ray Serve accepts requests as `host` where other machines reach it."""
    host = serve_host()
    return settings if host is None or is_loopback(host) else settings.model_copy(update={"host": host})


async def _encoded(encode: Callable[..., Awaitable[Vectors]], *arguments: object) -> Vectors:
    """Result of the encoder. A call whose replica died is repeated, since encoding is idempotent."""
    for _ in range(ENCODER_RETRIES):
        with contextlib.suppress(RayActorError):
            return await encode(*arguments)
        await asyncio.sleep(RETRY_SECONDS)
    return await encode(*arguments)


async def _wait(encoder: DeploymentHandle) -> None:
    await encoder.ready.remote()


def _rows(vectors: Vectors) -> list[Vectors]:
    return [vectors.rows(slice(row, row + 1)) for row in range(len(vectors))]
