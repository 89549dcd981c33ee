"""The failures that `/openapi.json` tells of each route."""

from __future__ import annotations

from typing import Any

from htcl_ray.api.responses import ErrorResponse

Responses = dict[int | str, dict[str, Any]]


def _failures(**descriptions: str) -> Responses:
    return {int(status[1:]): {"model": ErrorResponse, "description": text} for status, text in descriptions.items()}


EVERYWHERE = _failures(
    _400="Malformed body, or a Host that is not allowed",
    _401="An API key is needed, is not known, or lacks the scope",
    _408="The body did not arrive in time",
    _413="Body too large",
    _422="A value that cannot be used",
    _429="Too many requests; Retry-After tells when there may be more",
    _503="No answer now, or not in time; Retry-After tells when to try again",
)
NOT_FOUND = _failures(_404="No such song in the index")
JSON_ONLY = _failures(_415="The Content-Type of the body is not that of JSON")
UNSUPPORTED = _failures(
    _415="The Content-Type of the body is not one that the call takes, or the file is not audio that can be decoded"
)
WRITES = _failures(_401="No API key, or one without scope write")
NO_INDEX = _failures(_404="No such index in the workspace")
BUSY = _failures(_429="Another one is under way; Retry-After says when to try again")
NO_AUDIO = _failures(_404="No such song in the index, or its audio is not here or not to be played")
BYTES = {
    "audio/*": {"schema": {"type": "string", "format": "binary"}},
    "application/octet-stream": {"schema": {"type": "string"}},
}
AUDIO: Responses = {
    **NO_AUDIO,
    **_failures(_416="The range begins behind the end; Content-Range tells the size"),
    200: {"content": BYTES, "description": "The file's bytes"},
    206: {
        "content": BYTES,
        "description": "The bytes that the Range header asks for; of a range without an end, the first of them",
    },
    304: {"description": "The file is still that of If-None-Match"},
}
