"""Remembered queries: encoded once, bounded, and failures are not remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from htcl_ray.index.vectors import Vectors
from htcl_ray.search.query_cache import QueryCache

pytestmark = pytest.mark.unit


class Encoding:
    """Counts its calls; each gives another vector."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error

    def __call__(self) -> Awaitable[Vectors]:
        return self._encode()

    async def _encode(self) -> Vectors:
        self.calls += 1
        number = self.calls
        await asyncio.sleep(0.01)
        if self.error:
            raise self.error
        return Vectors(np.full((1, 2), number, dtype=np.float32))


def ask(
    cache: QueryCache, content: bytes, encode: Callable[[], Awaitable[Vectors]], kind: str = "text"
) -> Awaitable[tuple[Vectors, bool]]:
    return cache.get(kind, content, encode)


def test_the_same_content_is_encoded_once():
    async def run() -> None:
        cache, encode = QueryCache(3), Encoding()
        first, hit = await ask(cache, b"a", encode)
        again, hit_again = await ask(cache, b"a", encode)
        assert (hit, hit_again, encode.calls) == (False, True, 1)
        assert again is first

    asyncio.run(run())


def test_the_same_bytes_of_another_kind_are_another_query():
    async def run() -> None:
        cache, encode = QueryCache(3), Encoding()
        await ask(cache, b"a", encode)
        assert not (await ask(cache, b"a", encode, "audio"))[1]
        assert encode.calls == 2

    asyncio.run(run())


def test_asked_at_the_same_time_it_is_encoded_once():
    async def run() -> None:
        cache, encode = QueryCache(3), Encoding()
        answers = await asyncio.gather(*(ask(cache, b"a", encode) for _ in range(20)))
        assert encode.calls == 1
        assert len({id(vectors) for vectors, _ in answers}) == 1

    asyncio.run(run())


def test_one_who_stops_waiting_takes_nothing_from_the_others():
    async def run() -> None:
        cache, encode = QueryCache(3), Encoding()
        impatient = asyncio.ensure_future(ask(cache, b"a", encode))
        patient = asyncio.ensure_future(ask(cache, b"a", encode))
        await asyncio.sleep(0.001)
        impatient.cancel()
        assert (await patient)[0].semantic[0, 0] == 1
        assert impatient.cancelled()
        assert encode.calls == 1

    asyncio.run(run())


def test_a_failure_reaches_everyone_and_is_forgotten():
    async def run() -> None:
        cache, encode = QueryCache(3), Encoding(ValueError("broken"))
        failed = await asyncio.gather(*(ask(cache, b"a", encode) for _ in range(3)), return_exceptions=True)
        assert [str(error) for error in failed] == ["broken"] * 3
        assert len(cache) == 0
        encode.error = None
        assert not (await ask(cache, b"a", encode))[1]

    asyncio.run(run())


def test_the_least_recently_asked_goes_first():
    async def run() -> None:
        cache, encode = QueryCache(2), Encoding()
        for content in (b"a", b"b", b"a", b"c"):
            await ask(cache, content, encode)
        assert len(cache) == 2
        assert (await ask(cache, b"a", encode))[1]
        assert not (await ask(cache, b"b", encode))[1]

    asyncio.run(run())


def test_without_entries_nothing_is_remembered():
    async def run() -> None:
        cache, encode = QueryCache(0), Encoding()
        for _ in range(2):
            assert not (await ask(cache, b"a", encode))[1]
        assert (encode.calls, len(cache)) == (2, 0)

    asyncio.run(run())
