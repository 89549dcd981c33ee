"""Searches by words, songs, vectors and recordings."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from htcl_ray.retrieval.http import Blend, K, SearchRequest, SearchResponse
from htcl_ray.retrieval.service import DEFAULT_K, check_text
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.documented import NOT_FOUND, UNSUPPORTED
from htcl_ray.settings import ServeSettings


def search_routes(backend: Backend, settings: ServeSettings) -> APIRouter:
    """Searches run in threads, so that a long one does not hold up the others."""
    router = APIRouter()

    async def answer(search: Any, *arguments: Any, **options: Any) -> SearchResponse:
        return SearchResponse.of(await run_in_threadpool(search, *arguments, **options), backend.index_version)

    @router.post("/v1/search", responses=NOT_FOUND, tags=["search"])
    async def search(request: SearchRequest) -> SearchResponse:
        """Songs near words, near one or several songs, or near a vector."""
        service, k, blend = backend.service, request.k, request.blend
        if request.vector is not None:
            return await answer(service.search_vector, request.vector, k=k, blend=blend)
        if request.text is not None:
            service.check(k, blend)
            return await answer(service.search, await backend.encode_text(check_text(request.text)), k=k, blend=blend)
        return await answer(service.search_songs, request.song_ids or [request.song_id], k=k, blend=blend)

    @router.post("/v1/search/audio", responses=UNSUPPORTED, tags=["search"])
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

    @router.get("/v1/songs/{song_id:path}/similar", responses=NOT_FOUND, tags=["songs"])
    async def similar(song_id: str, k: Annotated[K, Query()] = DEFAULT_K, blend: Annotated[Blend | None, Query()] = None) -> SearchResponse:
        """Songs near a song of the index, without itself."""
        return await answer(backend.service.search_songs, [song_id], k=k, blend=blend)

    return router
