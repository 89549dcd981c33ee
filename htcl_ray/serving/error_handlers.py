"""Which HTTP status every error is answered with."""

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
from htcl_ray.serving.haproxy import RETRY
from htcl_ray.serving.json_body import is_form
from htcl_ray.serving.responses import failure

METHODS = ("DELETE", "GET", "POST", "PUT")
FOLDERS = re.compile(r"(?:\b[a-z][a-z0-9+.-]*:/*|(?<![\w./<]))/(?=[^\s/])(?:[^\s/'\"]*/)*", re.IGNORECASE)
"""The folders of an absolute path or URI, up to its last name."""
NOT_AN_OBJECT = ("dict_type", "model_attributes_type", "model_type")
"""Pydantic's types of error for a value that is no JSON object; their messages name classes of Python."""
STATUS = {
    SongNotFoundError: (404, "song_not_found"),
    AudioNotFoundError: (404, "audio_not_found"),
    QueryError: (422, "invalid_query"),
    IndexNotFoundError: (404, "index_not_found"),
    IndexRefusedError: (422, "index_refused"),
}
"""Status and code of our own errors; the first class that fits counts. AudioError depends on its reason."""
AUDIO_STATUS = {
    Reason.TOO_SHORT: 422,
    Reason.NOT_FINITE: 422,
    Reason.TOO_MANY_CHANNELS: 422,
    Reason.SAMPLE_RATE_TOO_HIGH: 422,
    Reason.TOO_LONG: 413,
}
"""Of sound that can be decoded and is refused all the same; what cannot be decoded, or ends or stalls the decoder, is
415."""


def install(app: FastAPI) -> None:
    """Answer every failure of `app` in the one shape."""
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(HtclError, _ours)
    app.add_exception_handler(RayError, _remote)
    app.add_exception_handler(BackPressureError, _full)
    app.add_exception_handler(RayServeException, _unavailable)
    app.add_exception_handler(TimeoutError, _unavailable)
    app.add_exception_handler(Exception, _unexpected)


def _invalid(request: Request, error: Any) -> JSONResponse:
    problems: Sequence[Any] = error.errors()
    fault = first_fault(error)
    kind, message = fault.kind, fault.message
    where, *names = fault.path
    in_form = where == "body" and is_form(request)
    if kind == "json_invalid":
        parameter = {"body": "form field", "query": "parameter"}[where]
        part = f"the {parameter} {names[0]}" if in_form or where != "body" else "the body"
        return failure(
            400,
            f"{part} is not JSON: {problems[0].get('ctx', {}).get('error', 'it cannot be parsed')}",
            "malformed_json",
        )
    if in_form and names == ["file"]:  # missing, or a field without the name of a file
        return failure(
            422,
            "the form has no file 'file'; expected a part of this name that has a file name, as curl -F file=@NAME sends it",
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
        return failure(404, f"there is no {request.method} {request.url.path}; /openapi.json lists what there is")
    return failure(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _methods(request: Request) -> list[str]:
    """What the address takes, over all its routes; Starlette looks at the first one only."""
    asked = ({**request.scope, "method": method} for method in METHODS)
    return [
        scope["method"] for scope in asked if any(route.matches(scope)[0] == Match.FULL for route in request.app.routes)
    ]


def without_folders(text: str) -> str:
    """The text with only the last name of every absolute path and URI: no response shows where the server keeps its
    files.
    """
    return FOLDERS.sub("", text)


def _ours(request: Request, error: Any) -> JSONResponse:
    if isinstance(error, AudioError):
        return failure(
            AUDIO_STATUS.get(error.reason, 415),
            f"the audio cannot be used: {without_folders(error.detail)}",
            str(error.reason),
        )
    for kind, (status, code) in STATUS.items():
        if isinstance(error, kind):
            echoes = isinstance(error, QueryError)  # of what the client sent, in which nothing is secret
            return failure(status, str(error) if echoes else without_folders(str(error)), code)
    return failure(500, "the request failed inside the application; its log says why", "internal")


def _remote(request: Request, error: Any) -> JSONResponse:
    """An error that happened in another replica: our own ones keep their meaning, anything else means that it cannot
    answer now.
    """
    cause = getattr(error, "cause", None)
    return _ours(request, cause) if isinstance(cause, HtclError) else _unavailable(request, error)


def _full(request: Request, error: Any) -> JSONResponse:
    return failure(429, "every encoder has as many requests waiting as it may; try again", "overloaded", RETRY)


def _unavailable(request: Request, error: Any) -> JSONResponse:
    return failure(503, "the encoder cannot answer now; try again", headers=RETRY)


def _unexpected(request: Request, error: Any) -> JSONResponse:
    return failure(500, "the request failed inside the application; its log says why", "internal")
