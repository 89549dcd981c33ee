"""Admission control: a rate limit for each client, a limit of requests in progress (load shedding), and deadlines."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.serving.error_responses import failure
from htcl_ray.serving.haproxy import ARRIVAL_SECONDS, BUFFERED_BYTES, PROBES, RETRY, UPLOADS_PER_REQUEST
from htcl_ray.serving.middleware.client_address import client_of

MAX_BUCKETS = 10_000


class TokenBuckets:
    """A token bucket for each client: `burst` tokens, refilled with `rate` tokens a second.

    Keeps the buckets of the `size` most recent clients; a forgotten client starts with a full bucket.
    """

    def __init__(
        self, rate: float, burst: int, size: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 1 / rate
        self._burst = burst
        self._size = size
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """Time at which each client's bucket is full again, which is the whole state of a bucket."""

    def take(self, client: str) -> float:
        """Take a token and return 0; from an empty bucket, return the seconds until its next token."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + self._interval
        missing = full_at - now - self._burst * self._interval
        if missing > 1e-9:
            return missing
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        while len(self._full_at) > self._size:
            self._full_at.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)


class RateLimit:
    """ASGI middleware: 429 with Retry-After for a client whose token bucket is empty.

    Belongs behind `ClientAddress` and `Authentication`, which identify the client.
    """

    def __init__(self, app: ASGIApp, buckets: TokenBuckets) -> None:
        self._app = app
        self._buckets = buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 429."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            wait = self._buckets.take(client_of(scope))
            if wait:
                seconds = math.ceil(wait)
                response = failure(
                    429, f"too many requests; try again in {seconds} s", "rate_limited", {"Retry-After": str(seconds)}
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class DrainBody:
    """ASGI middleware: hold back a response that starts before the body has arrived until the body was read.

    Otherwise the server closes the connection while the client still sends, and the client sees a reset in place of the
    response. A body larger than `max_bytes` is not drained, and draining takes at most `ARRIVAL_SECONDS`.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        unread = not (declared.isdecimal() and int(declared[:18]) > self._max_bytes)
        received = 0

        async def observed() -> Message:
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
                            await observed()
                except TimeoutError:
                    unread = False
            await send(message)

        await self._app(scope, observed, respond)


class Admission:
    """ASGI middleware: 429 beyond `max_requests` in progress, 408 for a slow body, 503 for slow work.

    A request is in progress once its body has arrived, so that a client that stalls takes no place from others. Larger
    bodies in transit have limits of their own: `UPLOADS_PER_REQUEST` times `max_requests` in all, and `max_requests` of
    one client. A body has `receive_seconds` to arrive, and the response `seconds` from then on. Beyond that, work that
    runs in a thread still runs to its end there, and a response that has started is cut off.
    """

    def __init__(self, app: ASGIApp, max_requests: int, seconds: float, receive_seconds: float) -> None:
        self._app = app
        self._max_requests = max_requests
        self._seconds = seconds
        self._receive_seconds = receive_seconds
        self._in_progress = 0
        self._in_transit: Counter[str] = Counter()
        """Number of larger bodies of each client that are arriving."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 408, 413, 429 or 503."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        try:
            body = await self._received_body(scope, receive) if _has_body(scope) else deque()
        except HTTPException as error:  # also of RequestChecks, which count the bytes
            await failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))(scope, receive, send)
            return
        if self._in_progress >= self._max_requests:
            message = f"{self._max_requests} requests are in progress, the most that this replica takes; try again"
            await failure(429, message, "overloaded", RETRY)(scope, receive, send)
            return

        async def replayed() -> Message:
            return body.popleft() if body else await receive()

        self._in_progress += 1
        try:
            await self._within_deadline(scope, replayed, send)
        finally:
            self._in_progress -= 1

    async def _received_body(self, scope: Scope, receive: Receive) -> deque[Message]:
        """Messages of the body. Raises HTTPException."""
        client = client_of(scope)
        large = _is_large(scope)
        if large and (
            self._in_transit[client] >= self._max_requests
            or self._in_transit.total() >= UPLOADS_PER_REQUEST * self._max_requests
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
                self._in_transit += Counter()  # drops the clients whose number is 0

    async def _within_deadline(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def observed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            async with asyncio.timeout(self._seconds) as deadline:
                await self._app(scope, receive, observed)
        except TimeoutError:
            if started or not deadline.expired():
                raise
            message = f"the request took longer than {self._seconds:g} s (serve.request_seconds); try again"
            await failure(503, message, "deadline_exceeded", RETRY)(scope, receive, send)


def _has_body(scope: Scope) -> bool:
    headers = Headers(scope=scope)
    return headers.get("content-length", "0") != "0" or "transfer-encoding" in headers


def _is_large(scope: Scope) -> bool:
    """Whether HAProxy, where it is used, hands the request on before its whole body has arrived."""
    length = Headers(scope=scope).get("content-length", "")
    return not (length.isdecimal() and int(length[:18]) <= BUFFERED_BYTES)
