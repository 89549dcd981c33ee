"""Identity of the client: its address behind HAProxy and trusted proxies, or the name of its API key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.serving.error_responses import failure
from htcl_ray.serving.haproxy import RETRY, TOKEN_HEADER

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ClientAddress:
    """ASGI middleware: set scope["client"], and reject a request that the HAProxy of another application sent here.

    `trusted_proxies`: networks whose X-Forwarded-For is believed. `token`: secret of this application's HAProxy, which
    appends the address of its peer; empty without one. A replica can get the port of a replica of another application
    that has died, before the HAProxy of that application notices.
    """

    def __init__(self, app: ASGIApp, trusted_proxies: Sequence[str], token: str = "") -> None:
        self._app = app
        self._trusted = [ipaddress.ip_network(network) for network in trusted_proxies]
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 503."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            sent = headers.get(TOKEN_HEADER)
            from_haproxy = sent is not None and self._token != ""
            if (
                sent is not None
                and self._token
                and not hmac.compare_digest(sent.encode("latin-1"), self._token.encode())
            ):
                message = "this replica belongs to another application; try again"
                await failure(503, message, headers=RETRY)(scope, receive, send)
                return
            peer = scope.get("client") or ("unknown", 0)
            forwarded = [
                address.strip() for value in headers.getlist("x-forwarded-for") for address in value.split(",")
            ]
            hops = forwarded if from_haproxy and forwarded else [*forwarded, peer[0]]
            scope["client"] = (client_of_hops(hops, self._trusted), peer[1])
        await self._app(scope, receive, send)


def client_of(scope: Scope) -> str:
    """Identity of a client for limits: the name of its key, else its address, cut to the /64 network for IPv6."""
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


def client_of_hops(hops: Sequence[str], trusted: Sequence[Network]) -> str:
    """Last address in `hops` that is not a trusted proxy, or the first one when all are.

    `hops`: addresses from the one that the client claims to that of the peer, which is certain. A proxy vouches for the
    address before its own, so no address before the last untrusted one counts.
    """
    for hop in reversed(hops):
        if not _is_in(hop, trusted):
            return hop
    return hops[0]


def _is_in(hop: str, networks: Sequence[Network]) -> bool:
    try:
        address = ipaddress.ip_address(hop)
    except ValueError:
        return False
    plain = getattr(address, "ipv4_mapped", None) or address
    return any(plain in network for network in networks)
