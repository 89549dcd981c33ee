"""Checks before routing: Host header and origin, size of the body, and nesting depth of JSON."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

import numpy as np
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving.api_keys import is_loopback
from htcl_ray.serving.error_responses import failure

MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 32
MULTIPART_OVERHEAD_BYTES = 64_000
"""Allowance for boundaries, part headers and option fields around an uploaded file."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#\s]+?)\.?(?::\d{1,5})?")
_UNMARKED = bytes(set(range(256)) - set(b'[]{}"'))


class RequestChecks:
    """ASGI middleware: 400 for a Host header that is not allowed and for deep JSON, 413 for a large body.

    The Host check protects a loopback server from web pages that reach it through a name they control (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._any_host = "*" in settings.allowed_hosts
        self._any_address = not is_loopback(settings.host)  # DNS rebinding needs a name; an address is safe
        self._hosts = {_plain(name.lower().rstrip(".")) for name in (*LOOPBACK, settings.host, *settings.allowed_hosts)}
        self._max_upload_bytes = settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 400 or 413."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_allowed(_name(hosts[0])):
            named = ", ".join(hosts)[:200]
            message = (
                f"the Host header names '{named}', which this server does not go by; allow it with serve.allowed_hosts"
            )
            await failure(400, message, "unknown_host")(scope, receive, send)
            return
        if not scope["path"].startswith("/"):  # the absolute form of a request target, meant for proxies
            message = "the request names a whole address; expected a path that begins with /"
            await failure(400, message)(scope, receive, send)
            return
        is_upload = headers.get("content-type", "").lower().startswith("multipart/")
        limit = self._max_upload_bytes + MULTIPART_OVERHEAD_BYTES if is_upload else MAX_JSON_BYTES
        declared = headers.get("content-length", "0")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
            await failure(413, _too_large(limit))(scope, receive, send)
            return
        counted = _limit_size(receive, limit)
        await self._app(scope, counted if is_upload else _limit_depth(counted), send)

    def _is_allowed(self, name: str) -> bool:
        return self._any_host or name in self._hosts or (self._any_address and _is_address(name))


class CrossOrigin(CORSMiddleware):
    """ASGI middleware: let web pages of `origins` send requests with a key, never with cookies.

    A rejected preflight request has the JSON body of every error.
    """

    def __init__(self, app: ASGIApp, origins: Sequence[str]) -> None:
        super().__init__(
            app,
            allow_origins=origins,
            allow_methods=["GET", "HEAD", "POST", "PUT", "DELETE"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=["Retry-After"],
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Response of Starlette, or 400."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return failure(
            400, "a page of this origin may not call like this; allow it with serve.allowed_origins", "unknown_origin"
        )


def nesting(json: bytes) -> int:
    """Nesting depth of the arrays and objects of a JSON text, without parsing it; 0 where it is at most the limit.

    Brackets inside strings do not count.
    """
    if json.count(b"[") + json.count(b"{") <= MAX_JSON_DEPTH:
        return 0
    plain = json.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escapes, every quote begins or ends a string
    marks = np.frombuffer(plain.translate(None, _UNMARKED), dtype=np.uint8)
    outside = np.cumsum(marks == ord('"'), dtype=np.int32) % 2 == 0
    opening, closing = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    steps = (opening & outside).astype(np.int8) - (closing & outside)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _limit_size(receive: Receive, limit: int) -> Receive:
    """Wrap `receive` to raise HTTPException (413) once more than `limit` bytes arrived."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return counted


def _limit_depth(receive: Receive) -> Receive:
    """Wrap `receive` to raise HTTPException (400) at the end of a body whose JSON is too deep to be parsed safely."""
    body = bytearray()

    async def measured() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            body.extend(message.get("body", b""))
            if not message.get("more_body") and nesting(bytes(body)) > MAX_JSON_DEPTH:
                raise HTTPException(400, f"the JSON is nested deeper than {MAX_JSON_DEPTH} levels; send a flatter one")
        return message

    return measured


def _name(host: str) -> str:
    """Host of a Host header in lower case, without port, brackets and trailing dot; empty if it is malformed."""
    match = _HOST.fullmatch(host.lower())
    return _plain(match[1]) if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    """Canonical spelling of an address, without brackets; any other name unchanged."""
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name


def _too_large(limit: int) -> str:
    if limit == MAX_JSON_BYTES:
        return f"the body is larger than {limit} bytes, the most of one that is not multipart/form-data; send less"
    return f"the body is larger than {limit} bytes; send less, or raise serve.max_upload_bytes"
