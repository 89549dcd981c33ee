"""Searches by words, songs, vectors, recordings and histories, and the vectors of words and recordings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Depends, File, Form, Query, Request, UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response

from htcl_ray.api.requests import (
    DEFAULT_K,
    Blend,
    Collapse,
    EmbedTextRequest,
    Filter,
    K,
    MaxPerArtist,
    PathSongId,
    RecommendRequest,
    SearchRequest,
)
from htcl_ray.api.responses import EmbeddingResponse, RecommendResponse, SearchResponse
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import QueryError
from htcl_ray.index.live.live_index import Active
from htcl_ray.search.results import SearchResults, embedding_response
from htcl_ray.search.service import SearchService, check_text
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.json_body import FORM, JSON, is_form, parse_part, takes
from htcl_ray.serving.openapi_errors import JSON_ONLY, NOT_FOUND, UNSUPPORTED
from htcl_ray.serving.prometheus import IngressMeasurements

AudioFile = Annotated[UploadFile, File(description="An audio file: WAV, FLAC, MP3, Ogg, …")]
SEARCH_THREADS = 4
"""Of an ingress replica: FAISS lets others run while it searches, Python does not, so more threads only wait for each
other."""
FILTER = "Filter as JSON."
# The dependencies below are async so that FastAPI calls them where it is, and not in a thread.
EMBEDDINGS_BODY = {"requestBody": {"content": {"application/json": {"schema": EmbedTextRequest.model_json_schema()}}}}


def search_routes(
    backend: Backend, settings: ServeSettings, measurements: IngressMeasurements | None = None
) -> APIRouter:
    """Searches run in threads, so that a long one does not hold up the others."""
    router = APIRouter()
    threads = ThreadPoolExecutor(SEARCH_THREADS, thread_name_prefix="search")

    async def respond(
        query: Callable[[SearchService], SearchResults],
        active: Active,
        convert: Callable[[SearchResults, str], SearchResponse] = SearchResults.to_response,
    ) -> Response:
        def search() -> tuple[SearchResults, bytes]:
            with measurements.stage("search") if measurements else nullcontext():
                results = query(active.service)
            return results, convert(results, active.version).model_dump_json().encode()

        results, body = await asyncio.get_running_loop().run_in_executor(threads, search)
        if measurements:
            measurements.answer(len(results.hits))
        return Response(body, media_type="application/json")  # validated when it was made; FastAPI would do it again

    @router.post(
        "/v1/search",
        response_model=SearchResponse,
        responses={**NOT_FOUND, **JSON_ONLY},
        dependencies=[takes(JSON)],
        tags=["search"],
    )
    async def search(request: SearchRequest) -> Response:
        """Songs near words, near one or several songs, or near a vector."""
        active, options = backend.live.active, request.options
        if request.vector is not None:
            vector = request.vector
            return await respond(lambda service: service.search_vector(vector, **options), active)
        if request.text is not None:
            text = check_text(request.text)
            active.service.check(**options)
            query = await backend.encode_text(text)
            return await respond(lambda service: service.search_encoded_text(text, query, **options), active)
        seeds = request.song_ids or [request.song_id or ""]
        negatives = request.negative_song_ids
        return await respond(lambda service: service.search_songs(seeds, negatives, **options), active)

    @router.post(
        "/v1/search/audio",
        response_model=SearchResponse,
        responses=UNSUPPORTED,
        dependencies=[takes(FORM)],
        tags=["search"],
    )
    async def search_audio(file: AudioFile, options: Annotated[dict[str, Any], Depends(_form_options)]) -> Response:
        """Songs that sound like a recording."""
        active = backend.live.active
        active.service.check(**options)
        query = await backend.encode_audio(await read_upload(file, settings))
        return await respond(lambda service: service.search(query, **options), active)

    @router.post(
        "/v1/recommend",
        response_model=RecommendResponse,
        responses={**NOT_FOUND, **JSON_ONLY},
        dependencies=[takes(JSON)],
        tags=["search"],
    )
    async def recommend(request: RecommendRequest) -> Response:
        """Songs for a listener who heard these, without them. Songs that the index does not hold are left out and
        named.
        """
        plays, half_life, options = request.plays, request.half_life_days, request.options
        return await respond(
            lambda service: service.recommend(plays, half_life_days=half_life, **options),
            backend.live.active,
            SearchResults.to_recommend_response,
        )

    @router.get(
        "/v1/songs/{song_id:encoded}/similar", response_model=SearchResponse, responses=NOT_FOUND, tags=["songs"]
    )
    async def similar(song_id: PathSongId, options: Annotated[dict[str, Any], Depends(_query_options)]) -> Response:
        """Songs near a song of the index, without itself."""
        return await respond(lambda service: service.search_songs([song_id], **options), backend.live.active)

    @router.post(
        "/v1/embeddings",
        responses=UNSUPPORTED,
        dependencies=[takes(JSON, FORM)],
        tags=["search"],
        openapi_extra=EMBEDDINGS_BODY,
    )
    async def embeddings(
        request: Request,
        file: Annotated[UploadFile | None, File(description="An audio file: WAV, FLAC, MP3, Ogg, …")] = None,
    ) -> EmbeddingResponse:
        """The vectors of words (a JSON body) or of a recording (a form with a file)."""
        if file is not None:
            vectors = await backend.encode_audio(await read_upload(file, settings))
        else:
            given = None if is_form(request) else parse_part(EmbedTextRequest, await request.body(), "body")
            if given is None:
                raise QueryError(
                    "there is neither a file nor a text; send a form with a file, or a JSON body with a text"
                )
            vectors = await backend.encode_text(check_text(given.text))
        return embedding_response(vectors, backend.live.active.service.index.model_versions)

    return router


async def read_upload(file: UploadFile, settings: ServeSettings) -> bytes:
    """The bytes of an uploaded file. Raises HTTPException (413) for too many."""
    if file.size is None or file.size > settings.max_upload_bytes:
        raise HTTPException(
            413, f"the file is larger than {settings.max_upload_bytes} bytes; send a shorter part of it"
        )
    return await file.read()


async def _form_options(
    k: Annotated[K, Form()] = DEFAULT_K,
    blend: Annotated[Blend | None, Form()] = None,
    filter: Annotated[str | None, Form(description=FILTER)] = None,
    max_per_artist: Annotated[MaxPerArtist | None, Form()] = None,
    collapse_duplicates: Annotated[Collapse, Form()] = True,
) -> dict[str, Any]:
    return _options(k, blend, filter, max_per_artist, collapse_duplicates, "body")


async def _query_options(
    k: Annotated[K, Query()] = DEFAULT_K,
    blend: Annotated[Blend | None, Query()] = None,
    filter: Annotated[str | None, Query(description=FILTER)] = None,
    max_per_artist: Annotated[MaxPerArtist | None, Query()] = None,
    collapse_duplicates: Annotated[Collapse, Query()] = True,
) -> dict[str, Any]:
    return _options(k, blend, filter, max_per_artist, collapse_duplicates, "query")


def _options(
    k: int, blend: float | None, conditions: str | None, max_per_artist: int | None, collapse: bool, place: str
) -> dict[str, Any]:
    return {
        "k": k,
        "blend": blend,
        "filter": parse_part(Filter, conditions, place, "filter"),
        "max_per_artist": max_per_artist,
        "collapse_duplicates": collapse,
    }
