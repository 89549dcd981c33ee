"""The body of a request: its Content-Type, and JSON inside something else, such as a field of a form or a parameter of
an address.
"""

from __future__ import annotations

from typing import Any, TypeVar

from fastapi import Depends
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

JSON, FORM, FIELDS = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
EXPECTED = {JSON: f"{JSON} for JSON (curl -H 'Content-Type: {JSON}')", FORM: f"{FORM} for a file (curl -F file=@NAME)"}
Model = TypeVar("Model", bound=BaseModel)


def content_type(request: Request) -> str:
    """Of the body, in lower case and without parameters; empty when the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the body is said to be JSON."""
    kind = content_type(request)
    return kind == JSON or (kind.startswith("application/") and kind.endswith("+json"))


def is_form(request: Request) -> bool:
    """Whether the body is said to be a form."""
    return content_type(request) in (FORM, FIELDS)


def has_body(request: Request) -> bool:
    """Whether a body comes with the request."""
    return request.headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in request.headers


def takes(*kinds: str) -> Any:
    """FastAPI dependency of a route whose body is of one of these types: HTTPException (415) for a body of another."""

    async def check(request: Request) -> None:
        if has_body(request) and content_type(request) not in kinds and not (JSON in kinds and is_json(request)):
            raise wrong_content_type(request, *(kind for kind in kinds if kind in EXPECTED))

    return Depends(check)


def wrong_content_type(request: Request, *expected: str) -> HTTPException:
    """415 that names what was sent, or not, and what was expected: JSON, FORM or both."""
    sent = content_type(request)
    named = (
        f"the Content-Type of the body is '{sent[:100]}'" if sent else "the request names no Content-Type of its body"
    )
    return HTTPException(415, f"{named}; expected {' or '.join(EXPECTED[kind] for kind in expected)}")


def parse_part(model: type[Model], text: str | bytes | None, *place: str) -> Model | None:
    """The text as that model; None stays None. Raises RequestValidationError that names `place`, as if it had been part
    of the body.
    """
    if text is None:
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise RequestValidationError([{**problem, "loc": (*place, *problem["loc"])} for problem in problems]) from None
