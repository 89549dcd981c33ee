"""Addresses of audio that carry their own leave: signed, for one song, and for minutes only.

A media element of a web page cannot send an Authorization header, so a page with a key asks for such an address and
plays that.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable

from htcl_ray.serving.middleware.request_line import SONGS, song_path

LIFETIME_SECONDS = 300
KEY_BYTES = 32
_QUERY = re.compile(rb"expires=(\d{1,15})&signature=([0-9a-f]{64})")


def new_signing_key() -> bytes:
    """A random key; all replicas of an application share one."""
    return secrets.token_bytes(KEY_BYTES)


def audio_path(song_id: str) -> str:
    """Path of a song's audio, percent-encoded, as routing sees it."""
    return f"{song_path(song_id)}/audio"


class SignedUrls:
    """Makes and checks addresses. The signature is HMAC-SHA256 (RFC 2104) over the moment of expiry and the path."""

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._key = key
        self._clock = clock

    def make(self, song_id: str) -> tuple[str, int]:
        """Path with query of the song's audio, and when it expires, in seconds since 1970."""
        expires = int(self._clock()) + LIFETIME_SECONDS
        path = audio_path(song_id)
        return f"{path}?expires={expires}&signature={self._signature(path, str(expires))}", expires

    def allows(self, method: str, path: str, query: bytes) -> bool:
        """Whether a request of this method for this path, as `audio_path` gives it, with this query carries a signature
        valid now.
        """
        if method not in ("GET", "HEAD") or not path.startswith(SONGS) or not path.endswith("/audio"):
            return False
        match = _QUERY.fullmatch(query)
        if match is None:
            return False
        expires = match[1].decode()
        is_ours = hmac.compare_digest(self._signature(path, expires).encode(), match[2])
        return is_ours and int(expires) > self._clock()

    def _signature(self, path: str, expires: str) -> str:
        content = f"{expires}\n{path}".encode("utf-8", "surrogatepass")
        return hmac.new(self._key, content, hashlib.sha256).hexdigest()
