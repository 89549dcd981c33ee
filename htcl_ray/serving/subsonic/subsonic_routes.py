"""OpenSubsonic API for music players: similar songs and paths between songs (extension `sonicSimilarity`).

Players send their API key as the parameter `apiKey` (extension `apiKeyAuthentication`), which `SubsonicKeys` removes
from the query string, so that no code behind it can log or repeat it.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Annotated, Any
from urllib.parse import parse_qs, unquote_plus

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.api.requests import MAX_K
from htcl_ray.errors import QueryError, SongNotFoundError, first_fault
from htcl_ray.search.results import SearchResults
from htcl_ray.search.service import MAX_PATH, SearchService
from htcl_ray.serving.api_keys import WITHOUT_KEY, Key, Keys
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.observability import IngressMetrics
from htcl_ray.serving.subsonic.subsonic_responses import (
    FORMATS,
    Body,
    Code,
    Extension,
    Extensions,
    Failed,
    Reply,
    SonicMatches,
    Token,
    TokenInfo,
    write,
)

PREFIX = "/rest/"
EXTENSIONS = ("apiKeyAuthentication", "sonicSimilarity")
SIMILAR_COUNT, PATH_COUNT = 10, 25
CREDENTIALS = ("apiKey", "u", "p", "t", "s")
"""Parameters that authenticate a player; only the first is supported."""
Format = Annotated[str | None, Query(alias="f", description="Format of the response: json (default) or xml.")]
AS_XML: dict[int | str, dict[str, Any]] = {200: {"content": {"application/xml": {}}}}


class SubsonicKeys:
    """ASGI middleware before `Authentication`: turn a valid `apiKey` into an Authorization header.

    Responds with an error of the specification to a request without a valid key, where one is needed.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with an error."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        sent = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        scope["query_string"] = _without_credentials(scope["query_string"])
        if scope["path"] not in WITHOUT_KEY:
            failed = self._check(scope, sent)
            if failed is not None:
                await write(failed, sent.get("f", [None])[-1])(scope, receive, send)
                return
            if "apiKey" in sent:
                scope["headers"] = [*scope["headers"], (b"authorization", f"Bearer {sent['apiKey'][0]}".encode())]
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, sent: dict[str, list[str]]) -> Failed | None:
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        others = [name for name in CREDENTIALS[1:] if name in sent]
        if "apiKey" in sent:
            if others or headers or len(sent["apiKey"]) > 1:
                return Failed.of(
                    Code.CONFLICTING,
                    "the request has more than an apiKey; send it once, and neither u, p, t, s nor Authorization",
                )
            key = sent["apiKey"][0]
            if not key.isascii() or self._keys.find(key) is None:
                return Failed.of(Code.INVALID_KEY, "the apiKey is not one that this server knows")
        elif headers:
            if len(headers) > 1 or self._keys.find(headers[0].partition(" ")[2].strip()) is None:
                return Failed.of(Code.INVALID_KEY, "the API key is not one that this server knows")
        elif self._keys.reads_need_key:
            return _without_key(others)
        return None


