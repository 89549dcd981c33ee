"""Requests and answers of the HTTP application, as typed models: what `/openapi.json` shows."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from htcl_ray.index.vectors import ENCODER_DAMAGED, ModelVersions, Vectors, check_unit_norm
from htcl_ray.search.filters import Filter
from htcl_ray.search.profiles import HALF_LIFE_DAYS, Heard
from htcl_ray.search.service import DEFAULT_K, MAX_K, MAX_TEXT_LENGTH, Answer

MAX_SEEDS = 1_000
MAX_HISTORY = 10_000
MAX_WEIGHT = 1e6
LATEST = 253_402_300_799  # the end of the year 9999

K = Annotated[int, Field(ge=1, le=MAX_K, description="How many songs to return.")]
Blend = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="0 ranks by meaning, 1 by listeners' preference. Default 0.5, or 0 when the index has no preference vectors.",
    ),
]
MaxPerArtist = Annotated[
    int,
    Field(
        ge=1,
        le=MAX_K,
        description="At most so many songs of one artist; songs without an artist are not counted together.",
    ),
]
Collapse = Annotated[
    bool,
    Field(
        description="Of songs that preprocessing found to be the same recording, return only the best, and none that is the same as a "
        "song of the question."
    ),
]
HalfLife = Annotated[
    float,
    Field(gt=0, le=1e6, allow_inf_nan=False, description="Days after which a song that was heard counts half as much."),
]
TextCoverage = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Share of the text's letters, digits and symbols that the text model's vocabulary knows; the songs of a text of "
        "which it knows nothing (0) are arbitrary. Null where the query had no text.",
    ),
]
Finite = Annotated[float, Field(allow_inf_nan=False)]
SongId = Annotated[str, Field(min_length=1, max_length=1_000)]


class SearchOptions(BaseModel):
    """How a question is to be answered."""

    model_config = ConfigDict(extra="forbid")

    k: K = DEFAULT_K
    blend: Blend | None = None
    filter: Filter | None = Field(None, description="Conditions that every song of the answer meets.")
    max_per_artist: MaxPerArtist | None = None
    collapse_duplicates: Collapse = True

    @property
    def options(self) -> dict[str, Any]:
        """Keywords of the service's questions."""
        return {name: getattr(self, name) for name in SearchOptions.model_fields}


class SearchRequest(SearchOptions):
    """Exactly one of `text`, `song_id`, `song_ids` and `vector`, with options."""

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
        None, description="Words to search for."
    )
    song_id: SongId | None = Field(None, description="A song of the index; it is left out of the answer.")
    song_ids: Annotated[list[SongId], Field(min_length=1, max_length=MAX_SEEDS)] | None = Field(
        None, description="Songs of the index, whose mean is searched for; they are left out of the answer."
    )
    negative_song_ids: Annotated[list[SongId], Field(max_length=MAX_SEEDS)] = Field(
        [],
        description="Songs of the index that the answer should not be like, with song_id or song_ids; they are left out as well.",
    )
    vector: list[Finite] | None = Field(
        None,
        description="2·dim numbers, [semantic ; preference], or dim numbers when the index has no preference vectors.",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("text", "song_id", "song_ids", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"expected exactly one of text, song_id, song_ids and vector, but got {' and '.join(given) or 'none of them'}"
            )
        if self.negative_song_ids and given[0] not in ("song_id", "song_ids"):
            raise ValueError(f"negative_song_ids goes with song_id or song_ids, but got it with {given[0]}")
        return self


class HistoryItem(BaseModel):
    """A song that a listener heard."""

    model_config = ConfigDict(extra="forbid")

    song_id: SongId
    weight: Annotated[float, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT, allow_inf_nan=False)] = Field(
        1.0, description="How much it was liked: plays, seconds, a rating; below 0 disliked."
    )
    timestamp: Annotated[float, Field(ge=-LATEST, le=LATEST, allow_inf_nan=False)] | None = Field(
        None, description="When, in seconds since 1970 (UTC). A song without one counts as heard last."
    )


class RecommendRequest(SearchOptions):
    """A listener's history, with options."""

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

    history: Annotated[list[HistoryItem], Field(min_length=1, max_length=MAX_HISTORY)]
    half_life_days: HalfLife = HALF_LIFE_DAYS

    @property
    def heard(self) -> list[Heard]:
        """For the service."""
        return [Heard(item.song_id, item.weight, item.timestamp) for item in self.history]


