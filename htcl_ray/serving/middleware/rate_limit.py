"""How often one client may call: a token bucket for each key, or for each address without one."""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable

from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.serving.haproxy import PROBES
from htcl_ray.serving.responses import failure

MAX_BUCKETS = 10_000


class TokenBuckets:
    """A bucket for each client: `burst` tokens, refilled with `rate` a second. Remembers the `size` clients that called
    last.
    """

    def __init__(
        self, rate: float, burst: int, size: int = MAX_BUCKETS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._interval = 1 / rate
        self._burst = burst
        self._size = size
        self._clock = clock
        self._full_at: OrderedDict[str, float] = OrderedDict()
        """When each client's bucket will be full again: all that there is to know of it."""

    def take(self, client: str) -> float:
        """Take a token and return 0, or, when there is none, return the seconds until there is one."""
        now = self._clock()
        full_at = max(self._full_at.get(client, now), now) + self._interval
        missing = full_at - now - self._burst * self._interval
        if missing > 1e-9:
            return missing
        self._full_at[client] = full_at
        self._full_at.move_to_end(client)
        while len(self._full_at) > self._size:
            self._full_at.popitem(last=False)
        return 0.0

    def __len__(self) -> int:
        return len(self._full_at)


class RateLimit:
    """ASGI middleware: 429 with Retry-After to a client that calls too often. Behind `ClientAddress`, which knows the
    addresses.
    """

    def __init__(self, app: ASGIApp, buckets: TokenBuckets) -> None:
        self._app = app
        self._buckets = buckets

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 429."""
        if scope["type"] == "http" and scope["path"] not in PROBES:
            wait = self._buckets.take(client_of(scope))
            if wait:
                seconds = math.ceil(wait)
                answer = failure(
                    429, f"too many requests; try again in {seconds} s", "rate_limited", {"Retry-After": str(seconds)}
                )
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)


def client_of(scope: Scope) -> str:
    """Who asks: the name of the key, or the address, of which an IPv6 subscriber has 2⁶⁴."""
    key = scope.get("state", {}).get("key")
    if key is not None:
        return f"key {key.name}"
    address = (scope.get("client") or ("unknown", 0))[0]
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return f"address {address}"
    if isinstance(parsed, ipaddress.IPv6Address):
        parsed = parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False).network_address
    return f"address {parsed}"
