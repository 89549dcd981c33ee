"""What is told of every request: a line in the log with its id, which Ray Serve gives and returns, and its time in the
metrics.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from htcl_ray.serving.prometheus import IngressMeasurements

REQUEST_ID = "x-request-id"
LONGEST_ID = 128
UNKNOWN = "other"
"""Stands for every address that no route has, so that visitors cannot make labels."""
log = logging.getLogger("ray.serve.htcl")
"""A child of Ray Serve's logger, whose handlers write a file of JSON lines for each replica."""


class Observed:
    """ASGI middleware, the outermost, so that what the others refuse is seen as well."""

    def __init__(self, app: ASGIApp, measurements: IngressMeasurements | None = None) -> None:
        self._app = app
        self._measurements = measurements

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID, "")[:LONGEST_ID]  # the client's own, if it sent one
        status = 499  # the client went away before there was an answer
        started = time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._count(1)
        try:
            await self._app(scope, receive, noted)
        finally:
            self._count(-1)
            self._tell(scope, request_id, status, time.perf_counter() - started)

    def _count(self, step: int) -> None:
        if self._measurements is not None:
            self._measurements.under_way += step

    def _tell(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        endpoint = f"{scope['method']} {route}" if route else UNKNOWN
        if self._measurements is not None:
            self._measurements.request(endpoint, status, seconds)
        key = (scope.get("state") or {}).get("key")
        log.info(
            "request",
            extra={
                "http_request_id": request_id,
                "endpoint": endpoint,
                "status": status,
                "milliseconds": round(1000 * seconds, 2),
                "key": getattr(key, "name", None),
            },
        )
