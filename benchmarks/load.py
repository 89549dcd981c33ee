"""An open-loop load generator for HTTP on loopback: requests are sent at fixed times, independently of responses.

A closed loop waits for responses, so it slows down with the server and hides the server's queue. Here latency counts
from the time at which a request was due, which includes waiting for a free connection and for the generator itself.
`late` measures the delay of the generator; results are valid only while it stays small.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import numpy as np

CONNECTIONS = 256
TIMEOUT_SECONDS = 30.0


@dataclass
class Outcome:
    """Responses to the requests that were due within the measured time."""

    rate: float
    """Target rate, requests per second."""
    seconds: float
    statuses: Counter[int] = field(default_factory=Counter)
    """Requests by HTTP status; 0 for no response."""
    accepted: list[float] = field(default_factory=list)
    """Latency in seconds of each response with status 200."""
    rejected: list[float] = field(default_factory=list)
    """Latency in seconds of each other request."""
    late: list[float] = field(default_factory=list)
    """Delay in seconds between due time and sending."""

    @property
    def throughput(self) -> float:
        """Responses with status 200 per second."""
        return len(self.accepted) / self.seconds

    def percentile(self, percent: float) -> float | None:
        """Percentile of the latency of accepted requests in milliseconds; None without any."""
        return float(np.percentile(self.accepted, percent) * 1000) if self.accepted else None

    def as_json(self) -> dict[str, object]:
        """Convert to the row of a table or a JSON file."""
        return {
            "asked_per_second": round(self.rate, 1),
            "answered_per_second": round(self.throughput, 1),
            "p50_ms": _round(self.percentile(50)),
            "p95_ms": _round(self.percentile(95)),
            "p99_ms": _round(self.percentile(99)),
            "statuses": {str(status): count for status, count in sorted(self.statuses.items())},
            "rejected_p99_ms": _round(float(np.percentile(self.rejected, 99) * 1000)) if self.rejected else None,
            "generator_late_p99_ms": _round(float(np.percentile(self.late, 99) * 1000)) if self.late else None,
        }


def request_bytes(url: str, method: str, path: str, body: bytes = b"", content_type: str = "application/json") -> bytes:
    """Encode an HTTP/1.1 request."""
    head = f"{method} {path} HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\n"
    if body:
        head += f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
    return head.encode() + b"\r\n" + body


async def drive(
    url: str, requests: Iterator[bytes], rate: float, seconds: float, seed: int = 0, warm_seconds: float = 1.0
) -> Outcome:
    """Send `requests` at `rate` per second with exponential gaps.

    The first `warm_seconds` are not measured; the next `seconds` are.
    """
    address = urlsplit(url)
    pool: asyncio.LifoQueue[_Connection] = asyncio.LifoQueue()
    for _ in range(CONNECTIONS):
        pool.put_nowait(_Connection(address.hostname or "127.0.0.1", address.port or 80))
    outcome = Outcome(rate, seconds)
    gaps = np.random.default_rng(seed).exponential(1 / rate, size=int(rate * (seconds + warm_seconds) * 1.5) + 100)
    due = np.cumsum(gaps)
    due = due[due < seconds + warm_seconds]
    start = time.perf_counter() + 0.05
    running: set[asyncio.Task[None]] = set()
    for number, offset in enumerate(due):
        at = start + offset
        wait = at - time.perf_counter()
        if wait > 0.0005:
            await asyncio.sleep(wait)
        elif number % 50 == 0:
            await asyncio.sleep(0)
        measured = offset >= warm_seconds
        if measured:
            outcome.late.append(max(0.0, time.perf_counter() - at))
        task = asyncio.create_task(_send(pool, next(requests), at, outcome if measured else None))
        running.add(task)
        task.add_done_callback(running.discard)
    if running:
        await asyncio.wait(running, timeout=TIMEOUT_SECONDS)
    while not pool.empty():
        pool.get_nowait().close()
    return outcome


async def _send(pool: asyncio.LifoQueue[_Connection], request: bytes, due: float, outcome: Outcome | None) -> None:
    connection = await pool.get()
    try:
        status = await asyncio.wait_for(connection.send(request), TIMEOUT_SECONDS)
    except (OSError, EOFError, ValueError, TimeoutError, asyncio.IncompleteReadError):
        connection.close()
        status = 0
    finally:
        pool.put_nowait(connection)
    if outcome is not None:
        seconds = time.perf_counter() - due
        outcome.statuses[status] += 1
        (outcome.accepted if status == 200 else outcome.rejected).append(seconds)


class _Connection:
    """A keep-alive connection that opens on first use."""

    def __init__(self, host: str, port: int) -> None:
        self._address = host, port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def send(self, request: bytes) -> int:
        """Send a request, read the whole response and return its status."""
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection(*self._address, limit=1 << 20)
        assert self._reader is not None
        self._writer.write(request)
        head = await self._reader.readuntil(b"\r\n\r\n")
        lowered = head.lower()
        length = lowered.find(b"content-length:")
        if length >= 0:
            await self._reader.readexactly(int(lowered[length + 15 : lowered.index(b"\r\n", length)]))
        elif b"transfer-encoding: chunked" in lowered:
            while (size := int(await self._reader.readline(), 16)) > 0:
                await self._reader.readexactly(size + 2)
            await self._reader.readline()
        if b"connection: close" in lowered:
            self.close()
        return int(head[9:12])

    def close(self) -> None:
        """Close the connection."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


def _round(value: float | None) -> float | None:
    return None if value is None else round(value, 2)
