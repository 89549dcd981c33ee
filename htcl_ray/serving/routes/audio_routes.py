"""The songs' sound, from where the catalogue keeps it, for players: whole or by ranges of bytes."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.fs as pafs
from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse

from htcl_ray.api.requests import PathSongId
from htcl_ray.audio.formats import MEDIA_TYPES
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import AudioNotFoundError, WorkspaceError
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.middleware.request_line import ONLY_HEADERS
from htcl_ray.serving.openapi_errors import AUDIO, NO_AUDIO
from htcl_ray.serving.responses import failure
from htcl_ray.serving.routes.byte_ranges import NotSatisfiable, asked_for
from htcl_ray.serving.signed_urls import SignedUrls
from htcl_ray.serving.storage_calls import with_storage
from htcl_ray.workspace.filesystem import open_filesystem

PIECE_BYTES = 256 * 1024
MOST_OPEN_BYTES = 1024 * 1024
"""Answer to a range without an end. A minute of music in a common format, and small enough to be sent whole into a
waiting player."""
UNKNOWN_TYPE = "application/octet-stream"
"""For extensions outside `MEDIA_TYPES`: bytes that no browser shows as a page."""


class AudioUrl(BaseModel):
    """An address that plays without a key."""

    url: str = Field(description="Path and query on this server.")
    expires_at: int = Field(description="Seconds since 1970 (UTC), after which it does not answer any more.")


@dataclass(frozen=True)
class AudioFile:
    """A file that is there."""

    filesystem: pafs.FileSystem
    path: str
    size: int
    etag: str


def audio_routes(backend: Backend, settings: ServeSettings, signed_urls: SignedUrls) -> APIRouter:
    """Below a song, whose id may hold slashes: see `request_line.py`."""
    router = APIRouter(tags=["songs"])

    @router.get("/v1/songs/{song_id:encoded}/audio", responses=AUDIO, response_class=Response)
    async def audio(song_id: PathSongId, request: Request) -> Response:
        """The song's file as the catalogue has it. Understands ranges of bytes (RFC 9110)."""
        file = await _find(backend, settings, song_id)
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=_headers(file))
        try:
            wanted = asked_for(_range_header(request, file), file.size, MOST_OPEN_BYTES)
        except NotSatisfiable:
            headers = {**_headers(file), "Content-Range": f"bytes */{file.size}"}
            return failure(
                416, f"the audio has {file.size} bytes; expected a range that begins within them", headers=headers
            )
        return await _stream(file, wanted, only_headers=getattr(request.state, ONLY_HEADERS, False))

    @router.post("/v1/songs/{song_id:encoded}/audio-url", responses=NO_AUDIO)
    async def audio_url(song_id: PathSongId) -> AudioUrl:
        """An address of the song's audio that plays without a key, for five minutes."""
        await _find(backend, settings, song_id)
        url, expires_at = signed_urls.make(song_id)
        return AudioUrl(url=url, expires_at=expires_at)

    return router


async def _find(backend: Backend, settings: ServeSettings, song_id: str) -> AudioFile:
    """The file that the index names for the song. Raises SongNotFoundError or AudioNotFoundError."""
    path = backend.live.active.service.index.metadata_of(song_id)["audio_path"]
    if not settings.play_audio:
        raise AudioNotFoundError("this server plays no audio (serve.play_audio)")
    found = await with_storage(_look_up, path) if path else None
    if found is None:
        raise AudioNotFoundError(
            f"there is no audio of the song '{song_id}' where the catalogue says; the song itself is in the index"
        )
    return found


def _look_up(path: str) -> AudioFile | None:
    """The file, or None when there is none."""
    try:
        filesystem, inner = open_filesystem(path)
    except WorkspaceError:
        return None
    info = filesystem.get_file_info(inner)
    if info.type != pafs.FileType.File:
        return None
    version = hashlib.sha256(f"{path}\n{info.size}\n{info.mtime_ns}".encode()).hexdigest()[:32]
    return AudioFile(filesystem, inner, info.size, f'"{version}"')


def _range_header(request: Request, file: AudioFile) -> str | None:
    """The Range header, unless If-Range says that it was meant for another state of the file."""
    meant_for = request.headers.get("if-range")
    return request.headers.get("range") if meant_for in (None, file.etag) else None


async def _stream(file: AudioFile, wanted: range | None, only_headers: bool) -> Response:
    source: Any = await with_storage(file.filesystem.open_input_file, file.path)
    span = range(file.size) if wanted is None else wanted
    headers = {**_headers(file), "Content-Length": str(len(span))}
    if wanted is not None:
        headers["Content-Range"] = f"bytes {wanted.start}-{wanted.stop - 1}/{file.size}"
    kind = MEDIA_TYPES.get(PurePosixPath(file.path).suffix.lower(), UNKNOWN_TYPE)
    status = 200 if wanted is None else 206
    if only_headers:
        await run_in_threadpool(source.close)
        return Response(None, status, headers, media_type=kind)
    return StreamingResponse(_pieces(source, span), status, headers, media_type=kind)


async def _pieces(source: Any, span: range) -> AsyncIterator[bytes]:
    """The bytes of the span, read in threads; a file that has become shorter ends the answer early, which its length
    tells.
    """
    try:
        position = span.start
        while position < span.stop:
            piece = await run_in_threadpool(source.read_at, min(PIECE_BYTES, span.stop - position), position)
            if not piece:
                return
            position += len(piece)
            yield piece
    finally:
        source.close()


def _headers(file: AudioFile) -> dict[str, str]:
    """A browser may keep the bytes for itself and asks whether they are still those."""
    return {"Accept-Ranges": "bytes", "ETag": file.etag, "Cache-Control": "private, no-cache"}
