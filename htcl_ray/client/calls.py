"""The calls of the HTTP application: what each sends, and what it gives back. Nothing here sends anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from htcl_ray.client.results import (
    Activated,
    Alive,
    Answered,
    EmbeddingResponse,
    Ready,
    RecommendResponse,
    SearchResponse,
    ServedIndexResponse,
    Song,
    SongUpdated,
)

Audio = str | Path | bytes | BinaryIO
"""A path, a file's bytes, or a file open for reading: any format that the server decodes."""
Given = TypeVar("Given", bound=Answered)


class Options(TypedDict, total=False):
    """How a question is to be answered; what is left out is as the server has it."""

    k: int
    """Songs wanted, 1 to 1,000; 10."""
    blend: float
    """0 by meaning to 1 by listeners' preference; 0.5, or 0 without stage 2."""
    filter: Mapping[str, Any]
    """`{"genre": ["rock"], "year": {"gte": 1990, "lte": 1999}}`."""
    max_per_artist: int
    collapse_duplicates: bool


@dataclass(frozen=True)
class Heard:
    """A song that a listener heard; `timestamp`: seconds since 1970, None counts as last."""

    song_id: str
    weight: float = 1.0
    timestamp: float | None = None


@dataclass(frozen=True)
class Call(Generic[Given]):
    """One request."""

    method: str
    path: str
    gives: type[Given]
    body: Any = None
    """Sent as JSON, or as fields of a form when there is audio."""
    audio: Audio | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    again: bool = True
    """Whether it may be sent again."""

    def read(self) -> dict[str, Any]:
        """Arguments of httpx's `build_request`. Reads the audio. Raises OSError."""
        if self.audio is None:
            return {"params": self.parameters, **({} if self.body is None else {"json": self.body})}
        name, data = _read(self.audio)
        return {"params": self.parameters, "data": _fields(self.body or {}), "files": {"file": (name, data, "application/octet-stream")}}


def search(
    text: str | None = None,
    *,
    song_id: str | None = None,
    song_ids: Sequence[str] | None = None,
    negative_song_ids: Sequence[str] = (),
    vector: Sequence[float] | None = None,
    **options: Unpack[Options],
) -> Call[SearchResponse]:
    """Songs near words, a song, several songs (less the negatives), or a vector: exactly one of them."""
    asked = {"text": text, "song_id": song_id, "song_ids": _listed(song_ids), "vector": _listed(vector)}
    body = {name: value for name, value in asked.items() if value is not None}
    if negative_song_ids:
        body["negative_song_ids"] = list(negative_song_ids)
    return Call("POST", "/v1/search", SearchResponse, {**body, **options})


def search_audio(audio: Audio, **options: Unpack[Options]) -> Call[SearchResponse]:
    """Songs that sound like a recording."""
    return Call("POST", "/v1/search/audio", SearchResponse, dict(options), audio)


def recommend(history: Sequence[Heard | str], *, half_life_days: float = 30.0, **options: Unpack[Options]) -> Call[RecommendResponse]:
    """Songs for a listener who heard these, without them."""
    items = [asdict(Heard(heard) if isinstance(heard, str) else heard) for heard in history]
    return Call("POST", "/v1/recommend", RecommendResponse, {"history": items, "half_life_days": half_life_days, **options})


def embed_text(text: str) -> Call[EmbeddingResponse]:
    """The vectors of words."""
    return Call("POST", "/v1/embeddings", EmbeddingResponse, {"text": text})


def embed_audio(audio: Audio) -> Call[EmbeddingResponse]:
    """The vectors of a recording."""
    return Call("POST", "/v1/embeddings", EmbeddingResponse, audio=audio)


def song(song_id: str) -> Call[Song]:
    """What the catalogue says of a song. RequestError 404 when the index does not hold it."""
    return Call("GET", _of(song_id), Song)


def similar(song_id: str, **options: Unpack[Options]) -> Call[SearchResponse]:
    """Songs near a song of the index, without itself."""
    return Call("GET", f"{_of(song_id)}/similar", SearchResponse, parameters=_fields(options))


def put_song(song_id: str, audio: Audio | None = None, metadata: Mapping[str, Any] | None = None) -> Call[SongUpdated]:
    """Put a song in, or change one: its sound, its metadata (which replaces what was said of it), or both. Needs a key that may write."""
    if audio is None:
        return Call("PUT", _of(song_id), SongUpdated, None if metadata is None else dict(metadata))
    return Call("PUT", _of(song_id), SongUpdated, {} if metadata is None else {"metadata": dict(metadata)}, audio)


def delete_song(song_id: str) -> Call[SongUpdated]:
    """Take a song out. Needs a key that may write.

    RequestError 404 when it is not there, which may also be because the answer to a first request was lost.
    """
    return Call("DELETE", _of(song_id), SongUpdated)


def index() -> Call[ServedIndexResponse]:
    """What is served."""
    return Call("GET", "/v1/index", ServedIndexResponse)


def activate(version: str) -> Call[Activated]:
    """Serve another index of the workspace. Needs a key that may write."""
    return Call("POST", "/v1/index/activate", Activated, {"version": version})


def ready() -> Call[Ready]:
    """Whether models and index are loaded, asked once: RequestError 503 while they are not."""
    return Call("GET", "/readyz", Ready, again=False)


def alive() -> Call[Alive]:
    """Whether the process answers, asked once."""
    return Call("GET", "/healthz", Alive, again=False)


def _of(song_id: str) -> str:
    escaped = quote(song_id, safe="")
    return f"/v1/songs/{escaped if escaped.strip('.') else escaped.replace('.', '%2E')}"  # '..' would be the folder above


def _listed(values: Sequence[Any] | None) -> list[Any] | None:
    return None if values is None else [value.item() if hasattr(value, "item") else value for value in values]


def _fields(values: Mapping[str, Any]) -> dict[str, str]:
    """As a form or an address carries them: what is no text as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items() if value is not None}


def _read(audio: Audio) -> tuple[str, bytes]:
    """A file's name, of which only the suffix matters, and its bytes."""
    if isinstance(audio, bytes | bytearray | memoryview):
        return "audio", bytes(audio)
    if isinstance(audio, str | Path):
        return Path(audio).name, Path(audio).read_bytes()
    return Path(str(getattr(audio, "name", "audio"))).name, audio.read()
