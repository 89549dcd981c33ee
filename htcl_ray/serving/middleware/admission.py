"""How many requests are in progress, for how long, and when a request counts as one: once its body has arrived."""

from __future__ import annotations

import asyncio
from collections import Counter, deque

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.serving.haproxy import ARRIVAL_SECONDS, BUFFERED_BYTES, PROBES, RETRY, UPLOADS_PER_REQUEST
from htcl_ray.serving.middleware.rate_limit import client_of
from htcl_ray.serving.responses import failure


class ReadToEnd:
    """ASGI middleware: a response that comes before the end of the body waits until the body was read.

    Otherwise the connection is closed while the client still sends, and it sees a reset in place of the response. A
    body that is larger than `max_bytes`, or takes longer than `ARRIVAL_SECONDS` from then on, is not read.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        unread = not (declared.isdecimal() and int(declared[:18]) > self._max_bytes)
        received = 0

        async def watched() -> Message:
            nonlocal unread, received
            message = await receive()
            received += len(message.get("body", b""))
            if not message.get("more_body") or received > self._max_bytes:
                unread = False
            return message

        async def respond(message: Message) -> None:
            nonlocal unread
            if message["type"] == "http.response.start" and unread:
                try:
                    async with asyncio.timeout(ARRIVAL_SECONDS):
                        while unread:
                            await watched()
                except TimeoutError:
                    unread = False
            await send(message)

        await self._app(scope, watched, respond)


class Admission:
    """ASGI middleware: 429 beyond `most` requests in progress, 408 for a body that arrives too slowly, 503 for work
    that takes too long.

    A request is in progress once its body has arrived, so that clients that stall take no place from others. Larger
    bodies in transit have limits of their own: `UPLOADS_PER_REQUEST` times `most` in all, and `most` of one client.
    `receive_seconds` counts until a body has arrived, `seconds` from then on: work that runs in a thread then runs to
    its end there, and a response that has begun is cut off.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float, receive_seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds
        self._receive_seconds = receive_seconds
        self._inside = 0
        self._in_transit: Counter[str] = Counter()
        """Larger bodies of each client that are arriving."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or respond with 408, 413, 429 or 503."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._arrived(scope, receive) if _has_body(scope) else deque()
        except HTTPException as error:  # of the guard, which counts the bytes
            await failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))(scope, receive, send)
            return
        if self._inside >= self._most:
            message = f"{self._most} requests are in progress, the most that this replica takes; try again"
            await failure(429, message, "overloaded", RETRY)(scope, receive, send)
            return

        async def replayed() -> Message:
            return body.popleft() if body else await receive()

        self._inside += 1
        try:
            await self._within_deadline(scope, replayed, send)
        finally:
            self._inside -= 1

    async def _arrived(self, scope: Scope, receive: Receive) -> deque[Message]:
        """The messages of the body. Raises HTTPException."""
        client = client_of(scope)
        large = _is_large(scope)
        if large and (
            self._in_transit[client] >= self._most or self._in_transit.total() >= UPLOADS_PER_REQUEST * self._most
        ):
            raise HTTPException(429, "too many uploads are in transit; try again", RETRY)
        if large:
            self._in_transit[client] += 1
        try:
            async with asyncio.timeout(self._receive_seconds):
                messages = deque([await receive()])
                while messages[-1].get("more_body"):
                    messages.append(await receive())
                return messages
        except TimeoutError:
            message = f"the body did not arrive within {self._receive_seconds:g} s (serve.receive_seconds)"
            raise HTTPException(408, message, {"Connection": "close"}) from None
        finally:
            if large:
                self._in_transit[client] -= 1
                self._in_transit += Counter()  # drops clients without any

    async def _within_deadline(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as deadline:
                await self._app(scope, receive, watched)
        except TimeoutError:
            if begun or not deadline.expired():
                raise
            message = f"the request took longer than {self._seconds:g} s (serve.request_seconds); try again"
            await failure(503, message, "deadline_exceeded", RETRY)(scope, receive, send)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _is_large(scope: Scope) -> bool:
    """Whether HAProxy, when it is in front, hands the request on before its body has arrived."""
    length = Headers(scope=scope).get("content-length", "")
    return not (length.isdecimal() and int(length[:18]) <= BUFFERED_BYTES)
