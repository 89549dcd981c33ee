"""Requests of the HTTP API, as typed models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    create_model,
    model_validator,
)

from htcl_ray.config.sections import nearest
from htcl_ray.schemas import METADATA_COLUMNS, MetadataColumn

DEFAULT_K = 10
MAX_K = 1_000
MAX_TEXT_LENGTH = 10_000
MAX_SEEDS = 1_000
MAX_HISTORY = 10_000
MAX_VALUES = 1_000
MAX_WEIGHT = 1e6
MAX_WIDTH = 100_000
"""Most numbers of a given vector."""
HALF_LIFE_DAYS = 30.0
LATEST = 253_402_300_799
"""Largest timestamp, the end of the year 9999."""

K = Annotated[int, Field(ge=1, le=MAX_K, description="Number of songs to return.")]
Blend = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Weight of the preference score: 0 ranks by meaning, 1 by listeners' preference. Default 0.5, or 0 "
        "when the index has no preference vectors.",
    ),
]
MaxPerArtist = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_K,
        description="Maximum number of songs by one artist. Songs without an artist are not limited.",
    ),
]
Collapse = Annotated[
    bool,
    Field(
        description="Return only the best of several duplicate recordings, and no duplicate of a song of the query. "
        "Preprocessing detects duplicate recordings."
    ),
]
HalfLife = Annotated[
    float,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="Days after which a play counts half as much."),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
SongId = Annotated[str, Field(min_length=1, max_length=1_000)]
PathSongId = Annotated[str, Field(description="Id of an indexed song, percent-encoded.")]
Year = Annotated[int, Field(ge=-10_000, le=10_000)]
FilterText = Annotated[str, Field(min_length=1, max_length=1_000)]


def _expecting(values: str) -> WrapValidator:
    """One error message in place of one for each type that a value may have."""

    def validated(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise ValueError(f"expected {values}") from None

    return WrapValidator(validated)


class YearRange(BaseModel):
    """Range of years, both ends included."""

    model_config = ConfigDict(extra="forbid")

    gte: Year | None = Field(None, description="First year of the range; null leaves it open.")
    lte: Year | None = Field(None, description="Last year of the range; null leaves it open.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.gte is None and self.lte is None:
            raise ValueError("expected gte, lte or both")
        return self


FilterTexts = Annotated[
    FilterText | Annotated[list[FilterText], Field(min_length=1, max_length=MAX_VALUES)],
    _expecting("a text, or a list of 1 to 1000"),
]
FilterYears = Annotated[
    Year | Annotated[list[Year], Field(min_length=1, max_length=MAX_VALUES)] | YearRange,
    _expecting('a year, a list of 1 to 1000 years, or a range {"gte": YEAR, "lte": YEAR} with one or both of them'),
]


def _condition(column: MetadataColumn) -> tuple[Any, Any]:
    """The field of `Filter` for one column."""
    if column.type is int:
        return FilterYears | None, Field(
            None, description=f"Keep songs whose {column.name} is this, one of a list, or in a range."
        )
    matches = "has one of these values" if column.is_list else "is one of these values"
    return FilterTexts | None, Field(None, description=f"Keep songs whose {column.name} {matches}.")


def _request_field(column: MetadataColumn) -> tuple[Any, Any]:
    """The field of `SongMetadata` for one column, with its limits."""
    value: Any = Year if column.type is int else Annotated[str, Field(max_length=column.traits.max_length)]
    if column.is_list:
        value = Annotated[list[value], Field(max_length=MAX_VALUES)]
    return value | None, Field(None, description=column.description)


if TYPE_CHECKING:
    _Conditions = BaseModel
    _RequestColumns = BaseModel
else:
    _Conditions = create_model(
        "_Conditions",
        song_id=(FilterTexts | None, Field(None, description="Keep exactly these songs. Ids are compared with case.")),
        **{column.name: _condition(column) for column in METADATA_COLUMNS if column.traits.filterable},
    )
    _RequestColumns = create_model(
        "_RequestColumns", **{column.name: _request_field(column) for column in METADATA_COLUMNS}
    )


class Filter(_Conditions):
    """Conditions on metadata, all of which must hold; of several values in one condition, any may match.

    Text is compared without case. A song without a value does not match. `artist` matches each credited artist.
    """

    include_estimated: bool | None = Field(
        None,
        description="false: genre, mood and tags match only where the catalogue states them, not where they were "
        "estimated from the audio. Default true.",
    )

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"genre": ["rock"], "year": {"gte": 1990, "lte": 1999}}]},
    )

    if TYPE_CHECKING:

        def __init__(self, **conditions: Any) -> None: ...

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                unknown = str(name)[:100]
                raise ValueError(f"'{unknown}' is not a column to filter by; {nearest(unknown, cls.model_fields)}")
        return value


class SearchOptions(BaseModel):
    """Options that all searches share."""

    model_config = ConfigDict(extra="forbid")

    k: K = DEFAULT_K
    blend: Blend | None = None
    filter: Filter | None = Field(None, description="Conditions that every returned song meets.")
    max_per_artist: MaxPerArtist | None = None
    collapse_duplicates: Collapse = True

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the methods of `SearchService`."""
        return {name: getattr(self, name) for name in SearchOptions.model_fields}


