"""What every answer carries: the one shape of failures, and the headers that keep browsers from misusing an answer."""

from __future__ import annotations

from fastapi.responses import JSONResponse
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from htcl_ray.serving.haproxy import HEADERS

CODES = {
    400: "bad_request",
    401: "unauthorised",
    404: "not_found",
    405: "method_not_allowed",
    408: "request_timeout",
    413: "too_large",
    415: "unsupported_media_type",
    416: "range_not_satisfiable",
    422: "invalid_request",
    429: "too_many_requests",
    503: "unavailable",
}


def failure(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """The response of a failure, {"error": {"code", "message"}}."""
    readable = message.encode(
        "utf-8", "backslashreplace"
    ).decode()  # a client's half of a surrogate pair cannot be sent back
    body = {"error": {"code": code or CODES.get(status, "error"), "message": readable}}
    return JSONResponse(body, status_code=status, headers={**HEADERS, **(headers or {})})


class AnswerHeaders:
    """ASGI middleware: gives every answer the headers above, unless its route set them."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
