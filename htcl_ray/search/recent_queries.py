"""State that a replica keeps of recent queries: a cache of their vectors, and their drift from the indexed songs."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors

CENTROID_SONGS = 10_000
"""Maximum number of songs whose mean represents the index."""
DECAY_QUERIES = 200
"""Number of queries after which the weight of an old one has decayed to 1/e."""


class QueryCache:
    """LRU cache of query vectors, keyed by a hash of the query's content, for one asyncio loop.

    Concurrent requests for the same query share one encoding. `entries`: maximum number of queries; 0 disables the
    cache.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._tasks: OrderedDict[bytes, asyncio.Task[Vectors]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tasks)

    def contains(self, kind: str, content: bytes) -> bool:
        """Whether `get` returns without waiting."""
        task = self._tasks.get(_key(kind, content))
        return task is not None and task.done()

    async def get(self, kind: str, content: bytes, encode: Callable[[], Awaitable[Vectors]]) -> tuple[Vectors, bool]:
        """The vectors, and whether they came from the cache.

        A failed encoding raises in every waiting request and is not cached.
        """
        if not self._entries:
            return await encode(), False
        key = _key(kind, content)
        task = self._tasks.get(key)
        hit = task is not None
        if task is None:
            task = asyncio.ensure_future(_awaited(encode))
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._drop_failure(key, done))
            while len(self._tasks) > self._entries:
                self._tasks.popitem(last=False)
        else:
            self._tasks.move_to_end(key)
        return await asyncio.shield(task), hit  # a cancelled request does not cancel the encoding of the others

    def _drop_failure(self, key: bytes, done: asyncio.Task[Vectors]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._tasks.get(key) is done:
            del self._tasks[key]


def _key(kind: str, content: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + b"\0" + content).digest()


async def _awaited(encode: Callable[[], Awaitable[Vectors]]) -> Vectors:
    return await encode()


def index_centroid(index: SongIndex) -> NDArray[np.float64]:
    """Mean semantic vector of the index, [dim], estimated from evenly spaced songs of a large index.

    Zeros for an empty index.
    """
    ids = index.songs["song_id"].to_pylist()
    known = [song_id for song_id in ids[:: -(-len(ids) // CENTROID_SONGS) or 1] if song_id in index]
    return index.vectors_of(known).semantic.mean(axis=0, dtype=np.float64) if known else np.zeros(index.dim)


class QueryDrift:
    """Drift of the queries: 1 - cosine of the exponentially weighted mean query vector and the index centroid.

    Text and audio lie in different regions of the semantic space, so each kind of query needs its own instance. Monitor
    changes of the drift; its level depends on the model.
    """

    def __init__(self) -> None:
        self._sum: NDArray[np.float64] | None = None

    def add(self, query: NDArray[np.floating], centroid: NDArray[np.float64]) -> float:
        """Add one query [dim] and return the drift, in [0, 2]; 0 when either mean is zero."""
        self._sum = query.astype(np.float64) if self._sum is None else self._sum * np.exp(-1 / DECAY_QUERIES) + query
        lengths = np.linalg.norm(self._sum) * np.linalg.norm(centroid)
        return float(1 - self._sum @ centroid / lengths) if lengths else 0.0
