"""What every section of a configuration is: typed, frozen, and an unknown key is an error."""

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
    """A string as a list of one."""
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(one_or_many)]
"""One string or a list of strings."""
Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""Of random numbers; 32 bits, because torch on a CPU and scikit-learn take no more."""


class Settings(BaseModel):
    """Base of every section: frozen, numbers are finite, and an unknown key is an error.

    As JSON, YAML and text (`model_dump(mode="json")`, `repr`) the credentials of its URIs are left out; attributes and
    `model_dump()` have them.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False, hide_input_in_errors=True
    )

    @model_serializer(mode="wrap")
    def _serialize(self, serialize: SerializerFunctionWrapHandler, info: SerializationInfo) -> Any:
        tree = serialize(self)
        return tree_without_credentials(tree) if info.mode == "json" else tree

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """For `repr` and `str`."""
        return (
            (name, value if isinstance(value, BaseModel) else tree_without_credentials(value))
            for name, value in super().__repr_args__()
        )


def nearest(name: str, choices: Iterable[str]) -> str:
    """The hint of an error about an unknown name: the nearest valid one, or all of them when none is near."""
    choices = list(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"expected one of {', '.join(choices)}"
