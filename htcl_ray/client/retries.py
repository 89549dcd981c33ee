"""When a request is sent again: what may pass by itself, for so many times and so long."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from htcl_ray.client.arguments import number, whole_number
from htcl_ray.errors import ArgumentError

AGAIN = frozenset({429, 503})
BROKEN = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
)
"""Failures of the connection. That the server took too long is none: to ask again would make it longer."""


@dataclass(frozen=True)
class Retries:
    """Waits as long as the server says with Retry-After, and otherwise twice as long each time; always a random part
    more or less.
    """

    attempts: int = 5
    """Requests at most; 1 sends none again."""
    seconds: float = 60.0
    """No request begins later than this after the first."""
    first_wait: float = 0.25
    longest_wait: float = 8.0
    """Seconds, where the server says nothing."""

    def __post_init__(self) -> None:
        if whole_number(self.attempts, "attempts") < 1:
            raise ArgumentError(f"attempts is {self.attempts}; expected at least 1")
        for name in ("seconds", "first_wait", "longest_wait"):
            if number(getattr(self, name), name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected seconds, 0 or more")

    def begin(self) -> Attempts:
        """For one request."""
        return Attempts(self)


class Attempts:
    """Of one request."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._begun = time.monotonic()
        self._done = 0

    def wait_after(self, outcome: httpx.Response | httpx.RequestError) -> float | None:
        """Seconds to wait before the request is sent again, or None when this is its end."""
        self._done += 1
        if not _passes(outcome) or self._done >= self._retries.attempts:
            return None
        told = retry_after(outcome) if isinstance(outcome, httpx.Response) else None
        if told is None:
            wait = min(self._retries.first_wait * 2 ** (self._done - 1), self._retries.longest_wait) * random.uniform(
                0.5, 1
            )
        else:
            wait = told + random.uniform(
                0, self._retries.first_wait
            )  # so that all who were told the same do not come back at once
        late = time.monotonic() - self._begun + wait > self._retries.seconds
        return None if late else wait


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the header Retry-After says, as a number or a date; None without a usable one."""
    told = response.headers.get("retry-after", "").strip()
    if told.isdecimal() and len(told) < 10:
        return float(told)
    try:
        when = email.utils.parsedate_to_datetime(told)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _passes(outcome: httpx.Response | httpx.RequestError) -> bool:
    return outcome.status_code in AGAIN if isinstance(outcome, httpx.Response) else isinstance(outcome, BROKEN)
