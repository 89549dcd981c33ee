"""How many requests are worked on at a time, and for how long: what is more is answered at once, so that no queue grows."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.serving.answers import failure
from htcl_ray.serving.rate_limit import PROBES

RETRY = {"Retry-After": "1"}


class Admission:
    """ASGI middleware: 429 for more than `most` requests at a time, and 503 for one that is not answered within `seconds`.

    The deadline counts everything, also a client that sends its body slowly. At the deadline the work is cancelled; what already runs in a
    thread runs to its end there. An answer that has begun is cut off, because its status cannot be taken back.
    """

    def __init__(self, app: ASGIApp, most: int, seconds: float) -> None:
        self._app = app
        self._most = most
        self._seconds = seconds
        self._inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 429 or 503."""
        if scope["type"] != "http" or scope["path"] in PROBES:
            await self._app(scope, receive, send)
            return
        if self._inside >= self._most:
            message = f"{self._most} requests are being worked on, which is all that this replica takes; try again"
            await failure(429, message, "overloaded", RETRY)(scope, receive, send)
            return
        self._inside += 1
        try:
            await self._within_deadline(scope, receive, send)
        finally:
            self._inside -= 1

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
            message = f"the request was not answered within {self._seconds:g} s (serve.request_seconds); try again"
            await failure(503, message, "deadline_exceeded", RETRY)(scope, receive, send)
