"""Request bodies: their Content-Type, JSON in a form field or query parameter, and uploaded files."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from fastapi import Depends, File, UploadFile
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request

from htcl_ray.config.sections import ServeSettings

JSON, FORM, FIELDS = "application/json", "multipart/form-data", "application/x-www-form-urlencoded"
EXPECTED = {JSON: f"{JSON} for JSON (curl -H 'Content-Type: {JSON}')", FORM: f"{FORM} for a file (curl -F file=@NAME)"}
AUDIO_UPLOAD = File(description="An audio file, such as WAV, FLAC, MP3 or Ogg.")
AudioUpload = Annotated[UploadFile, AUDIO_UPLOAD]
OptionalAudioUpload = Annotated[UploadFile | None, AUDIO_UPLOAD]
Model = TypeVar("Model", bound=BaseModel)


def content_type(request: Request) -> str:
    """Media type of the body in lower case and without parameters; empty when the request names none."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def is_json(request: Request) -> bool:
    """Whether the Content-Type of the body is JSON."""
    kind = content_type(request)
    return kind == JSON or (kind.startswith("application/") and kind.endswith("+json"))


def is_form(request: Request) -> bool:
    """Whether the Content-Type of the body is that of a form."""
    return content_type(request) in (FORM, FIELDS)


def has_body(request: Request) -> bool:
    """Whether the request has a body."""
    return request.headers.get("content-length", "0").strip() != "0" or "transfer-encoding" in request.headers


def takes(*kinds: str) -> Any:
    """FastAPI dependency that raises HTTPException (415) for a body whose media type is not one of `kinds`."""

    async def check(request: Request) -> None:
        if has_body(request) and content_type(request) not in kinds and not (JSON in kinds and is_json(request)):
            raise wrong_content_type(request, *(kind for kind in kinds if kind in EXPECTED))

    return Depends(check)


def wrong_content_type(request: Request, *expected: str) -> HTTPException:
    """415 that names the Content-Type of the request and the expected ones: JSON, FORM or both."""
    sent = content_type(request)
    named = (
        f"the Content-Type of the body is '{sent[:100]}'" if sent else "the request names no Content-Type of its body"
    )
    return HTTPException(415, f"{named}; expected {' or '.join(EXPECTED[kind] for kind in expected)}")


def parse_part(model: type[Model], text: str | bytes | None, *place: str) -> Model | None:
    """Parse JSON text as `model`; None stays None.

    Raises RequestValidationError with the location `place`, as FastAPI does for a part of the body.
    """
    if text is None:
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise RequestValidationError([{**problem, "loc": (*place, *problem["loc"])} for problem in problems]) from None


async def read_upload(file: UploadFile, settings: ServeSettings) -> bytes:
    """Bytes of an uploaded file. Raises HTTPException (413) beyond `serve.max_upload_bytes`."""
    if file.size is None or file.size > settings.max_upload_bytes:
        raise HTTPException(
            413, f"the file is larger than {settings.max_upload_bytes} bytes; send a shorter part of it"
        )
    return await file.read()
