"""The web page, and the song map and score background that it shows."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import html
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources

import pyarrow as pa
from fastapi import APIRouter
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.responses import HTMLResponse, Response

from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.live_index import Active
from htcl_ray.schemas import ESTIMATED
from htcl_ray.search.service import LOW_COVERAGE
from htcl_ray.search.song_map import draw_map, score_quantiles
from htcl_ray.serving.backend import Backend


class MapSong(BaseModel):
    """A song and its position on the map."""

    song_id: str = Field(description="Id of the song.")
    x: float = Field(ge=0, le=1, description="Horizontal position.")
    y: float = Field(ge=0, le=1, description="Vertical position.")
    title: str | None = Field(description="Title; null where the catalogue has none.")
    artist: str | None = Field(description="Artist; null where the catalogue has none.")
    genre: list[str] | None = Field(
        description="Genres; null where the catalogue has none, also where they are estimated."
    )


class MapResponse(BaseModel):
    """A two-dimensional map on which similar songs are near each other."""

    index: str = Field(description="Version of the served index.")
    songs: list[MapSong] = Field(description="At most 5,000 songs, sampled evenly from the index as it was loaded.")


class BackgroundResponse(BaseModel):
    """Distribution of the cosines of random pairs of songs, which shows how high a score is in this index."""

    index: str = Field(description="Version of the served index.")
    semantic: list[float] | None = Field(
        description="1,001 ascending quantiles of semantic_score: a score above entry i is higher than that of "
        "i / 1,000 of the pairs. Null when the index has fewer than two songs."
    )
    preference: list[float] | None = Field(
        description="1,001 ascending quantiles of preference_score; null without stage 2."
    )


def page_routes(settings: ServeSettings) -> APIRouter:
    """Route of the page, which needs no key."""
    router = APIRouter()
    content = _page(settings)
    headers = {"Content-Security-Policy": _policy(content)}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """Return the page."""
        return HTMLResponse(content, headers=headers)

    return router


def map_routes(backend: Backend) -> APIRouter:
    """Routes of the song map and the score background.

    A map that the build of the index did not draw is drawn once, in a thread of its own.
    """
    router = APIRouter(tags=["songs"])
    maps = Maps()
    backgrounds: dict[str, bytes] = {}
    """Encoded response by version of the index; only that of the latest version."""

    @router.get("/v1/background", response_model=BackgroundResponse)
    async def score_background() -> Response:
        """Return the distribution of the scores of random pairs of songs.

        With it a score can be shown as the share of the pairs that are less similar.
        """
        active = backend.live.active
        body = backgrounds.get(active.version)
        if body is None:
            body = await run_in_threadpool(lambda: _background(active).model_dump_json().encode())
            backgrounds.clear()
            backgrounds[active.version] = body
        return Response(body, media_type="application/json")

    @router.get("/v1/map", response_model=MapResponse)
    async def song_places() -> Response:
        """Return the map of the catalogue that the build of the index drew.

        Without one, the first request waits seconds until it is drawn.
        """
        active = backend.live.active
        places = active.service.index.song_map
        if places is None:
            places = await asyncio.shield(asyncio.wrap_future(maps.of(active)))
        body = await run_in_threadpool(lambda: _map_response(active, places).model_dump_json().encode())
        return Response(body, media_type="application/json")

    return router


class Maps:
    """Song positions of the index that was requested last; concurrent requests share one computation."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="htcl-song-map")
        self._version = ""
        self._places: Future[pa.Table] = Future()

    def of(self, active: Active) -> Future[pa.Table]:
        """Positions of the songs at the time of the first call; a computation that failed is tried again."""
        with self._lock:
            failed = self._places.done() and self._places.exception() is not None
            if self._version != active.version or failed:
                self._version, self._places = active.version, self._thread.submit(draw_map, active.service.index)
            return self._places


def _map_response(active: Active, places: pa.Table) -> MapResponse:
    """The map with the current metadata, without songs that were removed since it was drawn."""
    service = active.service
    index = service.index.snapshot()
    present = [
        place for place in zip(*(column.to_pylist() for column in places.columns), strict=True) if place[0] in index
    ]
    rows = [index.row_of(song_id) for song_id, _, _ in present]
    metadata = service.columns(index).metadata(rows, ["title", "artist", "genre", ESTIMATED])
    songs = [
        MapSong(
            song_id=song_id,
            x=round(x, 4),
            y=round(y, 4),
            title=about["title"],
            artist=about["artist"],
            genre=None if "genre" in (about[ESTIMATED] or ()) else about["genre"],
        )
        for (song_id, x, y), about in zip(present, metadata, strict=True)
    ]
    return MapResponse(index=active.version, songs=songs)


def _background(active: Active) -> BackgroundResponse:
    semantic, preference = score_quantiles(active.service.index) or (None, None)
    return BackgroundResponse(index=active.version, semantic=semantic, preference=preference)


def _page(settings: ServeSettings) -> str:
    """The page, with the settings of this server as data attributes of its body."""
    content = resources.files("htcl_ray.serving.routes").joinpath("page.html").read_text(encoding="utf-8")
    attributes = {
        "max-upload-bytes": settings.max_upload_bytes,
        "play-audio": str(settings.play_audio).lower(),
        "little-coverage": LOW_COVERAGE,
    }
    return content.replace(
        "<body>",
        "<body " + " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in attributes.items()) + ">",
        1,
    )


def _policy(content: str) -> str:
    """Content-Security-Policy of the page: its own script and style, by their hash, and requests to its own server."""
    hashes = {tag: _hash(re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "media-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(contents: list[str]) -> str:
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" for content in contents
    )
