"""Web pages of other origins that may call (CORS)."""

from __future__ import annotations

from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from htcl_ray.serving.responses import failure


class CrossOrigin(CORSMiddleware):
    """ASGI middleware: lets pages of `origins` call with a key, never with cookies; a refused preflight has the one
    shape of failures.
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
        """Starlette's, or 400."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        return failure(
            400, "a page of this origin may not call like this; allow it with serve.allowed_origins", "unknown_origin"
        )
