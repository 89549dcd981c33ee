"""Searches by text, songs, a vector, audio or a listening history, and the vectors of text and audio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Form, Query, Request
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
from htcl_ray.serving.error_responses import JSON_ONLY, NOT_FOUND, UNSUPPORTED
from htcl_ray.serving.observability import IngressMetrics
from htcl_ray.serving.request_body import (
    FORM,
    JSON,
    AudioUpload,
    OptionalAudioUpload,
    is_form,
    parse_part,
    read_upload,
    takes,
)

SEARCH_THREADS = 4
"""Search threads of an ingress replica. FAISS releases the interpreter lock and Python does not, so more would only
wait."""
SearchQuery = Callable[[SearchService], SearchResults]
Convert = Callable[[SearchResults, str], SearchResponse]
FILTER = "Conditions that every result meets, as a JSON object: see the schema Filter."
EMBEDDINGS_BODY = {"requestBody": {"content": {"application/json": {"schema": EmbedTextRequest.model_json_schema()}}}}


class _Searches:
    """Runs searches in threads and serialises their results."""

    def __init__(self, metrics: IngressMetrics | None) -> None:
        self._metrics = metrics
        self._threads = ThreadPoolExecutor(SEARCH_THREADS, thread_name_prefix="search")

    async def respond(
        self, query: SearchQuery, active: Active, convert: Convert = SearchResults.to_response
    ) -> Response:
        """Response with the results of `query`, in the form that `convert` gives them."""
        num_results, body = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._run, query, active, convert
        )
        if self._metrics:
            self._metrics.record_search(num_results)
        return Response(body, media_type="application/json")  # already validated; FastAPI would validate it again

    def _run(self, query: SearchQuery, active: Active, convert: Convert) -> tuple[int, bytes]:
        with self._metrics.stage("search") if self._metrics else nullcontext():
            results = query(active.service)
        return len(results.hits), convert(results, active.version).model_dump_json().encode()


def search_routes(backend: Backend, settings: ServeSettings, metrics: IngressMetrics | None = None) -> APIRouter:
    """Routes of searches, which run in threads, so that a long one does not delay others."""
    router = APIRouter()
    respond = _Searches(metrics).respond

    @router.post(
        "/v1/search",
        response_model=SearchResponse,
        responses={**NOT_FOUND, **JSON_ONLY},
        dependencies=[takes(JSON)],
        tags=["search"],
    )
    async def search(request: SearchRequest) -> Response:
        """Search for songs near a text, near one or several songs, or near a vector."""
        active = backend.live.active
        return await respond(await _query_of(request, backend, active), active)

    @router.post(
        "/v1/search/audio",
        response_model=SearchResponse,
        responses=UNSUPPORTED,
        dependencies=[takes(FORM)],
        tags=["search"],
    )
    async def search_audio(file: AudioUpload, options: Annotated[dict[str, Any], Depends(_form_options)]) -> Response:
        """Search for songs near an audio file."""
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
        """Recommend songs to a listener, given a listening history, without the songs of the history.

        The response names the songs of the history that the index does not contain.
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
        """Search for songs near a song of the index, without that song."""
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
        file: OptionalAudioUpload = None,
    ) -> EmbeddingResponse:
        """Return the vectors of a text (a JSON body) or of audio (a form with a file)."""
        if file is not None:
            vectors = await backend.encode_audio(await read_upload(file, settings))
        else:
            given = None if is_form(request) else parse_part(EmbedTextRequest, await request.body(), "body")
            if given is None:
                raise QueryError(
                    "the request has neither a file nor a text; send a form with a file, or a JSON body with a text"
                )
            vectors = await backend.encode_text(check_text(given.text))
        return embedding_response(vectors, backend.live.active.service.index.model_versions)

    return router


async def _query_of(request: SearchRequest, backend: Backend, active: Active) -> SearchQuery:
    """The search of a request, whose text, if any, is encoded here."""
    options = request.options
    if request.vector is not None:
        vector = request.vector
        return lambda service: service.search_vector(vector, **options)
    if request.text is not None:
        text = check_text(request.text)
        active.service.check(**options)
        vectors = await backend.encode_text(text)
        return lambda service: service.search_encoded_text(text, vectors, **options)
    seeds = request.song_ids or [request.song_id or ""]
    negatives = request.negative_song_ids
    return lambda service: service.search_songs(seeds, negatives, **options)


# Async, so that FastAPI calls the dependencies in the event loop and not in a thread.
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
