"""The request line before routing: HEAD as GET without a body, and paths of song ids that contain slashes."""

from __future__ import annotations

from urllib.parse import quote, unquote, unquote_to_bytes

from starlette.convertors import Convertor, register_url_convertor
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SONGS = "/v1/songs/"
BELOW_A_SONG = ("similar", "audio", "audio-url")
ONLY_HEADERS = "only_headers"
"""Attribute of the request's state: the response is sent without its body, so a route can save reading a file."""


def song_path(song_id: str) -> str:
    """Path of a song with its id percent-encoded, slashes included: the form that routing and signatures use."""
    return SONGS + quote(song_id, safe="")


class _SongId(Convertor[str]):
    """`{song_id:encoded}` in the path of a route, in the form of `song_path`."""

    regex = ".*"

    def convert(self, value: str) -> str:
        return unquote(value)

    def to_string(self, value: str) -> str:
        return quote(value, safe="")


register_url_convertor("encoded", _SongId())


class RequestLine:
    """ASGI middleware that belongs outside of all that read the method or the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["path"].startswith(SONGS):
            scope["path"] = _encoded(scope)
        if scope["method"] != "HEAD":
            await self._app(scope, receive, send)
            return

        async def send_headers(message: Message) -> None:
            if message["type"] != "http.response.body":
                await send(message)
            elif not message.get("more_body"):
                await send({"type": "http.response.body", "body": b""})

        as_get = {**scope, "method": "GET", "state": {**scope.get("state", {}), ONLY_HEADERS: True}}
        try:
            await self._app(as_get, receive, send_headers)
        finally:
            scope.update({**as_get, "method": "HEAD"})  # the log needs the route and the key


def _encoded(scope: Scope) -> str:
    """Path of a song, or of one of `BELOW_A_SONG`, which only a literal slash, not %2F, separates from the id."""
    raw: bytes = scope.get("raw_path") or quote(scope["path"], errors="replace").encode()
    segments = [unquote_to_bytes(segment).decode("utf-8", "replace") for segment in raw.split(b"/")]
    if segments[:3] != ["", "v1", "songs"]:
        return str(scope["path"])
    if len(segments) > 4 and segments[-1] in BELOW_A_SONG:
        return f"{song_path('/'.join(segments[3:-1]))}/{segments[-1]}"
    return song_path("/".join(segments[3:]))
