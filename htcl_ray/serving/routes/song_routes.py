"""One song of the index: reading it, putting it in, taking it out."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, File, Form, Path, Request, UploadFile

from htcl_ray.api.requests import PathSongId, SongMetadata
from htcl_ray.api.responses import Song, SongUpdated
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import QueryError
from htcl_ray.index.live.update_log import store_upload
from htcl_ray.serving.api_keys import write_access
from htcl_ray.serving.backend import Backend
from htcl_ray.serving.json_body import (
    FIELDS,
    FORM,
    JSON,
    content_type,
    has_body,
    is_json,
    parse_part,
    takes,
    wrong_content_type,
)
from htcl_ray.serving.openapi_errors import NOT_FOUND, UNSUPPORTED, WRITES
from htcl_ray.serving.routes.search_routes import read_upload
from htcl_ray.serving.storage_calls import with_storage

NewSongId = Annotated[str, Path(min_length=1, max_length=1_000, description="Id of the song, percent-encoded.")]
JSON_BODY = {"requestBody": {"content": {"application/json": {"schema": SongMetadata.model_json_schema()}}}}


def song_routes(backend: Backend, settings: ServeSettings) -> APIRouter:
    """Of one song, whose id may hold slashes: see `request_line.py`."""
    router = APIRouter(tags=["songs"])

    @router.get("/v1/songs/{song_id:encoded}", responses=NOT_FOUND)
    async def song(song_id: PathSongId) -> Song:
        """What the catalogue says of a song."""
        return Song(song_id=song_id, **backend.live.active.service.metadata(song_id))

    @router.put(
        "/v1/songs/{song_id:encoded}",
        responses={**WRITES, **NOT_FOUND, **UNSUPPORTED},
        dependencies=[Depends(write_access), takes(JSON, FORM, FIELDS)],
        openapi_extra=JSON_BODY,
    )
    async def put_song(
        song_id: NewSongId,
        request: Request,
        file: Annotated[UploadFile | None, File(description="An audio file: WAV, FLAC, MP3, Ogg, …")] = None,
        metadata: Annotated[str | None, Form(description="SongMetadata as JSON.")] = None,
    ) -> SongUpdated:
        """Put a song in, or change one.

        With a file, its sound is that of the file. Metadata, as a part of a form or alone as a JSON body, replaces what
        was said of the song; without metadata that stays. Without a file the song must be there, and its sound stays.
        """
        sent_json = is_json(request)
        given = parse_part(
            SongMetadata, await request.body() if sent_json else metadata, "body", *([] if sent_json else ["metadata"])
        )
        if file is None:
            if given is None:
                if has_body(request) and content_type(request) != FORM:
                    raise wrong_content_type(request, JSON, FORM)
                raise QueryError("there is neither a file nor metadata; expected at least one of them")
            update = await with_storage(backend.live.describe, song_id, given.model_dump())
        else:
            data = await read_upload(file, settings)
            vectors = await backend.encode_song(data)
            audio_path = await with_storage(store_upload, backend.live.workspace, data, file.filename)
            about = {"audio_path": audio_path, "duplicate_group": None, **(given.model_dump() if given else {})}
            update = await with_storage(backend.live.upsert, song_id, vectors, about)
        return SongUpdated(song_id=song_id, update=update, index=backend.live.version)

    @router.delete(
        "/v1/songs/{song_id:encoded}", responses={**WRITES, **NOT_FOUND}, dependencies=[Depends(write_access)]
    )
    async def delete_song(song_id: PathSongId) -> SongUpdated:
        """Take a song out of every later answer."""
        return SongUpdated(
            song_id=song_id, update=await with_storage(backend.live.remove, song_id), index=backend.live.version
        )

    return router
