"""One song of the index."""

from __future__ import annotations

from fastapi import APIRouter

from htcl_ray.retrieval.http import Song
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.documented import NOT_FOUND


def song_routes(backend: Backend) -> APIRouter:
    """Included after the searches, because a song's id may hold slashes."""
    router = APIRouter(tags=["songs"])

    @router.get("/v1/songs/{song_id:path}", responses=NOT_FOUND)
    async def song(song_id: str) -> Song:
        """What the catalogue says of a song."""
        return Song(song_id=song_id, **backend.service.metadata(song_id))

    return router
