"""The HTTP routes, as a FastAPI application over anything that encodes and searches."""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from fastapi import FastAPI, File, Form, Query, UploadFile
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from htcl_ray import __version__
from htcl_ray.retrieval.http import (
    Alive,
    Blend,
    ErrorResponse,
    IndexResponse,
    K,
    Ready,
    SearchRequest,
    SearchResponse,
    Song,
)
from htcl_ray.retrieval.service import DEFAULT_K, SearchService, check_text
from htcl_ray.retrieval.vectors import Vectors
from htcl_ray.serving import failures
from htcl_ray.serving.guard import Guard
from htcl_ray.settings import ServeSettings

BAD_INPUT: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorResponse, "description": "Malformed body, or a Host that is not allowed"},
    413: {"model": ErrorResponse, "description": "Body too large"},
    422: {"model": ErrorResponse, "description": "A value that cannot be used"},
    503: {"model": ErrorResponse, "description": "The encoder cannot answer now"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse, "description": "No such song in the index"}}
UNSUPPORTED: dict[int | str, dict[str, Any]] = {415: {"model": ErrorResponse, "description": "The file is not audio that can be decoded"}}


class Backend(Protocol):
    """What the routes need."""

    service: SearchService
    index_version: str

    async def encode_text(self, text: str) -> Vectors:
        """One row of vectors."""

    async def encode_audio(self, data: bytes) -> Vectors:
        """One row of vectors of an audio file's bytes. Raises AudioError."""

    async def check_ready(self) -> None:
        """Raise unless the models are loaded."""


def create_app(backend: Backend, settings: ServeSettings) -> FastAPI:
    """The application. Searches run in threads, so that a long one does not hold up the others."""
    app = FastAPI(title="HTCL music search", version=__version__, responses=BAD_INPUT)
    failures.install(app)
    app.add_middleware(Guard, settings=settings)

    async def answer(search: Any, *arguments: Any, **options: Any) -> SearchResponse:
        return SearchResponse.of(await run_in_threadpool(search, *arguments, **options), backend.index_version)

    @app.post("/v1/search", responses=NOT_FOUND, tags=["search"])
    async def search(request: SearchRequest) -> SearchResponse:
        """Songs near words, near one or several songs, or near a vector."""
        service, k, blend = backend.service, request.k, request.blend
        if request.vector is not None:
            return await answer(service.search_vector, request.vector, k=k, blend=blend)
        if request.text is not None:
            service.check(k, blend)
            return await answer(service.search, await backend.encode_text(check_text(request.text)), k=k, blend=blend)
        return await answer(service.search_songs, request.song_ids or [request.song_id], k=k, blend=blend)

    @app.post("/v1/search/audio", responses=UNSUPPORTED, tags=["search"])
    async def search_audio(
        file: Annotated[UploadFile, File(description="An audio file: WAV, FLAC, MP3, Ogg, …")],
        k: Annotated[K, Form()] = DEFAULT_K,
        blend: Annotated[Blend | None, Form()] = None,
    ) -> SearchResponse:
        """Songs that sound like a recording."""
        backend.service.check(k, blend)
        if file.size is None or file.size > settings.max_upload_bytes:
            raise HTTPException(413, f"the file is larger than {settings.max_upload_bytes} bytes; send a shorter part of it")
        return await answer(backend.service.search, await backend.encode_audio(await file.read()), k=k, blend=blend)

    @app.get("/v1/songs/{song_id:path}/similar", responses=NOT_FOUND, tags=["songs"])
    async def similar(song_id: str, k: Annotated[K, Query()] = DEFAULT_K, blend: Annotated[Blend | None, Query()] = None) -> SearchResponse:
        """Songs near a song of the index, without itself."""
        return await answer(backend.service.search_songs, [song_id], k=k, blend=blend)

    @app.get("/v1/songs/{song_id:path}", responses=NOT_FOUND, tags=["songs"])
    async def song(song_id: str) -> Song:
        """What the catalogue says of a song."""
        return Song(song_id=song_id, **backend.service.metadata(song_id))

    @app.get("/v1/index", tags=["index"])
    async def index() -> IndexResponse:
        """What is served: the index's manifest."""
        served = backend.service.index
        return IndexResponse(
            version=backend.index_version,
            songs=len(served),
            dim=served.dim,
            has_preference=served.has_preference,
            model_versions=served.model_versions,
            manifest=served.manifest,
        )

    @app.get("/healthz", tags=["operations"])
    async def healthz() -> Alive:
        """Alive."""
        return Alive()

    @app.get("/readyz", tags=["operations"])
    async def readyz() -> Ready:
        """Models and index are loaded; 503 until then."""
        await backend.check_ready()
        return Ready(index=backend.index_version, songs=len(backend.service.index))

    return app
