"""API keys: which there are, what each may do, and the check of a request's own.

The file `serve.api_keys_file`, or the environment variable HTCL_API_KEYS, is a YAML (or JSON) list:

    - name: recommender            # appears in logs; never the key itself
      key: 3vTq…                   # 16 or more characters; python -c 'import secrets; print(secrets.token_urlsafe(32))'
      scopes: [read]
    - name: catalogue
      sha256: 9f86d0…              # instead of key: its SHA-256 in hexadecimal, so that who reads the file learns no key
      scopes: [write]              # includes read

Requests carry `Authorization: Bearer KEY`. Writing always needs a key with scope write. Reading needs a key when the
application is bound to an address that other machines reach; there, no keys at all is a ConfigError. /, /openapi.json,
the probes and the list of extensions for players never need one. A key that is sent and wrong is refused everywhere
else, also where none is needed. Players send theirs otherwise (subsonic_keys.py), and a song's audio can be had without
a key at an address that signed_urls.py made for the holder of one.
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
from htcl_ray.serving.responses import failure
from htcl_ray.serving.signed_urls import SignedUrls

ENVIRONMENT = "HTCL_API_KEYS"
CHALLENGE = {"WWW-Authenticate": "Bearer"}
PLAYERS_EXTENSIONS = "/rest/getOpenSubsonicExtensions"
WITHOUT_KEY = frozenset({"/", "/openapi.json", "/healthz", "/readyz", PLAYERS_EXTENSIONS, f"{PLAYERS_EXTENSIONS}.view"})
SHORTEST_KEY = 16
LARGEST_FILE_BYTES = 1_000_000
REQUEST_KEY = HTTPBearer(auto_error=False, description="A key of the file that serve.api_keys_file names.")
"""As a dependency it only tells `/openapi.json` that a route takes a key; `Authentication` does the work."""

Scope_ = Literal["read", "write"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=100)
    key: SecretStr | None = None
    sha256: Annotated[str, Field(pattern="^[0-9a-fA-F]{64}$")] | None = None
    scopes: frozenset[Scope_] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("expected exactly one of key and sha256")
        if self.key and not re.fullmatch(rf"[!-~]{{{SHORTEST_KEY},}}", self.key.get_secret_value()):
            raise ValueError(f"key: expected {SHORTEST_KEY} or more printable ASCII characters without spaces")
        return self

    @property
    def digest(self) -> bytes:
        return _digest(self.key.get_secret_value()) if self.key else bytes.fromhex(self.sha256 or "")


@dataclass(frozen=True)
class Key:
    """One key: its name and what it may do. Knows its digest only."""

    name: str
    scopes: frozenset[Scope_]
    digest: bytes = field(repr=False)


@dataclass(frozen=True)
class Keys:
    """All keys, and whether reading needs one."""

    keys: tuple[Key, ...] = ()
    reads_need_key: bool = False

    @classmethod
    def from_settings(cls, settings: ServeSettings) -> Self:
        """The keys of `settings.api_keys_file` or of HTCL_API_KEYS. Raises ConfigError, also when there are none and
        others reach us.
        """
        exposed = not is_loopback(settings.host)
        if settings.api_keys_file is not None:
            keys = _parse(_read(Path(settings.api_keys_file)), settings.api_keys_file)
        else:
            keys = _parse(os.environ.get(ENVIRONMENT, ""), ENVIRONMENT)
        if exposed and not keys:
            raise ConfigError(
                f"the service listens on {settings.host}, which other machines reach, and there are no API keys; name a file of keys with "
                f"serve.api_keys_file (or put them into {ENVIRONMENT}), or bind to 127.0.0.1"
            )
        return cls(keys, reads_need_key=exposed)

    def find(self, presented: str) -> Key | None:
        """The key that was presented. Takes as long for any other text, whatever it shares with a key."""
        digest, found = _digest(presented), None
        for key in self.keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


class Authentication:
    """ASGI middleware: puts the request's Key, or None, at scope["state"]["key"].

    Answers 401 to a key that is not known, and to none where one is needed, unless the address is signed for itself.
    """

    def __init__(self, app: ASGIApp, keys: Keys, signed_urls: SignedUrls | None = None) -> None:
        self._app = app
        self._keys = keys
        self._signed_urls = signed_urls

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on, or answer 401."""
        if scope["type"] == "http":
            sent = [value for name, value in scope["headers"] if name == b"authorization"]
            key = self._keys.find(_bearer(sent)) if sent else None
            if scope["path"] not in WITHOUT_KEY:
                if sent and key is None:
                    await _refuse("the API key is not one that this server knows")(scope, receive, send)
                    return
                if key is None and self._keys.reads_need_key and not self._is_signed(scope):
                    await _refuse("an API key is needed: send it as 'Authorization: Bearer KEY'")(scope, receive, send)
                    return
            scope["state"] = {**scope.get("state", {}), "key": key}
        await self._app(scope, receive, send)

    def _is_signed(self, scope: Scope) -> bool:
        signed = self._signed_urls
        return signed is not None and signed.allows(scope["method"], scope["path"], scope.get("query_string", b""))


async def write_access(request: Request, _: Annotated[object, Depends(REQUEST_KEY)] = None) -> None:
    """FastAPI dependency of every route that changes something: 401 unless the request's key has scope write."""
    key: Key | None = request.scope.get("state", {}).get("key")
    if key is None:
        raise HTTPException(
            401, "an API key with scope write is needed: send it as 'Authorization: Bearer KEY'", CHALLENGE
        )
    if "write" not in key.scopes:
        raise HTTPException(401, f"the API key '{key.name}' lacks scope write", CHALLENGE)


def _refuse(message: str) -> ASGIApp:
    return failure(401, message, headers=CHALLENGE)


def _bearer(sent: list[bytes]) -> str:
    """The key of the Authorization headers; empty, which is nobody's, unless there is one header and it is of this
    kind.
    """
    scheme, _, key = sent[0].decode("latin-1").partition(" ")
    return key.strip() if len(sent) == 1 and scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("latin-1", "replace")).digest()


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that is bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(LARGEST_FILE_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"serve.api_keys_file: {path} cannot be read ({reason}); expected a YAML list of keys"
        ) from None
    if mode & stat.S_IWOTH or (mode & stat.S_IROTH and any(entry.key for entry in _entries(text, str(path)))):
        raise ConfigError(
            f"serve.api_keys_file: every user of this machine may read or change {path}; make it yours with 'chmod 600 {path}', "
            "or give sha256 instead of key in a file that nobody else may write"
        )
    return text


def _parse(text: str, source: str) -> tuple[Key, ...]:
    entries = _entries(text, source)
    for kind, values in (("name", [entry.name for entry in entries]), ("key", [entry.digest for entry in entries])):
        if len(set(values)) < len(values):
            raise ConfigError(f"{source}: two keys have the same {kind}; expected each once")
    scopes = {"write": frozenset[Scope_](("read", "write")), "read": frozenset[Scope_](("read",))}
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