class SearchRequest(SearchOptions):
    """A search by exactly one of `text`, `song_id`, `song_ids` and `vector`."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"text": "calm ambient piano", "k": 5},
                {
                    "song_id": "song-0001",
                    "blend": 0.8,
                    "filter": {"genre": ["rock"], "year": {"gte": 1990, "lte": 1999}},
                },
                {"song_ids": ["song-0001", "song-0002"], "negative_song_ids": ["song-0003"], "max_per_artist": 1},
            ]
        },
    )

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)] | None = Field(
        None, description="Description of the music to search for, in natural language."
    )
    song_id: SongId | None = Field(
        None, description="Id of an indexed song whose neighbours are returned, without the song itself."
    )
    song_ids: Annotated[list[SongId], Field(min_length=1, max_length=MAX_SEEDS)] | None = Field(
        None, description="Ids of indexed songs. The query is their mean vector; the songs themselves are not returned."
    )
    negative_song_ids: Annotated[list[SongId], Field(max_length=MAX_SEEDS)] = Field(
        [],
        description="Ids of indexed songs to move away from, only with song_id or song_ids; they are not returned.",
    )
    vector: list[Finite] | None = Field(
        None,
        description="Query vector: 2·dim numbers, [semantic ; preference], or dim numbers when the index has no "
        "preference vectors.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("text", "song_id", "song_ids", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "expected exactly one of text, song_id, song_ids and vector, but got "
                f"{' and '.join(given) or 'none of them'}"
            )
        if self.negative_song_ids and given[0] not in ("song_id", "song_ids"):
            raise ValueError(f"negative_song_ids goes with song_id or song_ids, but got it with {given[0]}")
        return self


@dataclass(frozen=True)
class Play:
    """One song of a listener's history.

    `weight`: strength of the preference (plays, seconds, a rating), negative for a dislike. `timestamp`: seconds since
    1970 (UTC); a song without one does not decay.
    """

    song_id: str
    weight: float = 1.0
    timestamp: float | None = None


class HistoryItem(BaseModel):
    """One song of a listener's history."""

    model_config = ConfigDict(extra="forbid")

    song_id: SongId = Field(description="Id of the song that was played.")
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = Field(
        1.0, description="Strength of the preference (plays, seconds, a rating); negative for a dislike."
    )
    timestamp: Annotated[float, Field(ge=-LATEST, le=LATEST, allow_inf_nan=False)] | None = Field(
        None, description="Time of the play, in seconds since 1970 (UTC). A song without one counts as the most recent."
    )


class RecommendRequest(SearchOptions):
    """A listener's history, for which new songs are recommended."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {
                    "history": [
                        {"song_id": "song-0001", "weight": 3, "timestamp": 1767225600},
                        {"song_id": "song-0002"},
                    ],
                    "k": 20,
                }
            ]
        },
    )

    history: Annotated[list[HistoryItem], Field(min_length=1, max_length=MAX_HISTORY)] = Field(
        description="Songs that the listener played, in any order."
    )
    half_life_days: HalfLife = HALF_LIFE_DAYS

    @property
    def plays(self) -> list[Play]:
        """The history as `SearchService.recommend` takes it."""
        return [Play(item.song_id, item.weight, item.timestamp) for item in self.history]


class EmbedTextRequest(BaseModel):
    """A text to embed."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"text": "calm ambient piano"}]})

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)] = Field(
        description="Text to embed, in natural language."
    )


class SongMetadata(_RequestColumns):
    """Metadata of a song to insert or update; absent fields are set to null."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"title": "Blue in Green", "artist": "A Trio", "genre": ["jazz"], "year": 1959, "licence": "CC0"}
            ]
        },
    )


Numbers = Annotated[list[Finite], Field(min_length=1, max_length=MAX_WIDTH)]


class SongVector(RootModel[Numbers]):
    """Vector of a song, as a field of a form."""


class SongUpload(SongMetadata):
    """A song to insert or update: its metadata, and its vector for models that were trained on given vectors.

    A request with a vector alone keeps the metadata of the song.
    """

    vector: Numbers | None = Field(
        None,
        description="Vector of the song by the encoder whose vectors the models were trained on, in place of audio.",
    )

    @property
    def metadata(self) -> dict[str, Any] | None:
        """The metadata columns, or None when only a vector is given."""
        if self.model_fields_set == {"vector"}:
            return None
        return self.model_dump(exclude={"vector"})


class ActivateRequest(BaseModel):
    """The index version to serve."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "3f2a9c0d11e4b7aa"}]})

    version: str = Field(
        pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Version of a finished index of the workspace, never a path."
    )
