"""How music players send an API key: as the parameter `apiKey` (OpenSubsonic's extension apiKeyAuthentication), under
/rest only.

What was sent is taken out of the address, so that nothing behind it can log or repeat it.
"""

from __future__ import annotations

from urllib.parse import parse_qs, unquote_plus

from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.serving.api_keys import WITHOUT_KEY, Keys
from htcl_ray.serving.subsonic.subsonic_responses import Code, Failed, write

PREFIX = "/rest/"
_CREDENTIALS = ("apiKey", "u", "p", "t", "s")


class SubsonicKeys:
    """ASGI middleware before `Authentication`: turns a valid `apiKey` into an Authorization header, or replies with the
    failure.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or reply."""
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        sent = parse_qs(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        scope["query_string"] = _without_credentials(scope["query_string"])
        if scope["path"] not in WITHOUT_KEY:
            failed = self._check(scope, sent)
            if failed is not None:
                await write(failed, sent.get("f", [None])[-1])(scope, receive, send)
                return
            if "apiKey" in sent:
                scope["headers"] = [*scope["headers"], (b"authorization", f"Bearer {sent['apiKey'][0]}".encode())]
        await self._app(scope, receive, send)

    def _check(self, scope: Scope, sent: dict[str, list[str]]) -> Failed | None:
        headers = [value.decode("latin-1") for name, value in scope["headers"] if name == b"authorization"]
        others = [name for name in _CREDENTIALS[1:] if name in sent]
        if "apiKey" in sent:
            if others or headers or len(sent["apiKey"]) > 1:
                return Failed.of(
                    Code.CONFLICTING,
                    "there is more than an apiKey; send it once, and neither u, p, t, s nor Authorization",
                )
            key = sent["apiKey"][0]
            if not key.isascii() or self._keys.find(key) is None:
                return Failed.of(Code.INVALID_KEY, "the apiKey is not one that this server knows")
        elif headers:
            if len(headers) > 1 or self._keys.find(headers[0].partition(" ")[2].strip()) is None:
                return Failed.of(Code.INVALID_KEY, "the API key is not one that this server knows")
        elif self._keys.reads_need_key:
            if "t" in others:
                return Failed.of(
                    Code.NO_TOKENS, "this server knows no tokens; send an API key as apiKey, without u, t and s"
                )
            if others:
                return Failed.of(
                    Code.NO_PASSWORDS, "this server knows no passwords; send an API key as apiKey, without u and p"
                )
            return Failed.of(Code.MISSING, "an API key is needed: send it as apiKey")
        return None


def _without_credentials(query: bytes) -> bytes:
    return b"&".join(
        part
        for part in query.split(b"&")
        if unquote_plus(part.partition(b"=")[0].decode("latin-1")) not in _CREDENTIALS
    )
