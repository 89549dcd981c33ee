"""One song of the index: reading its metadata, adding or changing it, removing it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Path, Request

from htcl_ray.api.requests import PathSongId, SongUpload, SongVector
from htcl_ray.api.responses import Song, SongUpdated
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import QueryError
from htcl_ray.index.live.update_log import store_upload
from htcl_ray.serving.api_keys import write_access
from htcl_ray.serving.backend import Backend, with_storage
from htcl_ray.serving.error_responses import NOT_FOUND, UNSUPPORTED, WRITES
from htcl_ray.serving.request_body import (
    FIELDS,
    FORM,
    JSON,
    OptionalAudioUpload,
    content_type,
    has_body,
    is_json,
    parse_part,
    read_upload,
    takes,
    wrong_content_type,
)

NewSongId = Annotated[str, Path(min_length=1, max_length=1_000, description="Id of the song, percent-encoded.")]
JSON_BODY = {"requestBody": {"content": {"application/json": {"schema": SongUpload.model_json_schema()}}}}


def song_routes(backend: Backend, settings: ServeSettings) -> APIRouter:
    """Routes of one song, whose id may contain slashes (see `request_line.py`)."""
    router = APIRouter(tags=["songs"])

    @router.get("/v1/songs/{song_id:encoded}", responses=NOT_FOUND)
    async def song(song_id: PathSongId) -> Song:
        """Return the metadata of a song."""
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
        file: OptionalAudioUpload = None,
        metadata: Annotated[
            str | None, Form(description="Metadata of the song as a JSON object: see the schema SongUpload.")
        ] = None,
        vector: Annotated[
            str | None, Form(description="Vector of the song as a JSON list, in place of a file.")
        ] = None,
    ) -> SongUpdated:
        """Add a song to the index, or change one.

        A file sets the audio of the song; a vector takes its place where the models were trained on given vectors.
        Metadata, as a field of the form or alone as a JSON body, replaces the metadata of the song; without it the
        metadata stays. Without a file or a vector the song must exist, and its audio or vector stays.
        """
        sent_json = is_json(request)
        given = parse_part(
            SongUpload, await request.body() if sent_json else metadata, "body", *([] if sent_json else ["metadata"])
        )
        about = given.metadata if given else None
        numbers = given.vector if given else None
        if vector is not None:
            part = parse_part(SongVector, vector, "body", "vector")
            numbers = part.root if part else None
        if numbers is not None:
            if file is not None:
                raise QueryError("the request has a file and a vector; expected one of them")
            vectors = await backend.encode_vector(numbers)
            known = {"duplicate_group": None, **(about or {})}
            update = await with_storage(backend.live.upsert, song_id, vectors, known)
        elif file is None:
            if about is None:
                if has_body(request) and content_type(request) != FORM:
                    raise wrong_content_type(request, JSON, FORM)
                raise QueryError(
                    "the request has neither a file nor a vector nor metadata; expected at least one of them"
                )
            update = await with_storage(backend.live.describe, song_id, about)
        else:
            data = await read_upload(file, settings)
            vectors = await backend.encode_song(data)
            audio_path = await with_storage(store_upload, backend.live.workspace, data, file.filename)
            known = {"audio_path": audio_path, "duplicate_group": None, **(about or {})}
            update = await with_storage(backend.live.upsert, song_id, vectors, known)
        return SongUpdated(song_id=song_id, update=update, index=backend.live.version)

    @router.delete(
        "/v1/songs/{song_id:encoded}", responses={**WRITES, **NOT_FOUND}, dependencies=[Depends(write_access)]
    )
    async def delete_song(song_id: PathSongId) -> SongUpdated:
        """Remove a song from the index; later responses do not contain it."""
        return SongUpdated(
            song_id=song_id, update=await with_storage(backend.live.remove, song_id), index=backend.live.version
        )

    return router
