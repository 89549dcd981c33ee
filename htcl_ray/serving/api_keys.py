"""API keys: the keys of a server, the scopes of each, and the authentication of requests.

The file `serve.api_keys_file`, or the environment variable HTCL_API_KEYS, is a YAML (or JSON) list:

    - name: recommender            # appears in logs; never the key itself
      key: 3vTq…                   # 16 or more characters; python -c 'import secrets; print(secrets.token_urlsafe(32))'
      scopes: [read]
    - name: catalogue
      sha256: 9f86d0…              # instead of key: its SHA-256 in hexadecimal, so that the file reveals no key
      scopes: [write]              # includes read

Requests carry `Authorization: Bearer KEY`. Writing always needs a key with scope write. Reading needs a key when the
application is bound to an address that other machines reach; without any keys, that is a ConfigError. The page,
/openapi.json, the probes and the list of extensions for players never need one. Every other route rejects an unknown
key, even where it needs none. Music players send their key as a parameter (`subsonic/subsonic_routes.py`), and the
audio of a song needs no key at a signed URL that a client with a key requested (`signed_urls.py`).
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from fastapi import Depends, Request
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, SecretStr, TypeAdapter, ValidationError, model_validator
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import ConfigError, first_fault
from htcl_ray.serving.error_responses import failure
from htcl_ray.serving.signed_urls import SignedUrls

ENVIRONMENT = "HTCL_API_KEYS"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
PLAYERS_EXTENSIONS = "/rest/getOpenSubsonicExtensions"
WITHOUT_KEY = frozenset({"/", "/openapi.json", "/healthz", "/readyz", PLAYERS_EXTENSIONS, f"{PLAYERS_EXTENSIONS}.view"})
MIN_KEY_LENGTH = 16
MAX_FILE_BYTES = 1_000_000
REQUEST_KEY = HTTPBearer(auto_error=False, description="An API key of the file serve.api_keys_file.")
"""Dependency that declares in `/openapi.json` that a route takes a key; `Authentication` verifies it."""

KeyScope = Literal["read", "write"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=100)
    key: SecretStr | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    scopes: frozenset[KeyScope] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("expected exactly one of key and sha256")
        if self.key and not re.fullmatch(rf"[!-~]{{{MIN_KEY_LENGTH},}}", self.key.get_secret_value()):
            raise ValueError(f"key: expected {MIN_KEY_LENGTH} or more printable ASCII characters without spaces")
        return self

    @property
    def digest(self) -> bytes:
        return _digest(self.key.get_secret_value()) if self.key else bytes.fromhex(self.sha256 or "")


@dataclass(frozen=True)
class Key:
    """An API key: its name, its scopes, and its SHA-256 digest in place of the key itself."""

    name: str
    scopes: frozenset[KeyScope]
    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class Keys:
    """All keys of a server, and whether reading needs one."""

    keys: tuple[Key, ...] = ()
    reads_need_key: bool = False

    @classmethod
    def from_settings(cls, settings: ServeSettings) -> Self:
        """Read the keys of `settings.api_keys_file` or of HTCL_API_KEYS.

        Raises ConfigError for invalid keys, and when a server that other machines reach has none.
        """
        exposed = not is_loopback(settings.host)
        if settings.api_keys_file is not None:
            keys = _parse(_read(Path(settings.api_keys_file)), settings.api_keys_file)
        else:
            keys = _parse(os.environ.get(ENVIRONMENT, ""), ENVIRONMENT)
        if exposed and not keys:
            raise ConfigError(
                f"the service listens on {settings.host}, which other machines reach, and has no API keys; name a file "
                f"of keys with serve.api_keys_file (or put them into {ENVIRONMENT}), or bind to 127.0.0.1"
            )
        return cls(keys, reads_need_key=exposed)

    def find(self, presented: str) -> Key | None:
        """The key with this text, or None. Takes constant time, whatever the text shares with a key."""
        digest, match = _digest(presented), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                match = key
        return match


class Authentication:
    """ASGI middleware: store the request's Key, or None, in scope["state"]["key"].

    Responds with 401 to an unknown key, and to a request without the key that it needs, unless its URL is signed.
    """

    def __init__(self, app: ASGIApp, keys: Keys, signed_urls: SignedUrls | None = None) -> None:
        self._app = app
        self._keys = keys
        self._signed_urls = signed_urls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or respond with 401."""
        if scope["type"] == "http":
            sent = [value for name, value in scope["headers"] if name == b"authorization"]
            key = self._keys.find(_bearer(sent)) if sent else None
            if scope["path"] not in WITHOUT_KEY:
                if sent and key is None:
                    await _unauthorised("the API key is not one that this server knows")(scope, receive, send)
                    return
                if key is None and self._keys.reads_need_key and not self._is_signed(scope):
                    await _unauthorised("an API key is needed: send it as 'Authorization: Bearer KEY'")(
                        scope, receive, send
                    )
                    return
            scope["state"] = {**scope.get("state", {}), "key": key}
        await self._app(scope, receive, send)

    def _is_signed(self, scope: Scope) -> bool:
        signed = self._signed_urls
        return signed is not None and signed.allows(scope["method"], scope["path"], scope.get("query_string", b""))


async def write_access(request: Request, _: Annotated[object, Depends(REQUEST_KEY)] = None) -> None:
    """FastAPI dependency of every route that writes: 401 unless the request's key has scope write."""
    key: Key | None = request.scope.get("state", {}).get("key")
    if key is None:
        raise HTTPException(
            401, "an API key with scope write is needed: send it as 'Authorization: Bearer KEY'", CHALLENGE
        )
    if "write" not in key.scopes:
        raise HTTPException(401, f"the API key '{key.name}' lacks scope write", CHALLENGE)


def _unauthorised(message: str) -> ASGIApp:
    return failure(401, message, headers=CHALLENGE)


def _bearer(sent: list[bytes]) -> str:
    """Key of a single Authorization header with the scheme Bearer; else empty, which is the text of no key."""
    scheme, _, key = sent[0].decode("latin-1").partition(" ")
    return key.strip() if len(sent) == 1 and scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def is_loopback(host: str) -> bool:
    """Whether a server that is bound to `host` can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"serve.api_keys_file: {path} cannot be read ({reason}); expected a YAML list of keys"
        ) from None
    if mode & stat.S_IWOTH or (mode & stat.S_IROTH and any(entry.key for entry in _entries(text, str(path)))):
        raise ConfigError(
            f"serve.api_keys_file: every user of this machine may read or change {path}; make it yours with "
            f"'chmod 600 {path}', or give sha256 instead of key in a file that no other user may write"
        )
    return text


def _parse(text: str, source: str) -> tuple[Key, ...]:
    entries = _entries(text, source)
    for kind, values in (("name", [entry.name for entry in entries]), ("key", [entry.digest for entry in entries])):
        if len(set(values)) < len(values):
            raise ConfigError(f"{source}: two keys have the same {kind}; expected each once")
    scopes = {"write": frozenset[KeyScope](("read", "write")), "read": frozenset[KeyScope](("read",))}
    return tuple(
        Key(entry.name, scopes["write" if "write" in entry.scopes else "read"], entry.digest) for entry in entries
    )


def _entries(text: str, source: str) -> list[_Entry]:
    try:
        return TypeAdapter(list[_Entry]).validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError:
        raise ConfigError(
            f"{source}: not YAML; expected a list of keys, each with name, key or sha256, and scopes"
        ) from None
    except ValidationError as error:
        raise ConfigError(
            f"{source}: {first_fault(error)}; expected a list of keys, see htcl_ray/serving/api_keys.py"
        ) from None
