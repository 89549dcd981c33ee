"""Checks of the request itself, before routing: whom it is for, how large its body grows and how deep its JSON is
nested.
"""

from __future__ import annotations

import ipaddress
import re

import numpy as np
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving.api_keys import is_loopback
from htcl_ray.serving.responses import failure

MAX_JSON_BYTES = 1_000_000
MAX_JSON_DEPTH = 32
MULTIPART_OVERHEAD_BYTES = 64_000
"""Boundaries, part headers and option fields around an uploaded file."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")

_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[^\[\]:@/?#\s]+?)\.?(?::\d{1,5})?")
_UNMARKED = bytes(set(range(256)) - set(b'[]{}"'))


class Guard:
    """ASGI middleware. The Host check keeps a web page from reaching a loopback server through a name that it controls
    (DNS rebinding).
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        self._app = app
        self._any_host = "*" in settings.allowed_hosts
        self._any_address = not is_loopback(settings.host)  # a page cannot take one over as it can a name of its own
        self._hosts = {_plain(name.lower().rstrip(".")) for name in (*LOOPBACK, settings.host, *settings.allowed_hosts)}
        self._max_upload_bytes = settings.max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer 400 or 413."""
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
        if not scope["path"].startswith("/"):  # the absolute form, which only a proxy is asked in
            await failure(400, "the request names a whole address; expected a path that begins with /")(
                scope, receive, send
            )
            return
        is_upload = headers.get("content-type", "").lower().startswith("multipart/")
        limit = self._max_upload_bytes + MULTIPART_OVERHEAD_BYTES if is_upload else MAX_JSON_BYTES
        told = headers.get("content-length", "0")
        if told.isdecimal() and (len(told) > 18 or int(told) > limit):
            await failure(413, _too_large(limit))(scope, receive, send)
            return
        counted = _counting(receive, limit)
        await self._app(scope, counted if is_upload else _measuring_depth(counted), send)

    def _is_allowed(self, name: str) -> bool:
        return self._any_host or name in self._hosts or (self._any_address and _is_address(name))


def nesting(json: bytes) -> int:
    """Depth of the arrays and objects of a JSON text, without parsing it; what brackets inside strings say does not
    count.
    """
    if json.count(b"[") + json.count(b"{") <= MAX_JSON_DEPTH:
        return 0  # shallow enough whatever it is
    plain = json.replace(b"\\\\", b"").replace(b'\\"', b"")  # without escapes, every quote begins or ends a string
    marks = np.frombuffer(plain.translate(None, _UNMARKED), dtype=np.uint8)
    outside = np.cumsum(marks == ord('"'), dtype=np.int32) % 2 == 0
    opening, closing = (marks == ord("[")) | (marks == ord("{")), (marks == ord("]")) | (marks == ord("}"))
    steps = (opening & outside).astype(np.int8) - (closing & outside)
    return int(np.cumsum(steps, dtype=np.int32).max(initial=0))


def _counting(receive: Receive, limit: int) -> Receive:
    """`receive`, which fails with 413 as soon as more than `limit` bytes came: a body without a true length is cut off
    there.
    """
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise HTTPException(413, _too_large(limit))
        return message

    return counted


def _measuring_depth(receive: Receive) -> Receive:
    """`receive`, which fails with 400 in place of the end of a body whose JSON is nested too deep to be parsed
    safely.
    """
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
    """The host of a Host header as the allow-list has it: in lower case, without port, brackets or the root's dot;
    empty if malformed.
    """
    match = _HOST.fullmatch(host.lower())
    return _plain(match[1]) if match else ""


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    """An address in its one spelling, without brackets; anything else as it is."""
    try:
        return str(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name


def _too_large(limit: int) -> str:
    if limit == MAX_JSON_BYTES:
        return f"the body is larger than {limit} bytes, the most of one that is not multipart/form-data; send less"
    return f"the body is larger than {limit} bytes; send less, or raise serve.max_upload_bytes"
