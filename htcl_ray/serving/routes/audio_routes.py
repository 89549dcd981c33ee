"""Audio files of the songs, read from where the catalogue keeps them: whole or by byte ranges (RFC 9110)."""

from __future__ import annotations

import hashlib
import re
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
from htcl_ray.serving.backend import Backend, with_storage
from htcl_ray.serving.error_responses import AUDIO, NO_AUDIO, failure
from htcl_ray.serving.middleware.request_line import ONLY_HEADERS
from htcl_ray.serving.signed_urls import SignedUrls
from htcl_ray.workspace.filesystem import open_filesystem

PIECE_BYTES = 256 * 1024
MAX_OPEN_RANGE_BYTES = 1024 * 1024
"""Most bytes of a response to a range without an end: about a minute of music, which a paused player can still
buffer."""
UNKNOWN_TYPE = "application/octet-stream"
"""Media type of extensions outside `MEDIA_TYPES`, which no browser displays as a page."""
WHOLE = None
MAX_RANGE_DIGITS = 18
_RANGE = re.compile(r"bytes=[ \t]*(\d*)-(\d*)[ \t]*", re.IGNORECASE | re.ASCII)


class NotSatisfiable(Exception):
    """The byte range begins after the end of the file, or is a suffix of 0 bytes."""


class AudioUrl(BaseModel):
    """A signed, expiring URL of a song's audio."""

    url: str = Field(description="Path and query of the audio on this server.")
    expires_at: int = Field(description="When the URL expires, in seconds since 1970 (UTC).")


@dataclass(frozen=True)
class AudioFile:
    """An existing file. `size` is in bytes; `etag` changes with the path, the size and the time of modification."""

    filesystem: pafs.FileSystem
    path: str
    size: int
    etag: str


def audio_routes(backend: Backend, settings: ServeSettings, signed_urls: SignedUrls) -> APIRouter:
    """Routes below a song, whose id may contain slashes (see `request_line.py`)."""
    router = APIRouter(tags=["songs"])

    @router.get("/v1/songs/{song_id:encoded}/audio", responses=AUDIO, response_class=Response)
    async def audio(song_id: PathSongId, request: Request) -> Response:
        """Return the song's audio file as the catalogue keeps it. Supports byte ranges (RFC 9110)."""
        file = await _audio_file(backend, settings, song_id)
        if request.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=_headers(file))
        try:
            span = requested_bytes(_range_header(request, file), file.size, MAX_OPEN_RANGE_BYTES)
        except NotSatisfiable:
            headers = {**_headers(file), "Content-Range": f"bytes */{file.size}"}
            return failure(
                416, f"the audio has {file.size} bytes; expected a range that begins within them", headers=headers
            )
        return await _stream(file, span, only_headers=getattr(request.state, ONLY_HEADERS, False))

    @router.post("/v1/songs/{song_id:encoded}/audio-url", responses=NO_AUDIO)
    async def audio_url(song_id: PathSongId) -> AudioUrl:
        """Create a signed URL of the song's audio, which plays without an API key for five minutes."""
        await _audio_file(backend, settings, song_id)
        url, expires_at = signed_urls.make(song_id)
        return AudioUrl(url=url, expires_at=expires_at)

    return router


def requested_bytes(header: str | None, size: int, max_open_bytes: int) -> range | None:
    """Bytes of a file of `size` bytes that a Range header requests; `WHOLE` without one. Raises NotSatisfiable.

    A header that is invalid, of another unit or of several ranges is ignored, as section 14.2 of RFC 9110 allows. A
    range without an end is cut to `max_open_bytes`, as section 15.3.7 allows, so that a paused player holds no
    connection open.
    """
    match = _RANGE.fullmatch(header or "")
    if match is None or match[0].strip().endswith("=-") or max(len(match[1]), len(match[2])) > MAX_RANGE_DIGITS:
        return WHOLE
    first, last = match[1], match[2]
    if not first:
        length = min(int(last), size)
        if not length:
            raise NotSatisfiable
        return range(size - length, size)
    start = int(first)
    if last and int(last) < start:
        return WHOLE
    if start >= size:
        raise NotSatisfiable
    return range(start, min(int(last) + 1, size) if last else min(start + max_open_bytes, size))


async def _audio_file(backend: Backend, settings: ServeSettings, song_id: str) -> AudioFile:
    """The file that the index names for the song. Raises SongNotFoundError or AudioNotFoundError."""
    path = backend.live.active.service.index.metadata_of(song_id)["audio_path"]
    if not settings.play_audio:
        raise AudioNotFoundError("this server plays no audio (serve.play_audio)")
    file = await with_storage(_look_up, path) if path else None
    if file is None:
        raise AudioNotFoundError(
            f"the audio of the song '{song_id}' is not where the catalogue says; the song itself is in the index"
        )
    return file


def _look_up(path: str) -> AudioFile | None:
    """The file at `path`; None where none exists."""
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
    """The Range header, unless If-Range names another state of the file."""
    expected = request.headers.get("if-range")
    return request.headers.get("range") if expected in (None, file.etag) else None


async def _stream(file: AudioFile, requested: range | None, only_headers: bool) -> Response:
    source: Any = await with_storage(file.filesystem.open_input_file, file.path)
    span = range(file.size) if requested is None else requested
    headers = {**_headers(file), "Content-Length": str(len(span))}
    if requested is not None:
        headers["Content-Range"] = f"bytes {requested.start}-{requested.stop - 1}/{file.size}"
    media_type = MEDIA_TYPES.get(PurePosixPath(file.path).suffix.lower(), UNKNOWN_TYPE)
    status = 200 if requested is None else 206
    if only_headers:
        await run_in_threadpool(source.close)
        return Response(None, status, headers, media_type=media_type)
    return StreamingResponse(_pieces(source, span), status, headers, media_type=media_type)


async def _pieces(source: Any, span: range) -> AsyncIterator[bytes]:
    """Bytes of the span, read in threads. A file that was truncated meanwhile ends the response early."""
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
    """Headers by which a browser may cache the file, and revalidates it before each use."""
    return {"Accept-Ranges": "bytes", "ETag": file.etag, "Cache-Control": "private, no-cache"}
