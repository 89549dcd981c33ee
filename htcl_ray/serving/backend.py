"""What the routes need of the process that they run in."""

from __future__ import annotations

from typing import Protocol

from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.vectors import Vectors


class Backend(Protocol):
    """The ingress replica; in tests, anything with these."""

    @property
    def live(self) -> LiveIndex:
        """What is served, and where it is changed. A request takes `live.active` once, so that its answer comes from
        one index whole.
        """

    async def encode_text(self, text: str) -> Vectors:
        """One row of vectors."""

    async def encode_audio(self, data: bytes) -> Vectors:
        """One row of vectors of an audio file's bytes: of its first clip, as the catalogue is embedded. Raises
        AudioError.
        """

    async def encode_song(self, data: bytes) -> Vectors:
        """The same vectors, of a song that is put into the index: neither cached nor measured as a query. Raises
        AudioError.
        """

    async def check_ready(self) -> None:
        """Raise unless the models are loaded."""
