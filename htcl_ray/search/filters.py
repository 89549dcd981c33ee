"""Which songs a search may return: conditions on their metadata."""

from __future__ import annotations

from typing import Annotated, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from htcl_ray.catalog.artists import credits_of_cells
from htcl_ray.config.sections import nearest

MAX_VALUES = 1_000


def _expecting(what: str) -> WrapValidator:
    """One sentence in place of one for each form that a value may have."""

    def validated(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {what}") from None

    return WrapValidator(validated)


Word = Annotated[str, Field(min_length=1, max_length=1_000)]
Words = Annotated[
    Word | Annotated[list[Word], Field(min_length=1, max_length=MAX_VALUES)],
    _expecting("a text, or a list of 1 to 1000"),
]
Year = Annotated[int, Field(ge=-10_000, le=10_000)]


class YearRange(BaseModel):
    """Years from `gte` to `lte`, both included."""

    model_config = ConfigDict(extra="forbid")

    gte: Year | None = Field(None, description="The first year.")
    lte: Year | None = Field(None, description="The last year.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gte is None and self.lte is None:
            raise ValueError("expected gte, lte or both")
        return self


Years = Annotated[
    Year | Annotated[list[Year], Field(min_length=1, max_length=MAX_VALUES)] | YearRange,
    _expecting('a year, a list of 1 to 1000 years, or a range {"gte": YEAR, "lte": YEAR} with one or both of them'),
]


class Filter(BaseModel):
    """Conditions that all must hold; of several values in one of them, any.

    Upper and lower case are the same, and a song that lacks a value does not have it.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"genre": ["rock"], "year": {"gte": 1990, "lte": 1999}}]},
    )

    song_id: Words | None = Field(None, description="Exactly these songs, in upper and lower case as they are.")
    title: Words | None = None
    artist: Words | None = Field(None, description="One of the credited artists.")
    album: Words | None = None
    licence: Words | None = None
    genre: Words | None = Field(None, description="One of the song's genres.")
    mood: Words | None = Field(None, description="One of its moods.")
    tags: Words | None = Field(None, description="One of its tags.")
    language: Words | None = Field(None, description="One of its languages.")
    year: Years | None = Field(None, description="A year, several, or a range.")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(
                    f"there is no column '{str(name)[:100]}' to filter by; {nearest(str(name)[:100], cls.model_fields)}"
                )
        return value


def allowed_rows(songs: pa.Table, conditions: Filter) -> NDArray[np.bool_]:
    """One entry per row of `songs`, a table of `schemas.INDEX_SONGS`: whether all conditions hold."""
    allowed = np.ones(songs.num_rows, dtype=bool)
    for name, wanted in conditions:
        if wanted is not None:
            column = songs[name].combine_chunks() if isinstance(songs[name], pa.ChunkedArray) else songs[name]
            allowed &= _holds(name, column, wanted)
    return allowed


def _holds(name: str, column: pa.Array, wanted: Any) -> NDArray[np.bool_]:
    if isinstance(wanted, YearRange):
        low, high = (pa.scalar(year, pa.int32()) if year is not None else None for year in (wanted.gte, wanted.lte))
        bounds = [pc.greater_equal(column, low)] if low is not None else []
        bounds += [pc.less_equal(column, high)] if high is not None else []
        return np.logical_and.reduce([_plain(bound) for bound in bounds])
    values = wanted if isinstance(wanted, list) else [wanted]
    if name == "year":
        return _plain(pc.is_in(column, value_set=pa.array(values, pa.int32())))
    if name == "song_id":
        return _plain(pc.is_in(column, value_set=pa.array(values, pa.string())))
    folded = pc.utf8_lower(pa.array(values, pa.string()))
    if name == "artist":
        coded, wanted = column.dictionary_encode(), set(folded.to_pylist())
        credited = zip(pc.utf8_lower(coded.dictionary).to_pylist(), credits_of_cells(coded.dictionary), strict=True)
        return _plain(
            pa.array([not wanted.isdisjoint((cell, *names)) for cell, names in credited], pa.bool_()).take(
                coded.indices
            )
        )
    if not pa.types.is_list(column.type):
        return _plain(pc.is_in(pc.utf8_lower(column), value_set=folded))
    found = _plain(pc.is_in(pc.utf8_lower(pc.list_flatten(column)), value_set=folded))
    holds = np.zeros(len(column), dtype=bool)
    holds[pc.list_parent_indices(column).to_numpy()[found]] = True
    return holds


def _plain(mask: pa.Array) -> NDArray[np.bool_]:
    """Without nulls: what is not known does not hold."""
    return pc.fill_null(mask, False).to_numpy(zero_copy_only=False)
