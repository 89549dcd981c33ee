"""Vectors of queries that came lately, by the hash of their content."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from htcl_ray.index.vectors import Vectors


class QueryCache:
    """The last `entries` queries of one asyncio loop. The same query asked while it is being encoded is encoded
    once.
    """

    def __init__(self, entries: int) -> None:
        self._entries = entries
        self._tasks: OrderedDict[bytes, asyncio.Task[Vectors]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._tasks)

    def remembers(self, kind: str, content: bytes) -> bool:
        """Whether `get` returns without waiting."""
        task = self._tasks.get(_key(kind, content))
        return task is not None and task.done()

    async def get(self, kind: str, content: bytes, encode: Callable[[], Awaitable[Vectors]]) -> tuple[Vectors, bool]:
        """The vectors, and whether they were remembered. A failure reaches everyone who waits for it and is
        forgotten.
        """
        if not self._entries:
            return await encode(), False
        key = _key(kind, content)
        task = self._tasks.get(key)
        hit = task is not None
        if task is None:
            task = asyncio.ensure_future(_awaited(encode))
            self._tasks[key] = task
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            while len(self._tasks) > self._entries:
                self._tasks.popitem(last=False)
        else:
            self._tasks.move_to_end(key)
        return await asyncio.shield(task), hit  # one who stops waiting does not take the vectors from the others

    def _forget_failure(self, key: bytes, done: asyncio.Task[Vectors]) -> None:
        failed = done.cancelled() or done.exception() is not None
        if failed and self._tasks.get(key) is done:
            del self._tasks[key]


def _key(kind: str, content: bytes) -> bytes:
    return hashlib.sha256(kind.encode() + b"\0" + content).digest()


async def _awaited(encode: Callable[[], Awaitable[Vectors]]) -> Vectors:
    return await encode()