class _Route(APIRoute):
    """Route whose errors have the form of the OpenSubsonic specification."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def respond(request: Request) -> Response:
            form = request.query_params.get("f")
            if form not in FORMATS:
                return write(Body(), form)
            try:
                return await handle(request)
            except RequestValidationError as error:
                return write(_invalid(error), form)
            except SongNotFoundError as error:
                return write(Failed.of(Code.NOT_FOUND, str(error)), form)
            except QueryError as error:
                return write(Failed.of(Code.GENERIC, str(error)), form)

        return respond


def subsonic_routes(backend: Backend, metrics: IngressMetrics | None = None) -> APIRouter:
    """Routes of the API, each also with the suffix .view that players send."""
    router = APIRouter(tags=["players"], route_class=_Route)

    def get(name: str, body: type[Body]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def add(handler: Callable[..., Any]) -> Callable[..., Any]:
            model = Reply[body | Failed]  # type: ignore[valid-type]
            router.add_api_route(f"/rest/{name}", handler, methods=["GET"], response_model=model, responses=AS_XML)
            router.add_api_route(
                f"/rest/{name}.view", handler, methods=["GET"], response_model=model, include_in_schema=False
            )
            return handler

        return add

    async def matches(query: Callable[[SearchService], SearchResults], form: str | None) -> Response:
        service = backend.live.active.service

        def search() -> tuple[int, Response]:
            with metrics.stage("search") if metrics else nullcontext():
                results = query(service)
            return len(results.hits), write(SonicMatches.of(results), form)

        num_results, response = await run_in_threadpool(search)
        if metrics:
            metrics.record_search(num_results)
        return response

    @get("getOpenSubsonicExtensions", Extensions)
    async def extensions(f: Format = None) -> Response:
        """Return the extensions that this server supports; needs no key."""
        return write(Extensions(openSubsonicExtensions=[Extension(name=name, versions=[1]) for name in EXTENSIONS]), f)

    @get("tokenInfo", TokenInfo)
    async def token_info(request: Request, f: Format = None) -> Response:
        """Return the name of the API key of the request."""
        key: Key | None = request.scope.get("state", {}).get("key")
        return write(
            TokenInfo(tokenInfo=Token(username=key.name)) if key else Failed.of(Code.MISSING, "no apiKey was sent"), f
        )

    @get("getSonicSimilarTracks", SonicMatches)
    async def similar(
        id: Annotated[str, Query(min_length=1, max_length=1_000, description="Id of the song.")],
        count: Annotated[
            int, Query(ge=1, description=f"Number of songs; values above {MAX_K} count as {MAX_K}.")
        ] = SIMILAR_COUNT,
        f: Format = None,
    ) -> Response:
        """Return the songs most similar to a song, without that song; `similarity` refers to that song."""
        return await matches(lambda service: service.search_songs([id], k=min(count, MAX_K)), f)

    @get("findSonicPath", SonicMatches)
    async def path(
        startSongId: Annotated[
            str, Query(min_length=1, max_length=1_000, description="Id of the first song of the path.")
        ],
        endSongId: Annotated[
            str, Query(min_length=1, max_length=1_000, description="Id of the last song of the path.")
        ],
        count: Annotated[
            int,
            Query(
                ge=1,
                description=f"Maximum number of songs, with both ends; values above {MAX_PATH} count as {MAX_PATH}.",
            ),
        ] = PATH_COUNT,
        f: Format = None,
    ) -> Response:
        """Return a path of songs from one song to another, both included; `similarity` refers to the first song."""
        return await matches(lambda service: service.path(startSongId, endSongId, min(count, MAX_PATH)), f)

    return router


def _without_key(others: list[str]) -> Failed:
    """Error for a request without an API key; `others`: names of the credentials that it has instead."""
    if "t" in others:
        message = "this server knows no tokens; send an API key as apiKey, without u, t and s"
        return Failed.of(Code.NO_TOKENS, message)
    if others:
        message = "this server knows no passwords; send an API key as apiKey, without u and p"
        return Failed.of(Code.NO_PASSWORDS, message)
    return Failed.of(Code.MISSING, "an API key is needed: send it as apiKey")


def _without_credentials(query: bytes) -> bytes:
    return b"&".join(
        part for part in query.split(b"&") if unquote_plus(part.partition(b"=")[0].decode("latin-1")) not in CREDENTIALS
    )


def _invalid(error: RequestValidationError) -> Failed:
    fault = first_fault(error)
    name = fault.path[-1]
    if fault.kind in ("missing", "string_too_short"):
        return Failed.of(Code.MISSING, f"the parameter {name} is missing")
    return Failed.of(Code.GENERIC, f"{name}: {fault.message}")
