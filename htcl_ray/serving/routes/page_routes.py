"""The web page, and the map of the catalogue that it shows."""

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
from htcl_ray.search.service import LOW_COVERAGE
from htcl_ray.search.song_map import draw_map, score_quantiles
from htcl_ray.serving.backend import Backend


class MapSong(BaseModel):
    """A song and its place."""

    song_id: str
    x: float = Field(ge=0, le=1)
    y: float = Field(ge=0, le=1)
    title: str | None
    artist: str | None
    genre: list[str] | None


class MapResponse(BaseModel):
    """Songs on a plane, near each other when they are alike."""

    index: str = Field(description="Version of the index whose songs these are.")
    songs: list[MapSong] = Field(description="At most 5,000, evenly chosen from the index as it was loaded.")


class BackgroundResponse(BaseModel):
    """What a score means in this index: the cosines of random pairs of its songs."""

    index: str = Field(description="Version of the index whose songs these are.")
    semantic: list[float] | None = Field(
        description="1,001 ascending quantiles: a semantic_score above number i is higher than that of i / 1,000 of the pairs. Null "
        "when the index has fewer than two songs."
    )
    preference: list[float] | None = Field(description="The same of preference_score; null without stage 2.")


def page_routes(settings: ServeSettings) -> APIRouter:
    """The page alone, which needs no key."""
    router = APIRouter()
    content = _page(settings)
    headers = {"Content-Security-Policy": _policy(content)}

    @router.get("/", include_in_schema=False)
    async def page() -> Response:
        """Search, listen, and see why."""
        return HTMLResponse(content, headers=headers)

    return router


def map_routes(backend: Backend) -> APIRouter:
    """The map of the index, or where its build drew none, one drawn once in a thread of its own so that searches find
    theirs.

    And the background of its scores.
    """
    router = APIRouter(tags=["songs"])
    maps = Maps()
    backgrounds: dict[str, bytes] = {}
    """By version of the index; only that of the last."""

    @router.get("/v1/background", response_model=BackgroundResponse)
    async def score_background() -> Response:
        """How high scores of random pairs of songs are, so that a score can be shown as the share of pairs that are
        less alike.
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
        """A map of the catalogue, drawn when the index was built; without one the first request waits seconds for it to
        be drawn.
        """
        active = backend.live.active
        places = active.service.index.song_map
        if places is None:
            places = await asyncio.shield(asyncio.wrap_future(maps.of(active)))
        body = await run_in_threadpool(lambda: _answer(active, places).model_dump_json().encode())
        return Response(body, media_type="application/json")

    return router


class Maps:
    """The places of the songs of the index that was asked about last. Whoever asks while they are computed waits for
    the same.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="htcl-song-map")
        self._version = ""
        self._places: Future[pa.Table] = Future()

    def of(self, active: Active) -> Future[pa.Table]:
        """Of the index's songs at the time of the first call; one that failed is tried again."""
        with self._lock:
            failed = self._places.done() and self._places.exception() is not None
            if self._version != active.version or failed:
                self._version, self._places = active.version, self._thread.submit(draw_map, active.service.index)
            return self._places


def _answer(active: Active, places: pa.Table) -> MapResponse:
    """With what is said of the songs now; those taken out since are not there."""
    service = active.service
    index = service.index.snapshot()
    there = [
        place for place in zip(*(column.to_pylist() for column in places.columns), strict=True) if place[0] in index
    ]
    rows = [index.row_of(song_id) for song_id, _, _ in there]
    said = service.columns(index).metadata(rows, ["title", "artist", "genre"])
    songs = [
        MapSong(song_id=song_id, x=round(x, 4), y=round(y, 4), **about)
        for (song_id, x, y), about in zip(there, said, strict=True)
    ]
    return MapResponse(index=active.version, songs=songs)


def _background(active: Active) -> BackgroundResponse:
    semantic, preference = score_quantiles(active.service.index) or (None, None)
    return BackgroundResponse(index=active.version, semantic=semantic, preference=preference)


def _page(settings: ServeSettings) -> str:
    """The page, told by attributes of its body what this server allows."""
    content = resources.files("htcl_ray.serving.routes").joinpath("page.html").read_text(encoding="utf-8")
    told = {
        "max-upload-bytes": settings.max_upload_bytes,
        "play-audio": str(settings.play_audio).lower(),
        "little-coverage": LOW_COVERAGE,
    }
    return content.replace(
        "<body>",
        "<body " + " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in told.items()) + ">",
        1,
    )


def _policy(content: str) -> str:
    """What the page may do: run its own script and style, which are known by their hash, and talk to its own server."""
    hashes = {tag: _hash(re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.DOTALL)) for tag in ("script", "style")}
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; media-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(contents: list[str]) -> str:
    return " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'" for content in contents
    )
