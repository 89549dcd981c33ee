"""Reading API keys, and the authentication and authorisation of requests."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
import yaml
from fastapi import Depends, FastAPI
from hypothesis import given, settings
from hypothesis import strategies as st

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import ConfigError
from htcl_ray.serving.api_keys import ENVIRONMENT, Authentication, Key, Keys, write_access

pytestmark = pytest.mark.unit

READER, WRITER = "reader-0123456789", "writer-0123456789"
ENTRIES = [
    {"name": "app", "key": READER, "scopes": ["read"]},
    {"name": "catalogue", "sha256": hashlib.sha256(WRITER.encode()).hexdigest(), "scopes": ["write"]},
]


@pytest.fixture(autouse=True)
def _no_keys_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def written(path: Path, entries: object, mode: int = 0o600) -> str:
    path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries), encoding="utf-8")
    path.chmod(mode)
    return str(path)


def keys_of(entries: object, monkeypatch: pytest.MonkeyPatch, host: str = "127.0.0.1") -> Keys:
    monkeypatch.setenv(ENVIRONMENT, json.dumps(entries))
    return Keys.from_settings(ServeSettings(host=host))


class TestReading:
    def test_a_file_and_the_environment_give_the_same_keys(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        from_file = Keys.from_settings(ServeSettings(api_keys_file=written(tmp_path / "keys.yaml", ENTRIES)))
        assert from_file == keys_of(ENTRIES, monkeypatch)
        assert [(key.name, key.scopes) for key in from_file.keys] == [
            ("app", {"read"}),
            ("catalogue", {"read", "write"}),
        ]

    def test_the_file_precedes_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv(ENVIRONMENT, json.dumps(ENTRIES))
        assert len(Keys.from_settings(ServeSettings(api_keys_file=written(tmp_path / "k", ENTRIES[:1]))).keys) == 1

    def test_keys_are_optional_on_loopback_only(self):
        for host in ("127.0.0.1", "127.0.0.2", "::1", "localhost"):
            assert Keys.from_settings(ServeSettings(host=host)) == Keys()
        for host in ("0.0.0.0", "::", "192.0.2.7", "music.example", ""):
            with pytest.raises(ConfigError, match="api_keys_file"):
                Keys.from_settings(ServeSettings(host=host))

    def test_reading_needs_a_key_on_a_public_address(self, monkeypatch: pytest.MonkeyPatch):
        assert not keys_of(ENTRIES, monkeypatch).reads_need_key
        assert keys_of(ENTRIES, monkeypatch, "0.0.0.0").reads_need_key

    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ("{", "not YAML"),
            ({"name": "a"}, "list"),
            (["text"], "0"),
            ([{"name": "a", "scopes": ["read"]}], "exactly one of key and sha256"),
            ([{"name": "a", "key": READER, "sha256": "0" * 64, "scopes": ["read"]}], "exactly one"),
            ([{"name": "a", "key": "short", "scopes": ["read"]}], "16 or more"),
            ([{"name": "a", "key": "with some spaces in it", "scopes": ["read"]}], "without spaces"),
            ([{"name": "a", "key": READER, "scopes": []}], "0.scopes"),
            ([{"name": "a", "key": READER, "scopes": ["admin"]}], "0.scopes"),
            ([{"name": "a", "key": READER}], "0.scopes"),
            ([{"name": "a", "sha256": "0" * 63, "scopes": ["read"]}], "0.sha256"),
            ([{"name": "a", "key": READER, "scopes": ["read"], "colour": "red"}], "0.colour"),
            ([ENTRIES[0], {**ENTRIES[1], "name": "app"}], "same name"),
            ([ENTRIES[0], {**ENTRIES[0], "name": "other"}], "same key"),
            ([ENTRIES[1], {"name": "other", "key": WRITER, "scopes": ["read"]}], "same key"),
        ],
    )
    def test_error_messages_contain_no_key(self, entries: object, message: str, tmp_path: Path):
        file = written(tmp_path / "keys.yaml", entries)
        with pytest.raises(ConfigError) as caught:
            Keys.from_settings(ServeSettings(api_keys_file=file))
        text = str(caught.value)
        assert message in text
        assert file in text
        assert "\n" not in text
        assert READER not in text
        assert caught.value.__context__ is None or caught.value.__suppress_context__

    def test_a_missing_file_is_an_error(self, tmp_path: Path):
        for path in (tmp_path / "none.yaml", tmp_path):
            with pytest.raises(ConfigError, match="cannot be read"):
                Keys.from_settings(ServeSettings(api_keys_file=str(path)))

    @pytest.mark.parametrize(
        ("entries", "mode", "fine"),
        [
            (ENTRIES, 0o600, True),
            (ENTRIES, 0o640, True),
            (ENTRIES, 0o644, False),
            (ENTRIES[1:], 0o644, True),
            (ENTRIES[1:], 0o666, False),
        ],
    )
    def test_a_file_that_every_user_can_read_is_an_error(self, tmp_path: Path, entries: object, mode: int, fine: bool):
        settings = ServeSettings(api_keys_file=written(tmp_path / "keys.yaml", entries, mode))
        if fine:
            assert Keys.from_settings(settings).keys
        else:
            with pytest.raises(ConfigError, match="chmod 600"):
                Keys.from_settings(settings)

    def test_pickles_and_representations_contain_no_key(self, monkeypatch: pytest.MonkeyPatch):
        keys = keys_of(ENTRIES, monkeypatch)
        assert READER.encode() not in pickle.dumps(keys)
        assert pickle.loads(pickle.dumps(keys)) == keys
        assert keys.keys[0].digest.hex() not in repr(keys)
        assert READER not in repr(keys)


@settings(deadline=None)
@given(st.text(READER + " é€\0😀", max_size=40))
def test_only_the_exact_key_matches(text: str):
    keys = Keys((Key("a", frozenset(("read",)), hashlib.sha256(READER.encode()).digest()),))
    assert (keys.find(text) is not None) == (text == READER)
    assert keys.find(READER) is keys.keys[0]


def test_every_key_is_compared(monkeypatch: pytest.MonkeyPatch):
    """Matching the first key takes as long as matching the last."""
    import htcl_ray.serving.api_keys as module

    compared = []
    real = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append(a) or real(a, b))
    keys = keys_of(
        [{"name": str(number), "key": f"{number}-0123456789abcdef", "scopes": ["read"]} for number in range(5)],
        monkeypatch,
    )
    for number in range(5):
        compared.clear()
        assert keys.find(f"{number}-0123456789abcdef") is keys.keys[number]
        assert len(compared) == 5


def application(keys: Keys) -> FastAPI:
    app = FastAPI()
    app.add_middleware(Authentication, keys=keys)

    @app.get("/{path:path}")
    async def read(path: str) -> dict[str, str]:
        return {}

    @app.put("/songs")
    async def write(_: Annotated[None, Depends(write_access)]) -> dict[str, str]:
        return {}

    return app


def ask(app: FastAPI, method: str, path: str, *authorization: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, headers=[("authorization", value) for value in authorization])

    return asyncio.run(send())


GOOD, WRITE = f"Bearer {READER}", f"Bearer {WRITER}"
READ_CASES = [
    ((), 200, 401),
    ((GOOD,), 200, 200),
    ((WRITE,), 200, 200),
    ((f"bearer {READER}",), 200, 200),
    ((f"Bearer   {READER} ",), 200, 200),
    ((f"Bearer {READER}x",), 401, 401),
    (("Bearer ",), 401, 401),
    (("Bearer",), 401, 401),
    ((f"Basic {READER}",), 401, 401),
    ((READER,), 401, 401),
    ((GOOD, GOOD), 401, 401),
    ((GOOD, WRITE), 401, 401),
    ((b"Bearer \xff\xfe",), 401, 401),
]


class TestRequests:
    @pytest.mark.parametrize(("authorization", "on_loopback", "elsewhere"), READ_CASES)
    def test_reading(self, authorization: tuple, on_loopback: int, elsewhere: int, monkeypatch: pytest.MonkeyPatch):
        for host, status in (("127.0.0.1", on_loopback), ("0.0.0.0", elsewhere)):
            response = ask(application(keys_of(ENTRIES, monkeypatch, host)), "GET", "/v1/index", *authorization)
            assert response.status_code == status
            if status == 401:
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "unauthorised"
                assert READER not in response.text

    @pytest.mark.parametrize("path", ["/", "/openapi.json", "/healthz", "/readyz"])
    def test_public_paths_need_no_key(self, path: str, monkeypatch: pytest.MonkeyPatch):
        app = application(keys_of(ENTRIES, monkeypatch, "0.0.0.0"))
        for authorization in ((), ("Bearer wrong",)):
            assert ask(app, "GET", path, *authorization).status_code == 200

    @pytest.mark.parametrize(
        "path", ["/metrics", "/v1/index", "/healthz/", "/healthz/../v1/index", "/v1/healthz", "/docs"]
    )
    def test_other_paths_need_a_key(self, path: str, monkeypatch: pytest.MonkeyPatch):
        assert ask(application(keys_of(ENTRIES, monkeypatch, "0.0.0.0")), "GET", path).status_code == 401

    @pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
    def test_writing_always_needs_scope_write(self, host: str, monkeypatch: pytest.MonkeyPatch):
        app = application(keys_of(ENTRIES, monkeypatch, host))
        assert ask(app, "PUT", "/songs", WRITE).status_code == 200
        for authorization in ((), (GOOD,), ("Bearer wrong",)):
            response = ask(app, "PUT", "/songs", *authorization)
            assert response.status_code == 401
            assert response.headers["www-authenticate"] == "Bearer"

    def test_writing_is_impossible_without_keys(self):
        app = application(Keys())
        assert ask(app, "GET", "/v1/index").status_code == 200
        assert ask(app, "PUT", "/songs").status_code == 401
        assert ask(app, "PUT", "/songs", "Bearer ").status_code == 401

    def test_a_write_route_without_the_middleware_is_401(self):
        app = FastAPI()

        @app.put("/songs")
        async def write(_: Annotated[None, Depends(write_access)]) -> None: ...

        assert ask(app, "PUT", "/songs", WRITE).status_code == 401

    def test_the_key_of_a_request_does_not_leak_into_the_next(self, monkeypatch: pytest.MonkeyPatch):
        """Servers may pass the same state to every request."""
        seen = []

        async def inner(scope: Any, receive: Any, send: Any) -> None:
            seen.append(scope["state"]["key"])

        middleware = Authentication(inner, keys_of(ENTRIES, monkeypatch))
        state: dict[str, Any] = {}
        for headers in ([(b"authorization", WRITE.encode())], []):
            asyncio.run(middleware({"type": "http", "path": "/", "headers": headers, "state": state}, None, None))  # type: ignore[arg-type]
        assert [key and key.name for key in seen] == ["catalogue", None]
        assert state == {}


def test_openapi_declares_the_scheme_of_protected_routes(monkeypatch: pytest.MonkeyPatch):
    schema = application(Keys()).openapi()
    assert schema["components"]["securitySchemes"] == {
        "HTTPBearer": {
            "type": "http",
            "scheme": "bearer",
            "description": schema["components"]["securitySchemes"]["HTTPBearer"]["description"],
        }
    }
    assert schema["paths"]["/songs"]["put"]["security"] == [{"HTTPBearer": []}]
    assert "security" not in schema["paths"]["/{path}"]["get"]


def test_this_file_changes_no_environment():
    assert ENVIRONMENT not in os.environ
