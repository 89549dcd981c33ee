"""Signed, expiring URLs of the audio of one song (docs/decisions/0021-signed-urls.md).

A media element of a web page cannot send an Authorization header, so a page that has an API key requests such a URL and
plays it.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import time
from collections.abc import Callable

from itsdangerous import Signer

from htcl_ray.serving.middleware.request_line import SONGS, song_path

LIFETIME_SECONDS = 300
KEY_BYTES = 32
_QUERY = re.compile(rb"expires=(\d{1,15})&signature=([0-9A-Za-z_-]{43})")


def new_signing_key() -> bytes:
    """Generate a random key, which all replicas of an application share."""
    return secrets.token_bytes(KEY_BYTES)


def audio_path(song_id: str) -> str:
    """Percent-encoded path of a song's audio, as routing sees it."""
    return f"{song_path(song_id)}/audio"


class SignedUrls:
    """Makes and verifies the URLs. The signature is HMAC-SHA256 over the time of expiry and the path.

    `clock`: seconds since 1970.
    """

    def __init__(self, key: bytes, clock: Callable[[], float] = time.time) -> None:
        self._signer = Signer(key, salt=b"htcl audio URL", key_derivation="hmac", digest_method=hashlib.sha256)
        self._clock = clock

    def make(self, song_id: str) -> tuple[str, int]:
        """Path and query of the song's audio, and when the URL expires, in seconds since 1970."""
        expires = int(self._clock()) + LIFETIME_SECONDS
        path = audio_path(song_id)
        signature = self._signer.get_signature(_content(path, str(expires))).decode("ascii")
        return f"{path}?expires={expires}&signature={signature}", expires

    def allows(self, method: str, path: str, query: bytes) -> bool:
        """Whether the query signs a GET or HEAD of this path, in the form of `audio_path`, and has not expired."""
        if method not in ("GET", "HEAD") or not path.startswith(SONGS) or not path.endswith("/audio"):
            return False
        match = _QUERY.fullmatch(query)
        if match is None:
            return False
        expires = match[1].decode()
        is_valid = self._signer.verify_signature(_content(path, expires), match[2])
        return is_valid and int(expires) > self._clock()


def _content(path: str, expires: str) -> bytes:
    return f"{expires}\n{path}".encode("utf-8", "surrogatepass")
