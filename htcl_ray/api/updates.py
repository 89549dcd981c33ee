"""Requests and answers about changing songs and indexes, as typed models: what `/openapi.json` shows."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from htcl_ray.api.search import IndexResponse
from htcl_ray.index.live.live_index import LiveIndex

MAX_WORDS = 1_000
MAX_LYRICS = 100_000

Words = Annotated[str, Field(max_length=MAX_WORDS)]
SeveralWords = Annotated[list[Words], Field(max_length=1_000)]


class SongMetadata(BaseModel):
    """What is known of a song; what is left out is null."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={
            "examples": [
                {"title": "Blue in Green", "artist": "A Trio", "genre": ["jazz"], "year": 1959, "licence": "CC0"}
            ]
        },
    )

    title: Words | None = None
    artist: Words | None = None
    album: Words | None = None
    lyrics: Annotated[str, Field(max_length=MAX_LYRICS)] | None = None
    licence: Words | None = None
    genre: SeveralWords | None = None
    mood: SeveralWords | None = None
    tags: SeveralWords | None = None
    language: SeveralWords | None = None
    year: Annotated[int, Field(ge=-10_000, le=10_000)] | None = None


class SongUpdated(BaseModel):
    """The update is durable, and in every later answer of this replica; the others follow within
    `serve.poll_seconds`.
    """

    song_id: str
    update: str = Field(description="Name of the update. Of one song, the update with the greatest name counts.")
    index: str = Field(description="Version of the index that is served.")


class ActivateRequest(BaseModel):
    """The index to serve."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"version": "3f2a9c0d11e4b7aa"}]})

    version: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="Name of a finished index of the workspace.")


class Activated(BaseModel):
    """The index that is served now; the other replicas follow within `serve.poll_seconds`."""

    version: str
    activated_at: str
    songs: int


class Updates(BaseModel):
    """What the log of updates did to the index, as this replica has read it."""

    applied: int = Field(description="Updates applied since this replica loaded the index.")
    skipped: int = Field(description="Upserts whose vectors are of other models.")
    broken: int = Field(description="Files of the log that cannot be used; the application's log says why.")
    last: str | None = Field(description="The greatest name of an update that was applied.")
    songs_added: int = Field(description="Songs that the index had not when it was built.")
    songs_removed: int = Field(description="Songs that it had then and has no more.")
    files: int = Field(description="Files of the log; 'htcl index --compact' makes them one.")
    failed_polls: int = Field(description="Times that this replica could not look for updates.")


class ServedIndexResponse(IndexResponse):
    """The index that is served, and what became of it since it was built."""

    activated_at: str
    updates: Updates

    @classmethod
    def of(cls, live: LiveIndex) -> Self:
        """What is served now."""
        active = live.active
        index, replay = active.service.index.snapshot(), active.replay
        return cls(
            version=active.version,
            songs=len(index),
            dim=index.dim,
            has_preference=index.has_preference,
            model_versions=index.model_versions,
            manifest=index.manifest,
            activated_at=active.activated_at,
            updates=Updates(
                applied=replay.applied,
                skipped=replay.skipped,
                broken=len(live.broken),
                last=replay.last,
                songs_added=len(replay.added),
                songs_removed=len(replay.removed),
                files=replay.files,
                failed_polls=live.failed_polls,
            ),
        )
