"""The address of the client, behind HAProxy and the proxies that the configuration trusts."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.serving.haproxy import RETRY, TOKEN_HEADER
from htcl_ray.serving.responses import failure

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class ClientAddress:
    """ASGI middleware: sets scope["client"], and rejects a request that the HAProxy of another application sent here.

    `trusted_proxies`: networks whose X-Forwarded-For is believed. `token`: of this application's HAProxy, which appends
    the address of its peer; empty without one. A replica can get the port of another application's dead one before the
    HAProxy of that has noticed.
    """

    def __init__(self, app: ASGIApp, trusted_proxies: Sequence[str], token: str = "") -> None:
        self._app = app
        self._trusted = [ipaddress.ip_network(network) for network in trusted_proxies]
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or respond with 503."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            sent = headers.get(TOKEN_HEADER)
            from_front = sent is not None and self._token != ""
            if (
                sent is not None
                and self._token
                and not hmac.compare_digest(sent.encode("latin-1"), self._token.encode())
            ):
                await failure(503, "this replica belongs to another application; try again", headers=RETRY)(
                    scope, receive, send
                )
                return
            peer = scope.get("client") or ("unknown", 0)
            forwarded = [
                address.strip() for value in headers.getlist("x-forwarded-for") for address in value.split(",")
            ]
            hops = forwarded if from_front and forwarded else [*forwarded, peer[0]]
            scope["client"] = (client_of_hops(hops, self._trusted), peer[1])
        await self._app(scope, receive, send)


def client_of_hops(hops: Sequence[str], trusted: Sequence[Network]) -> str:
    """The last of `hops` that is not a trusted proxy, or the first one when all are.

    `hops`: addresses, from the one that the client claims to that of the peer, which is known. Each proxy vouches for
    the one before it, so nothing before the last that is not trusted counts.
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
