"""What the client gives back. The server's own models, which load FAISS, have the same fields; what a later server adds
is ignored.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class Answered(BaseModel):
    """Of one request; never changes."""

    model_config = ConfigDict(frozen=True)


class Song(Answered):
    """What the catalogue says of a song; None where it says nothing."""

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
    lyrics: str | None = None


class Result(Answered):
    """One song of an answer. Scores are cosines, and `score` = (1 - blend) · semantic_score + blend ·
    preference_score.
    """

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
    score: float
    semantic_score: float
    preference_score: float | None
    """None without stage 2."""
    shared_tags: list[str]
    """Tags, genres and moods of the song that the question has as well."""


class SearchResponse(Answered):
    """Songs, best first."""

    results: list[Result]
    k: int
    blend: float
    """That was used."""
    index: str
    """Version of the index that answered."""
    text_coverage: float | None = None
    """Of a text: the share that the text model's vocabulary knows, 0 to 1; None where the query had no text."""


class RecommendResponse(SearchResponse):
    """Songs that are not in the history, best first."""

    unknown_song_ids: list[str]
    """Songs of the history that the index does not hold."""


class EmbeddingResponse(Answered):
    """Where words or sound lie in the spaces of the index."""

    semantic: list[float]
    preference: list[float] | None
    """None without stage 2."""
    text_coverage: float | None = None
    """As of a `SearchResponse`."""
    model_versions: dict[str, str | None]

    @property
    def vector(self) -> list[float]:
        """[semantic ; preference], as `search(vector=…)` takes it."""
        return [*self.semantic, *(self.preference or ())]


class Updates(Answered):
    """What the log of updates did to the index, as the replica that answered has read it."""

    applied: int
    skipped: int
    broken: int
    last: str | None
    songs_added: int
    songs_removed: int
    files: int
    failed_polls: int


class ServedIndexResponse(Answered):
    """The index that is served, and what became of it since it was built."""

    version: str
    songs: int
    dim: int
    has_preference: bool
    model_versions: dict[str, str | None]
    manifest: dict[str, Any]
    activated_at: str
    updates: Updates


class SongUpdated(Answered):
    """The update is durable; the other replicas follow within `serve.poll_seconds`."""

    song_id: str
    update: str
    index: str


class Activated(Answered):
    """The index that is served now."""

    version: str
    activated_at: str
    songs: int


class Ready(Answered):
    """Models and index are loaded."""

    status: str
    index: str
    songs: int


class Alive(Answered):
    """The process answers."""

    status: str
