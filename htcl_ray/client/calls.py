"""Requests of the HTTP application and the types of their responses. This module sends nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from htcl_ray.api.requests import HALF_LIFE_DAYS, Play
from htcl_ray.api.responses import (
    Activated,
    Alive,
    ApiResponse,
    EmbeddingResponse,
    Ready,
    RecommendResponse,
    SearchResponse,
    ServedIndexResponse,
    Song,
    SongUpdated,
)
from htcl_ray.client import arguments
from htcl_ray.errors import ArgumentError

Audio = str | Path | bytes | BinaryIO
"""A path, the bytes of a file, or a binary file open for reading, in any format that the server decodes."""
Response = TypeVar("Response", bound=ApiResponse)


class SearchKeywords(TypedDict, total=False):
    """Keyword arguments of all searches; the server's defaults apply to absent ones."""

    k: int
    """Number of songs, 1 to 1,000; default 10."""
    blend: float
    """Weight of the preference score, 0 (meaning) to 1; default 0.5, or 0 without stage 2."""
    filter: Mapping[str, Any]
    """Conditions on metadata, such as `{"genre": ["rock"], "year": {"gte": 1990, "lte": 1999}}`."""
    max_per_artist: int
    """Maximum number of songs by one artist."""
    collapse_duplicates: bool
    """Return only the best of several duplicate recordings; default True."""


OPTION_CHECKS = {
    "k": arguments.whole_number,
    "blend": arguments.number,
    "filter": arguments.mapping,
    "max_per_artist": arguments.whole_number,
    "collapse_duplicates": arguments.flag,
}
"""Check of each of `SearchKeywords`."""


@dataclass(frozen=True)
class Call(Generic[Response]):
    """One request and the type of its response."""

    method: str
    path: str
    response: type[Response]
    body: Any = None
    """Sent as JSON, or as the fields of a form next to audio."""
    audio: Audio | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    retry: bool = True
    """Whether a failed request may be retried."""

    def read(self) -> dict[str, Any]:
        """Read the audio, and return the arguments of httpx's `build_request`. Raises OSError."""
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
    **options: Unpack[SearchKeywords],
) -> Call[SearchResponse]:
    """Songs near exactly one of a text, a song, several songs (with negatives), and a vector."""
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


def search_audio(audio: Audio, **options: Unpack[SearchKeywords]) -> Call[SearchResponse]:
    """Songs similar to a recording."""
    return Call("POST", "/v1/search/audio", SearchResponse, _checked(options), arguments.audio(audio))


def recommend(
    history: Sequence[Play | str], *, half_life_days: float = HALF_LIFE_DAYS, **options: Unpack[SearchKeywords]
) -> Call[RecommendResponse]:
    """Songs for a listener with this history, without its songs."""
    body = {
        "history": arguments.each(_history_item, history, "history"),
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
    """Catalogue metadata of a song. Raises RequestError 404 when the index does not contain it."""
    return Call("GET", _song_path(song_id), Song)


def similar(song_id: str, **options: Unpack[SearchKeywords]) -> Call[SearchResponse]:
    """Songs near an indexed song, without the song itself."""
    return Call("GET", f"{_song_path(song_id)}/similar", SearchResponse, parameters=_fields(_checked(options)))


def put_song(
    song_id: str,
    audio: Audio | None = None,
    metadata: Mapping[str, Any] | None = None,
    *,
    vector: Sequence[float] | None = None,
) -> Call[SongUpdated]:
    """Insert or update a song: its audio, its metadata, or both. Needs a key with write scope.

    The given metadata replaces all metadata of the song. `vector`, in place of audio, for models that were trained on
    given vectors.
    """
    given = None if metadata is None else arguments.mapping(metadata, "metadata")
    if vector is not None:
        if audio is not None:
            raise ArgumentError("put_song got audio and a vector; expected one of them")
        numbers = arguments.each(arguments.number, vector, "vector")
        return Call("PUT", _song_path(song_id), SongUpdated, {**(given or {}), "vector": numbers})
    if audio is None:
        return Call("PUT", _song_path(song_id), SongUpdated, given)
    return Call(
        "PUT", _song_path(song_id), SongUpdated, {} if given is None else {"metadata": given}, arguments.audio(audio)
    )


def delete_song(song_id: str) -> Call[SongUpdated]:
    """Delete a song. Needs a key with write scope.

    Raises RequestError 404 when the index does not contain the song, also when a retry follows a deletion whose
    response was lost.
    """
    return Call("DELETE", _song_path(song_id), SongUpdated)


def index() -> Call[ServedIndexResponse]:
    """Description of the index that is served."""
    return Call("GET", "/v1/index", ServedIndexResponse)


def activate(version: str) -> Call[Activated]:
    """Switch to another index of the workspace. Needs a key with write scope."""
    return Call("POST", "/v1/index/activate", Activated, {"version": arguments.text(version, "version")})


def ready() -> Call[Ready]:
    """Readiness, without retries. Raises RequestError 503 until models and index are loaded."""
    return Call("GET", "/readyz", Ready, retry=False)


def alive() -> Call[Alive]:
    """Liveness, without retries."""
    return Call("GET", "/healthz", Alive, retry=False)


def _song_path(song_id: str) -> str:
    escaped = quote(arguments.song_id(song_id, "song_id"), safe="")
    # A path segment '..' would be resolved to the parent.
    return f"/v1/songs/{escaped if escaped.strip('.') else escaped.replace('.', '%2E')}"


def _checked(options: SearchKeywords) -> dict[str, Any]:
    """The options as JSON values, without those that are None. Raises ArgumentError, also for an unknown option."""
    for name in options:
        if name not in OPTION_CHECKS:
            raise arguments.unknown(name, OPTION_CHECKS)
    return {name: OPTION_CHECKS[name](value, name) for name, value in options.items() if value is not None}


def _history_item(item: Play | str, name: str) -> dict[str, Any]:
    if not isinstance(item, Play):
        return asdict(Play(arguments.song_id(item, name)))
    return {
        "song_id": arguments.song_id(item.song_id, f"{name}.song_id"),
        "weight": arguments.number(item.weight, f"{name}.weight"),
        "timestamp": None if item.timestamp is None else arguments.number(item.timestamp, f"{name}.timestamp"),
    }


def _fields(values: Mapping[str, Any]) -> dict[str, str]:
    """The values as form fields or query parameters: text unchanged, all else as JSON."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _read(audio: Audio) -> tuple[str, bytes]:
    """The file name, of which only the suffix matters, and the bytes. Raises ArgumentError and OSError."""
    if isinstance(audio, bytes | bytearray | memoryview):
        return "audio", bytes(audio)
    name = Path(audio if isinstance(audio, str | Path) else str(getattr(audio, "name", ""))).name
    sendable = name.encode("utf-8", "replace").decode() or "audio"
    if isinstance(audio, str | Path):
        return sendable, Path(audio).read_bytes()
    return sendable, arguments.file_content(audio.read())
