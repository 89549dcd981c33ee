"""Query cache (one encoding per query, LRU, failures are not cached) and query drift against closed forms."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

import numpy as np
import pytest

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.recent_queries import DECAY_QUERIES, QueryCache, QueryDrift, index_centroid

pytestmark = pytest.mark.unit


class Encoding:
    """Encoder that counts its calls and returns another vector each time, after `release` is set."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = 0
        self.error = error
        self.release = asyncio.Event()
        self.release.set()

    def __call__(self) -> Awaitable[Vectors]:
        return self._encode()

    async def _encode(self) -> Vectors:
        self.calls += 1
        number = self.calls
        await self.release.wait()
        if self.error:
            raise self.error
        return Vectors(np.full((1, 2), number, dtype=np.float32))


class TestQueryCache:
    def test_repeated_content_is_encoded_once(self):
        async def run() -> None:
            cache, encode = QueryCache(3), Encoding()
            first, first_hit = await cache.get("text", b"a", encode)
            second, second_hit = await cache.get("text", b"a", encode)
            assert (first_hit, second_hit, encode.calls) == (False, True, 1)
            assert second is first

        asyncio.run(run())

    def test_kinds_have_separate_entries(self):
        async def run() -> None:
            cache, encode = QueryCache(3), Encoding()
            await cache.get("text", b"a", encode)
            assert not (await cache.get("audio", b"a", encode))[1]
            assert encode.calls == 2

        asyncio.run(run())

    def test_concurrent_requests_share_one_encoding(self):
        async def run() -> None:
            cache, encode = QueryCache(3), Encoding()
            encode.release.clear()
            requests = [asyncio.ensure_future(cache.get("text", b"a", encode)) for _ in range(20)]
            await asyncio.sleep(0)
            assert not cache.contains("text", b"a")
            encode.release.set()
            responses = await asyncio.gather(*requests)
            assert encode.calls == 1
            assert cache.contains("text", b"a")
            assert len({id(vectors) for vectors, _ in responses}) == 1

        asyncio.run(run())

    def test_cancelled_request_does_not_cancel_the_others(self):
        async def run() -> None:
            cache, encode = QueryCache(3), Encoding()
            encode.release.clear()
            cancelled = asyncio.ensure_future(cache.get("text", b"a", encode))
            waiting = asyncio.ensure_future(cache.get("text", b"a", encode))
            await asyncio.sleep(0)
            cancelled.cancel()
            encode.release.set()
            assert (await waiting)[0].semantic[0, 0] == 1
            assert cancelled.cancelled()
            assert encode.calls == 1

        asyncio.run(run())

    def test_failure_is_raised_in_every_request_and_not_cached(self):
        async def run() -> None:
            cache, encode = QueryCache(3), Encoding(ValueError("broken"))
            failed = await asyncio.gather(*(cache.get("text", b"a", encode) for _ in range(3)), return_exceptions=True)
            assert [str(error) for error in failed] == ["broken"] * 3
            assert len(cache) == 0
            encode.error = None
            assert not (await cache.get("text", b"a", encode))[1]

        asyncio.run(run())

    def test_least_recently_used_entry_is_evicted(self):
        async def run() -> None:
            cache, encode = QueryCache(2), Encoding()
            for content in (b"a", b"b", b"a", b"c"):
                await cache.get("text", content, encode)
            assert len(cache) == 2
            assert (await cache.get("text", b"a", encode))[1]
            assert not (await cache.get("text", b"b", encode))[1]

        asyncio.run(run())

    def test_zero_entries_disable_the_cache(self):
        async def run() -> None:
            cache, encode = QueryCache(0), Encoding()
            for _ in range(2):
                assert not (await cache.get("text", b"a", encode))[1]
            assert (encode.calls, len(cache)) == (2, 0)

        asyncio.run(run())


class TestQueryDrift:
    def test_centroid_is_the_mean_of_live_songs(self):
        vectors = Vectors(np.eye(4, dtype=np.float32))
        index = SongIndex.build(["a", "b", "c", "d"], vectors)
        np.testing.assert_allclose(index_centroid(index), [0.25] * 4)
        index.remove(["d"])
        np.testing.assert_allclose(index_centroid(index), [1 / 3, 1 / 3, 1 / 3, 0])

    def test_empty_index_has_no_drift(self):
        index = SongIndex.build([], Vectors(np.zeros((0, 3), dtype=np.float32)))
        assert QueryDrift().add(np.array([1.0, 0, 0]), index_centroid(index)) == 0

    def test_drift_is_one_minus_the_cosine(self):
        centroid = np.array([0.6, 0.8])
        assert QueryDrift().add(np.array([0.6, 0.8]), centroid) == pytest.approx(0)
        assert QueryDrift().add(np.array([0.8, -0.6]), centroid) == pytest.approx(1)
        assert QueryDrift().add(np.array([-0.6, -0.8]), centroid) == pytest.approx(2)

    def test_old_queries_decay_exponentially(self):
        """After many queries along x and n along y, the weights are exp(-n / DECAY_QUERIES) and 1 - exp(-n /
        DECAY_QUERIES).
        """
        drift, x, y = QueryDrift(), np.array([1.0, 0.0]), np.array([0.0, 1.0])
        for _ in range(20 * DECAY_QUERIES):
            drift.add(x, x)
        for _ in range(DECAY_QUERIES):
            value = drift.add(y, x)
        along = np.array([np.exp(-1), 1 - np.exp(-1)])
        assert value == pytest.approx(1 - along[0] / np.linalg.norm(along), abs=1e-6)
