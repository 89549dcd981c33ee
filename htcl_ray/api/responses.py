"""Responses of the HTTP API, as typed models. The client ignores fields that a newer server adds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from htcl_ray.schemas import METADATA_COLUMNS, RESULT_COLUMNS, Metadata

TextCoverage = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Fraction of the text's letters, digits and symbols that the text model's vocabulary covers; at 0 "
        "the results are arbitrary. Null for queries without text.",
    ),
]
ModelVersionsField = Annotated[
    dict[str, str | None],
    Field(description="Fingerprints of the weights of the semantic and the preference model; null without stage 2."),
]


class ApiResponse(BaseModel):
    """Base of all responses: immutable, and tolerant of unknown fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class _Identified(ApiResponse):
    song_id: str = Field(description="Id of the song in the catalogue.")


if TYPE_CHECKING:
    _ResultMetadata = Metadata
else:
    _ResultMetadata = create_model(
        "_ResultMetadata",
        **{
            column.name: (Metadata.model_fields[column.name].annotation, Field(None, description=column.description))
            for column in METADATA_COLUMNS
            if column.name in RESULT_COLUMNS
        },
    )


class _Estimated(ApiResponse):
    estimated: list[str] | None = Field(
        None,
        description="Columns of this song, of genre, mood and tags, whose values were estimated from its audio by a "
        "music tagger; null where the catalogue states them all.",
    )


class Song(_Estimated, Metadata, _Identified):
    """Catalogue metadata of one indexed song; unknown values are null."""


class Result(_Estimated, _ResultMetadata, _Identified):
    """One song of a search response, with its scores and metadata."""

    score: float = Field(description="Ranking score: (1 - blend) · semantic_score + blend · preference_score.")
    semantic_score: float = Field(ge=-1, le=1, description="Cosine similarity in the semantic space.")
    preference_score: float | None = Field(
        ge=-1, le=1, description="Cosine similarity in the preference space; null without stage 2."
    )
    shared_tags: list[str] = Field(description="Tags, genres and moods that the song shares with the query.")


class SearchResponse(ApiResponse):
    """Search results, best first."""

    results: list[Result] = Field(description="Matching songs, best first.")
    k: int = Field(description="Number of songs requested; fewer are returned when fewer match.")
    blend: float = Field(description="Blend used for the ranking.")
    index: str = Field(description="Version of the index that served the request.")
    text_coverage: TextCoverage | None = None


class RecommendResponse(SearchResponse):
    """Recommended songs that are not in the history, best first."""

    unknown_song_ids: list[str] = Field(description="Songs of the history that the index does not contain.")


class EmbeddingResponse(ApiResponse):
    """Vectors of a text or a recording in the spaces of the index."""

    semantic: list[float] = Field(description="Unit-norm vector in the semantic space, dim numbers.")
    preference: list[float] | None = Field(
        description="Unit-norm vector in the preference space, dim numbers; null without stage 2."
    )
    text_coverage: TextCoverage | None = None
    model_versions: ModelVersionsField

    @property
    def vector(self) -> list[float]:
        """[semantic ; preference], as a search takes it in `vector`."""
        return [*self.semantic, *(self.preference or ())]


class SongUpdated(ApiResponse):
    """A durable update. This replica applies it immediately, the others within `serve.poll_seconds`."""

    song_id: str = Field(description="Id of the updated song.")
    update: str = Field(description="Name of the update. For one song, the update with the greatest name wins.")
    index: str = Field(description="Version of the index that is served.")


class Activated(ApiResponse):
    """The index that is now served. Other replicas switch within `serve.poll_seconds`."""

    version: str = Field(description="Version of the index that is served.")
    activated_at: str = Field(description="Time of the activation, ISO 8601 in UTC.")
    songs: int = Field(description="Number of songs in the index.")


class Updates(ApiResponse):
    """State of the update log on the replica that handled the request."""

    applied: int = Field(description="Updates applied since this replica loaded the index.")
    skipped: int = Field(description="Upserts skipped because other models made their vectors.")
    broken: int = Field(description="Log files that cannot be read; the application's log names the reason.")
    last: str | None = Field(description="Greatest name of an applied update; null before the first.")
    songs_added: int = Field(description="Songs added since the index was built.")
    songs_removed: int = Field(description="Songs of the built index removed since.")
    files: int = Field(description="Files of the log; 'htcl index --compact' merges them into one.")
    failed_polls: int = Field(description="Failed attempts of this replica to read the log.")


class IndexResponse(ApiResponse):
    """Description of an index."""

    version: str = Field(description="Version of the index that is served.")
    songs: int = Field(description="Number of songs in the index.")
    dim: int = Field(description="Dimension of one space.")
    has_preference: bool = Field(description="Whether the index has preference vectors (stage 2).")
    model_versions: ModelVersionsField
    manifest: dict[str, Any] = Field(description="Manifest of the index folder, without paths of the server.")


class ServedIndexResponse(IndexResponse):
    """The index that is served, and the updates applied to it since it was built."""

    activated_at: str = Field(description="Time of the activation, ISO 8601 in UTC.")
    updates: Updates = Field(description="State of the update log on this replica.")


class Alive(ApiResponse):
    """Liveness: the process responds."""

    status: str = Field("ok", description="Always 'ok'.")


class Ready(ApiResponse):
    """Readiness: models and index are loaded."""

    status: str = Field("ready", description="Always 'ready'.")
    index: str = Field(description="Version of the index that is served.")
    songs: int = Field(description="Number of songs in the index.")


class ErrorBody(ApiResponse):
    """Code and message of an error."""

    code: str = Field(description="Stable, machine-readable code.")
    message: str = Field(description="Human-readable message: what is wrong, what was expected, what to do.")


class ErrorResponse(ApiResponse):
    """Body of every unsuccessful response."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"error": {"code": "invalid_query", "message": "k is 0; expected 1 to 1000"}}]}
    )

    error: ErrorBody = Field(description="The error.")
