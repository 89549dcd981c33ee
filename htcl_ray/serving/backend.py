"""Interface between the HTTP routes and the process that they run in: its index, its encoders, and its workspace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from fastapi.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.serving.haproxy import RETRY

Returned = TypeVar("Returned")


class Backend(Protocol):
    """The ingress replica, or a replacement of it in tests."""

    @property
    def live(self) -> LiveIndex:
        """The served index and its updates.

        A request reads `live.active` once, so that its whole response comes from one index.
        """

    async def encode_text(self, text: str) -> Vectors:
        """Vectors of a text, one row."""

    async def encode_audio(self, data: bytes) -> Vectors:
        """Vectors of the first clip of an audio file, one row, as for songs of the catalogue.

        Raises AudioError, and QueryError for models that take no audio.
        """

    async def encode_song(self, data: bytes) -> Vectors:
        """Vectors of an audio file that is added to the index; neither cached nor counted as a query.

        Raises AudioError.
        """

    async def encode_vector(self, vector: Sequence[float]) -> Vectors:
        """Vectors of a song by its given vector, for models that were trained on given vectors.

        Raises QueryError for another width, and for models that take audio.
        """

    async def check_ready(self) -> None:
        """Raise unless the models are loaded."""


async def with_storage(call: Callable[..., Returned], *arguments: object) -> Returned:
    """Run a call that reads or writes the workspace in a thread. Raises HTTPException (503) when the storage fails."""
    try:
        return await run_in_threadpool(call, *arguments)
    except OSError as error:
        raise HTTPException(503, "the workspace cannot be read or written now; try again", RETRY) from error
