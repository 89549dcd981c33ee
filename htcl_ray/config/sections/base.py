"""Base class of configuration sections: typed, frozen, unknown keys are errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from htcl_ray.workspace.credentials import tree_without_credentials


def one_or_many(value: Any) -> Any:
    """Wrap a string in a list; return anything else unchanged."""
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]
"""One string or a list of strings."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Seed of a random number generator: 32 bits, the limit of torch on a CPU and of scikit-learn."""


class Settings(BaseModel):
    """Base of every section: frozen, numbers are finite, unknown keys are errors.

    JSON, YAML and text forms (`model_dump(mode="json")`, `repr`) are without the credentials of URIs; attributes and
    `model_dump()` include them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        tree = serialize(self)
        return tree_without_credentials(tree) if info.mode == "json" else tree

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """The fields as `repr` and `str` show them, without credentials."""
        return (
            (name, value if isinstance(value, BaseModel) else tree_without_credentials(value))
            for name, value in super().__repr_args__()
        )


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return the hint for an unknown name: the most similar valid name, or all names when none is similar."""
    choices = list(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"expected one of {', '.join(choices)}"
