"""JSON that comes inside something else: a field of a form, a parameter of an address."""

from __future__ import annotations

from typing import TypeVar

from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def parse_part(model: type[Model], text: str | bytes | None, *place: str) -> Model | None:
    """The text as that model; None stays None. Raises RequestValidationError that names `place`, as if it had been part of the body."""
    if text is None:
        return None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        raise RequestValidationError([{**problem, "loc": (*place, *problem["loc"])} for problem in problems]) from None
