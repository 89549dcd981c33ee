"""Error responses: HTTP status, code and message of every error in one JSON form, and their OpenAPI descriptions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import Match

from htcl_ray.api.responses import ErrorResponse
from htcl_ray.errors import (
    AudioError,
    AudioNotFoundError,
    HtclError,
    IndexNotFoundError,
    IndexRefusedError,
    QueryError,
    SongNotFoundError,
    first_fault,
)
from htcl_ray.schemas import Reason
from htcl_ray.serving.haproxy import HEADERS, RETRY
from htcl_ray.serving.request_body import is_form

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
"""Default code of each status."""
STATUS = {
    SongNotFoundError: (404, "song_not_found"),
    AudioNotFoundError: (404, "audio_not_found"),
    QueryError: (422, "invalid_query"),
    IndexNotFoundError: (404, "index_not_found"),
    IndexRefusedError: (422, "index_refused"),
}
"""Status and code of this package's errors; the first matching class counts. AudioError depends on its reason."""
AUDIO_STATUS = {
    Reason.TOO_SHORT: 422,
    Reason.NOT_FINITE: 422,
    Reason.TOO_MANY_CHANNELS: 422,
    Reason.SAMPLE_RATE_TOO_HIGH: 422,
    Reason.TOO_LONG: 413,
}
"""Status for audio that is decodable but not accepted. Every other reason, such as a decoder that crashed, is 415."""
METHODS = ("DELETE", "GET", "POST", "PUT")
FOLDERS = re.compile(r"(?:\b[a-z][a-z0-9+.-]*:/*|(?<![\w./<]))/(?=[^\s/])(?:[^\s/'\"]*/)*", re.IGNORECASE)
"""The folders of an absolute path or URI, up to its last name."""
NOT_AN_OBJECT = ("dict_type", "model_attributes_type", "model_type")
"""Pydantic's error types for a value that is not a JSON object; their messages name Python classes."""

Responses = dict[int | str, dict[str, Any]]


def _described(**descriptions: str) -> Responses:
    return {int(status[1:]): {"model": ErrorResponse, "description": text} for status, text in descriptions.items()}


EVERYWHERE = _described(
    _400="The body is malformed, or the Host header is not allowed.",
    _401="The API key is missing, unknown, or lacks the required scope.",
    _408="The body did not arrive in time.",
    _413="The body is too large.",
    _422="A value of the request is invalid.",
    _429="Too many requests. Retry-After gives the seconds to wait.",
    _503="The service is unavailable, or the request exceeded its deadline. Retry-After gives the seconds to wait.",
)
"""OpenAPI descriptions of the errors that every route can return; those below are added by some routes."""
NOT_FOUND = _described(_404="The index has no such song.")
JSON_ONLY = _described(_415="The Content-Type of the body is not that of JSON.")
UNSUPPORTED = _described(
    _415="The route does not accept the Content-Type of the body, or the file is not audio that can be decoded."
)
WRITES = _described(_401="The API key is missing, unknown, or lacks the scope write.")
NO_INDEX = _described(_404="The workspace has no such index.")
BUSY = _described(_429="Another index is being loaded. Retry-After gives the seconds to wait.")
NO_AUDIO = _described(
    _404="The index has no such song, or its audio file is missing, or this server does not play audio."
)
BYTES = {
    "audio/*": {"schema": {"type": "string", "format": "binary"}},
    "application/octet-stream": {"schema": {"type": "string"}},
}
AUDIO: Responses = {
    **NO_AUDIO,
    **_described(_416="The range begins after the end of the file. Content-Range gives the size."),
    200: {"content": BYTES, "description": "The whole file."},
    206: {
        "content": BYTES,
        "description": "The bytes of the Range header; for a range without an end, at most the first 1 MiB of it.",
    },
    304: {"description": "The file still matches If-None-Match."},
}


