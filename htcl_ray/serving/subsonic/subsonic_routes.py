"""OpenSubsonic for music players: songs that sound alike, and paths between two songs (extension `sonicSimilarity`)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from contextlib import nullcontext
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from htcl_ray.api.requests import MAX_K
from htcl_ray.errors import QueryError, SongNotFoundError, first_fault
from htcl_ray.search.results import SearchResults
from htcl_ray.search.service import MAX_PATH, SearchService
from htcl_ray.serving.api_keys import Key
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.prometheus import IngressMeasurements
from htcl_ray.serving.subsonic.subsonic_responses import (
    FORMS,
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

EXTENSIONS = ("apiKeyAuthentication", "sonicSimilarity")
SIMILAR_COUNT, PATH_COUNT = 10, 25
SongId = Annotated[str, Query(min_length=1, max_length=1_000, description="Id of an indexed song.")]
Form = Annotated[str | None, Query(alias="f", description="Form of the reply: json or xml.")]
AS_XML: dict[int | str, dict[str, Any]] = {200: {"content": {"application/xml": {}}}}


class _Route(APIRoute):
    """Replies with the specification's failures in place of ours."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def replying(request: Request) -> Response:
            form = request.query_params.get("f")
            if form not in FORMS:
                return write(Body(), form)
            try:
                return await handle(request)
            except RequestValidationError as error:
                return write(_invalid(error), form)
            except SongNotFoundError as error:
                return write(Failed.of(Code.NOT_FOUND, str(error)), form)
            except QueryError as error:
                return write(Failed.of(Code.GENERIC, str(error)), form)

        return replying


def subsonic_routes(backend: Backend, measurements: IngressMeasurements | None = None) -> APIRouter:
    """Each address also with the suffix .view, which players send."""
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

    async def matches(question: Callable[[SearchService], SearchResults], form: str | None) -> Response:
        service = backend.live.active.service

        def search() -> tuple[SearchResults, Response]:
            with measurements.stage("search") if measurements else nullcontext():
                found = question(service)
            return found, write(SonicMatches.of(found), form)

        found, response = await run_in_threadpool(search)
        if measurements:
            measurements.answer(len(found.hits))
        return response

    @get("getOpenSubsonicExtensions", Extensions)
    async def extensions(f: Form = None) -> Response:
        """What this server offers to players; needs no key."""
        return write(Extensions(openSubsonicExtensions=[Extension(name=name, versions=[1]) for name in EXTENSIONS]), f)

    @get("tokenInfo", TokenInfo)
    async def token_info(request: Request, f: Form = None) -> Response:
        """The name of the API key that was sent."""
        key: Key | None = request.scope.get("state", {}).get("key")
        return write(
            TokenInfo(tokenInfo=Token(username=key.name)) if key else Failed.of(Code.MISSING, "no apiKey was sent"), f
        )

    @get("getSonicSimilarTracks", SonicMatches)
    async def similar(
        id: SongId,
        count: Annotated[int, Query(ge=1, description=f"Songs wanted; more than {MAX_K} is {MAX_K}.")] = SIMILAR_COUNT,
        f: Form = None,
    ) -> Response:
        """Songs near a song, nearest first, without itself; `similarity` is to that song."""
        return await matches(lambda service: service.search_songs([id], k=min(count, MAX_K)), f)

    @get("findSonicPath", SonicMatches)
    async def path(
        startSongId: SongId,
        endSongId: SongId,
        count: Annotated[
            int, Query(ge=1, description=f"Most songs, with both ends; more than {MAX_PATH} is {MAX_PATH}.")
        ] = PATH_COUNT,
        f: Form = None,
    ) -> Response:
        """Songs that lead from one to the other, both included; `similarity` is to the first."""
        return await matches(lambda service: service.path(startSongId, endSongId, min(count, MAX_PATH)), f)

    return router


def _invalid(error: RequestValidationError) -> Failed:
    fault = first_fault(error)
    name = fault.path[-1]
    if fault.kind in ("missing", "string_too_short"):
        return Failed.of(Code.MISSING, f"the parameter {name} is missing")
    return Failed.of(Code.GENERIC, f"{name}: {fault.message}")
