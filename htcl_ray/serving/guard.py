"""Checks that come before routing: which host a request is for, and how large its body may grow while it is read."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.serving.failures import failure
from htcl_ray.settings import ServeSettings

MAX_JSON_BYTES = 1_000_000
MULTIPART_OVERHEAD_BYTES = 64_000
"""Boundaries, part headers and option fields around an uploaded file."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")


class Guard:
    """ASGI middleware. The Host check keeps a web page from reaching a loopback server through a name that it controls (DNS rebinding)."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._hosts = {name.lower() for name in (*LOOPBACK, settings.host, *settings.allowed_hosts)}
        self._max_upload_bytes = settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 400 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        host = _without_port(headers.get("host", ""))
        if "*" not in self._hosts and host not in self._hosts:
            message = f"the Host header names '{host[:200]}', which this server does not go by; allow it with serve.allowed_hosts"
            await failure(400, message, "unknown_host")(scope, receive, send)
            return
        is_upload = headers.get("content-type", "").lower().startswith("multipart/")
        limit = self._max_upload_bytes + MULTIPART_OVERHEAD_BYTES if is_upload else MAX_JSON_BYTES
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told) > limit:
            await failure(413, _too_large(limit))(scope, receive, send)
            return
        await self._app(scope, _counting(receive, limit), send)


def _counting(receive: Receive, limit: int) -> Receive:
    """`receive`, which fails with 413 as soon as more than `limit` bytes came: a body without a true length is cut off there."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return counted


def _without_port(host: str) -> str:
    name, separator, port = host.lower().rpartition(":")
    return name if separator and port.isdecimal() else host.lower()


def _too_large(limit: int) -> str:
    return f"the body is larger than {limit} bytes; send less, or raise serve.max_upload_bytes"
