"""Retries of transient failures, with exponential backoff and jitter."""

from __future__ import annotations

import email.utils
import random
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

from htcl_ray.client.arguments import number, whole_number
from htcl_ray.errors import ArgumentError

RETRIED_STATUSES = frozenset({429, 503})
CONNECTION_ERRORS = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.ReadError,
    httpx.WriteError,
    httpx.CloseError,
    httpx.RemoteProtocolError,
)
"""Errors that are retried. Timeouts of a response are not among them: a retry would add load to a slow server."""


@dataclass(frozen=True)
class Retries:
    """Retry policy: wait as the header Retry-After says, or else twice as long after each attempt, with jitter."""

    attempts: int = 5
    """Maximum number of requests; 1 disables retries."""
    seconds: float = 60.0
    """No retry starts later than this many seconds after the first request."""
    first_wait: float = 0.25
    """Seconds before the first retry, without a Retry-After header."""
    longest_wait: float = 8.0
    """Maximum seconds before a retry, without a Retry-After header."""

    def __post_init__(self) -> None:
        if whole_number(self.attempts, "attempts") < 1:
            raise ArgumentError(f"attempts is {self.attempts}; expected at least 1")
        for name in ("seconds", "first_wait", "longest_wait"):
            if number(getattr(self, name), name) < 0:
                raise ArgumentError(f"{name} is {getattr(self, name)}; expected seconds, 0 or more")

    def begin(self) -> Attempts:
        """Start counting the attempts of one request."""
        return Attempts(self)


class Attempts:
    """Attempts of one request."""

    def __init__(self, retries: Retries) -> None:
        self._retries = retries
        self._begun = time.monotonic()
        self._done = 0

    def wait_after(self, outcome: httpx.Response | httpx.RequestError) -> float | None:
        """Seconds to wait before the next retry, or None when the outcome is final."""
        self._done += 1
        if not _is_transient(outcome) or self._done >= self._retries.attempts:
            return None
        requested = retry_after(outcome) if isinstance(outcome, httpx.Response) else None
        if requested is None:
            backoff = min(self._retries.first_wait * 2 ** (self._done - 1), self._retries.longest_wait)
            wait = backoff * random.uniform(0.5, 1)
        else:  # jitter, so that clients with the same Retry-After do not return at the same moment
            wait = requested + random.uniform(0, self._retries.first_wait)
        late = time.monotonic() - self._begun + wait > self._retries.seconds
        return None if late else wait


def retry_after(response: httpx.Response) -> float | None:
    """Seconds of the header Retry-After, a number or a date; None without a valid one."""
    value = response.headers.get("retry-after", "").strip()
    if value.isdecimal() and len(value) < 10:
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _is_transient(outcome: httpx.Response | httpx.RequestError) -> bool:
    if isinstance(outcome, httpx.Response):
        return outcome.status_code in RETRIED_STATUSES
    return isinstance(outcome, CONNECTION_ERRORS)
