"""The calls of the HTTP application: what each sends, and what it gives back. Nothing here sends anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from htcl_ray.client import arguments
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


OPTIONS = {
    "k": arguments.whole_number,
    "blend": arguments.number,
    "filter": arguments.mapping,
    "max_per_artist": arguments.whole_number,
    "collapse_duplicates": arguments.flag,
}
"""The check of each of `Options`."""


@dataclass(frozen=True)
class Heard:
    """A song that a listener played; `timestamp`: seconds since 1970, None counts as last."""

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
        return {
            "params": self.parameters,
            "data": _fields(self.body or {}),
            "files": {"file": (name, data, "application/octet-stream")},
        }


def search(
    text: str | None = None,
    *,
    song_id: str | None = None,
    song_ids: Sequence[str] | None = None,
    negative_song_ids: Sequence[str] = (),
    vector: Sequence[float] | None = None,
    **options: Unpack[Options],
) -> Call[SearchResponse]:
    """Songs near a text, a song, several songs (less the negatives), or a vector: exactly one of them."""
    body: dict[str, Any] = {}
    if text is not None:
        body["text"] = arguments.text(text, "text")
    if song_id is not None:
        body["song_id"] = arguments.song_id(song_id, "song_id")
    if song_ids is not None:
        body["song_ids"] = arguments.each(arguments.song_id, song_ids, "song_ids")
    if vector is not None:
        body["vector"] = arguments.each(arguments.number, vector, "vector")
    negatives = arguments.each(arguments.song_id, negative_song_ids, "negative_song_ids")
    if negatives:
        body["negative_song_ids"] = negatives
    return Call("POST", "/v1/search", SearchResponse, {**body, **_checked(options)})


def search_audio(audio: Audio, **options: Unpack[Options]) -> Call[SearchResponse]:
    """Songs that sound like a recording."""
    return Call("POST", "/v1/search/audio", SearchResponse, _checked(options), arguments.audio(audio))


def recommend(
    history: Sequence[Heard | str], *, half_life_days: float = 30.0, **options: Unpack[Options]
) -> Call[RecommendResponse]:
    """Songs for a listener who played these, without them."""
    body = {
        "history": arguments.each(_played, history, "history"),
        "half_life_days": arguments.number(half_life_days, "half_life_days"),
        **_checked(options),
    }
    return Call("POST", "/v1/recommend", RecommendResponse, body)


def embed_text(text: str) -> Call[EmbeddingResponse]:
    """The vectors of a text."""
    return Call("POST", "/v1/embeddings", EmbeddingResponse, {"text": arguments.text(text, "text")})


def embed_audio(audio: Audio) -> Call[EmbeddingResponse]:
    """The vectors of a recording."""
    return Call("POST", "/v1/embeddings", EmbeddingResponse, audio=arguments.audio(audio))


def song(song_id: str) -> Call[Song]:
    """The catalogue's metadata of a song. RequestError 404 when the index does not hold it."""
    return Call("GET", _of(song_id), Song)


def similar(song_id: str, **options: Unpack[Options]) -> Call[SearchResponse]:
    """Songs near a song of the index, without itself."""
    return Call("GET", f"{_of(song_id)}/similar", SearchResponse, parameters=_fields(_checked(options)))


def put_song(song_id: str, audio: Audio | None = None, metadata: Mapping[str, Any] | None = None) -> Call[SongUpdated]:
    """Add or change a song: its audio, its metadata (which replaces all of the song's metadata), or both. Needs a key
    that may write.
    """
    given = None if metadata is None else arguments.mapping(metadata, "metadata")
    if audio is None:
        return Call("PUT", _of(song_id), SongUpdated, given)
    return Call("PUT", _of(song_id), SongUpdated, {} if given is None else {"metadata": given}, arguments.audio(audio))


def delete_song(song_id: str) -> Call[SongUpdated]:
    """Remove a song. Needs a key that may write.

    RequestError 404 when the index does not hold it, which may also be because the response to a first request was
    lost.
    """
    return Call("DELETE", _of(song_id), SongUpdated)


def index() -> Call[ServedIndexResponse]:
    """What is served."""
    return Call("GET", "/v1/index", ServedIndexResponse)


def activate(version: str) -> Call[Activated]:
    """Serve another index of the workspace. Needs a key that may write."""
    return Call("POST", "/v1/index/activate", Activated, {"version": arguments.text(version, "version")})


def ready() -> Call[Ready]:
    """Whether models and index are loaded, asked once: RequestError 503 while they are not."""
    return Call("GET", "/readyz", Ready, again=False)


def alive() -> Call[Alive]:
    """Whether the process answers, asked once."""
    return Call("GET", "/healthz", Alive, again=False)


def _of(song_id: str) -> str:
    escaped = quote(arguments.song_id(song_id, "song_id"), safe="")
    return (
        f"/v1/songs/{escaped if escaped.strip('.') else escaped.replace('.', '%2E')}"  # '..' would be the folder above
    )


def _checked(options: Options) -> dict[str, Any]:
    """The options as JSON holds them, without those that are None. Raises ArgumentError, also for one that does not
    exist.
    """
    for name in options:
        if name not in OPTIONS:
            raise arguments.unknown(name, OPTIONS)
    return {name: OPTIONS[name](value, name) for name, value in options.items() if value is not None}


def _played(item: Heard | str, name: str) -> dict[str, Any]:
    if not isinstance(item, Heard):
        return asdict(Heard(arguments.song_id(item, name)))
    return {
        "song_id": arguments.song_id(item.song_id, f"{name}.song_id"),
        "weight": arguments.number(item.weight, f"{name}.weight"),
        "timestamp": None if item.timestamp is None else arguments.number(item.timestamp, f"{name}.timestamp"),
    }


def _fields(values: Mapping[str, Any]) -> dict[str, str]:
    """As a form or an address carries them: anything but text as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _read(audio: Audio) -> tuple[str, bytes]:
    """A file's name, of which only the suffix matters, and its bytes. Raises ArgumentError, and OSError for a file that
    cannot be read.
    """
    if isinstance(audio, bytes | bytearray | memoryview):
        return "audio", bytes(audio)
    name = Path(audio if isinstance(audio, str | Path) else str(getattr(audio, "name", ""))).name
    sendable = name.encode("utf-8", "replace").decode() or "audio"
    if isinstance(audio, str | Path):
        return sendable, Path(audio).read_bytes()
    return sendable, arguments.file_content(audio.read())