def failure(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
    """Error response with the body `{"error": {"code", "message"}}`; `code` defaults to that of the status."""
    # A client may have sent half of a surrogate pair, which UTF-8 cannot encode.
    readable = message.encode("utf-8", "backslashreplace").decode()
    body = {"error": {"code": code or CODES.get(status, "error"), "message": readable}}
    return JSONResponse(body, status_code=status, headers={**HEADERS, **(headers or {})})


def install(app: FastAPI) -> None:
    """Register the handlers that turn every error of `app` into an error response."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(HtclError, _package_error)
    app.add_exception_handler(RayError, _remote)
    app.add_exception_handler(BackPressureError, _full)
    app.add_exception_handler(RayServeException, _unavailable)
    app.add_exception_handler(TimeoutError, _unavailable)
    app.add_exception_handler(Exception, _unexpected)


def without_folders(text: str) -> str:
    """The text with absolute paths and URIs cut to their last name, so that no response shows the server's folders."""
    return FOLDERS.sub("", text)


def _invalid(request: Request, error: Any) -> JSONResponse:
    problems: Sequence[Any] = error.errors()
    fault = first_fault(error)
    kind, message = fault.kind, fault.message
    where, *names = fault.path
    in_form = where == "body" and is_form(request)
    if kind == "json_invalid":
        parameter = {"body": "form field", "query": "parameter"}[where]
        part = f"the {parameter} {names[0]}" if in_form or where != "body" else "the body"
        reason = problems[0].get("ctx", {}).get("error", "it cannot be parsed")
        return failure(400, f"{part} is not JSON: {reason}", "malformed_json")
    if in_form and names == ["file"]:  # missing, or a field without a file name
        return failure(
            422,
            "the form has no file 'file'; expected a part of this name that has a file name, as curl -F file=@NAME "
            "sends it",
        )
    if kind in NOT_AN_OBJECT:
        message = "expected a JSON object"
    place = f"form field {'.'.join(names)}" if in_form else ".".join((where, *names))
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return failure(422, f"{place}: {message}{more}")


def _http(request: Request, error: Any) -> JSONResponse:
    if error.status_code == 405:
        allowed = ", ".join("GET, HEAD" if method == "GET" else method for method in _methods(request))
        return failure(
            405, f"{request.url.path} does not take {request.method}; it takes {allowed}", headers={"Allow": allowed}
        )
    if error.status_code == 404:
        return failure(404, f"this server has no {request.method} {request.url.path}; /openapi.json lists its routes")
    return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _methods(request: Request) -> list[str]:
    """Methods of the path over all routes; Starlette considers the first matching route only."""
    scopes = ({**request.scope, "method": method} for method in METHODS)
    return [
        scope["method"]
        for scope in scopes
        if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)
    ]


def _package_error(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, AudioError):
        return failure(
            AUDIO_STATUS.get(error.reason, 415),
            f"the audio cannot be used: {without_folders(error.detail)}",
            str(error.reason),
        )
    for kind, (status, code) in STATUS.items():
        if isinstance(error, kind):
            echoes = isinstance(error, QueryError)  # repeats values of the request, which are no secret
            return failure(status, str(error) if echoes else without_folders(str(error)), code)
    return _unexpected(request, error)


def _remote(request: Request, error: Any) -> JSONResponse:
    """Error of another replica: one of this package keeps its status, any other means an unavailable encoder."""
    cause = getattr(error, "cause", None)
    return _package_error(request, cause) if isinstance(cause, HtclError) else _unavailable(request, error)


def _full(request: Request, error: Any) -> JSONResponse:
    return failure(429, "every encoder has as many requests waiting as it may; try again", "overloaded", RETRY)


def _unavailable(request: Request, error: Any) -> JSONResponse:
    return failure(503, "the encoder cannot respond now; try again", headers=RETRY)


def _unexpected(request: Request, error: Any) -> JSONResponse:
    return failure(500, "the request failed inside the application; its log says why", "internal")