class EmbedTextRequest(BaseModel):
    """Words."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"text": "calm ambient piano"}]})

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)]


class EmbeddingResponse(BaseModel):
    """Where a text or audio lies in the spaces of the index; [semantic ; preference] can be sent as `vector` of a
    search.
    """

    semantic: list[float] = Field(description="dim numbers, of length 1.")
    preference: list[float] | None = Field(description="dim numbers, of length 1; null without stage 2.")
    text_coverage: TextCoverage | None = None
    model_versions: dict[str, str | None] = Field(description="Fingerprints of the models' weights.")

    @classmethod
    def of(cls, vectors: Vectors, model_versions: ModelVersions) -> Self:
        """Of one row. Raises InputError for vectors not of unit norm."""
        check_unit_norm(vectors, lambda _: "the query", ENCODER_DAMAGED)
        preference, coverage = (
            None if part is None else part[0].tolist() for part in (vectors.preference, vectors.text_coverage)
        )
        return cls(
            semantic=vectors.semantic[0].tolist(),
            preference=preference,
            text_coverage=coverage,
            model_versions=dict(model_versions),
        )


class Metadata(BaseModel):
    """What the catalogue says of a song; null where it says nothing."""

    song_id: str
    title: str | None = None
    artist: str | None = None
    album: str | None = None
    genre: list[str] | None = None
    mood: list[str] | None = None
    tags: list[str] | None = None
    language: list[str] | None = None
    year: int | None = None
    licence: str | None = None


class Song(Metadata):
    """A song of the index."""

    lyrics: str | None = None


class Result(Metadata):
    """One song of an answer."""

    score: float = Field(description="(1 - blend) · semantic_score + blend · preference_score")
    semantic_score: float = Field(ge=-1, le=1, description="Cosine in the semantic space.")
    preference_score: float | None = Field(
        ge=-1, le=1, description="Cosine in the preference space; null without stage 2."
    )
    shared_tags: list[str] = Field(description="Tags, genres and moods of the song that the question has as well.")


class SearchResponse(BaseModel):
    """Songs, best first."""

    results: list[Result]
    k: int
    blend: float = Field(description="The blend that was used.")
    index: str = Field(description="Version of the index that answered.")
    text_coverage: TextCoverage | None = None

    @classmethod
    def of(cls, answer: Answer, index: str) -> Self:
        """The response that carries an answer."""
        return cls(
            results=_results(answer), k=answer.k, blend=answer.blend, index=index, text_coverage=answer.text_coverage
        )


class RecommendResponse(SearchResponse):
    """Songs that are not in the history, best first."""

    unknown_song_ids: list[str] = Field(description="Songs of the history that the index does not hold.")

    @classmethod
    def of(cls, answer: Answer, index: str) -> Self:
        """The response that carries an answer."""
        results = _results(answer)
        return cls(
            results=results, k=answer.k, blend=answer.blend, index=index, unknown_song_ids=answer.unknown_song_ids
        )


def _results(answer: Answer) -> list[Result]:
    return [
        Result(
            **song,
            score=hit.score,
            semantic_score=hit.semantic_score,
            preference_score=hit.preference_score,
            shared_tags=tags,
        )
        for hit, song, tags in zip(answer.hits, answer.metadata, answer.shared_tags, strict=True)
    ]


class IndexResponse(BaseModel):
    """The index that is served."""

    version: str
    songs: int
    dim: int = Field(description="Width of one space.")
    has_preference: bool
    model_versions: dict[str, str | None] = Field(description="Fingerprints of the models' weights.")
    manifest: dict[str, Any]


class Alive(BaseModel):
    """The process answers."""

    status: str = "ok"


class Ready(BaseModel):
    """Models and index are loaded."""

    status: str = "ready"
    index: str
    songs: int


class ErrorBody(BaseModel):
    """What went wrong."""

    code: str = Field(description="For programs; stable.")
    message: str = Field(description="For people: what, what was expected, what to do.")


class ErrorResponse(BaseModel):
    """Every answer that is not a success has this shape."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": {"code": "invalid_query", "message": "k is 0; expected 1 to 1000"}}]}
    )

    error: ErrorBody
