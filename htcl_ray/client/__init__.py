"""Client of the HTTP application, synchronous and asynchronous; loads neither torch nor Ray nor FAISS.

with Client("http://127.0.0.1:8000") as client:
    for song in client.search("calm piano", k=5, blend=0.3).results:
        print(song.score, song.title)
"""

from htcl_ray.api.requests import Play
from htcl_ray.api.responses import (
    Activated,
    Alive,
    EmbeddingResponse,
    Ready,
    RecommendResponse,
    Result,
    SearchResponse,
    ServedIndexResponse,
    Song,
    SongUpdated,
)
from htcl_ray.client.clients import AsyncClient, Client
from htcl_ray.client.retries import Retries
from htcl_ray.errors import ArgumentError, NoResponseError, RequestError

__all__ = [
    "Activated",
    "Alive",
    "ArgumentError",
    "AsyncClient",
    "Client",
    "EmbeddingResponse",
    "NoResponseError",
    "Play",
    "Ready",
    "RecommendResponse",
    "RequestError",
    "Result",
    "Retries",
    "SearchResponse",
    "ServedIndexResponse",
    "Song",
    "SongUpdated",
]
