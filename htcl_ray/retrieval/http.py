"""Requests and answers of the HTTP application, as typed models: what `/openapi.json` shows."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from htcl_ray.retrieval.service import DEFAULT_K, MAX_K, Answer

MAX_TEXT_LENGTH = 10_000
MAX_SEEDS = 1_000

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
Finite = Annotated[float, Field(allow_inf_nan=False)]
SongId = Annotated[str, Field(min_length=1, max_length=1_000)]


class SearchRequest(BaseModel):
    """Exactly one of `text`, `song_id`, `song_ids` and `vector`, with options."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"text": "calm ambient piano", "k": 5}, {"song_id": "song-0001", "blend": 0.8}]},
    )

    text: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_LENGTH)] | None = Field(None, description="Words to search for.")
    song_id: SongId | None = Field(None, description="A song of the index; it is left out of the answer.")
    song_ids: Annotated[list[SongId], Field(min_length=1, max_length=MAX_SEEDS)] | None = Field(
        None, description="Songs of the index, whose mean is searched for; they are left out of the answer."
    )
    vector: list[Finite] | None = Field(
        None, description="2·dim numbers, [semantic ; preference], or dim numbers when the index has no preference vectors."
    )
    k: K = DEFAULT_K
    blend: Blend | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [name for name in ("text", "song_id", "song_ids", "vector") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected exactly one of text, song_id, song_ids and vector, but got {' and '.join(given) or 'none of them'}")
        return self


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
    preference_score: float | None = Field(ge=-1, le=1, description="Cosine in the preference space; null without stage 2.")


class SearchResponse(BaseModel):
    """Songs, best first."""

    results: list[Result]
    k: int
    blend: float = Field(description="The blend that was used.")
    index: str = Field(description="Version of the index that answered.")

    @classmethod
    def of(cls, answer: Answer, index: str) -> Self:
        """The response that carries an answer."""
        scores = (
            {"score": hit.score, "semantic_score": hit.semantic_score, "preference_score": hit.preference_score} for hit in answer.hits
        )
        results = [
            Result(song_id=hit.song_id, **given, **{name: row[name] for name in Metadata.model_fields if name in row})
            for hit, given, row in zip(answer.hits, scores, answer.metadata, strict=True)
        ]
        return cls(results=results, k=answer.k, blend=answer.blend, index=index)


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
