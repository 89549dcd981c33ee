"""Checks of requests before routing, default headers of responses, and malformed requests as a server receives them."""

from __future__ import annotations

import asyncio
import json
import time
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving.error_responses import failure
from htcl_ray.serving.haproxy import HEADERS
from htcl_ray.serving.middleware.request_checks import MAX_JSON_BYTES, MAX_JSON_DEPTH, nesting
from tests.unit.serving.test_http_app import Client, assert_failure

pytestmark = pytest.mark.unit

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> Client:
    return Client()


def raw(
    app: Any, method: str = "GET", path: str = "/healthz", headers: Any = ((b"host", b"localhost"),), body: bytes = b""
) -> tuple[int, dict]:
    """Status and JSON response of a request that httpx would not send."""
    sent: list[dict] = []
    messages = [{"type": "http.request", "body": body}]

    async def receive() -> dict:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: dict) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": list(headers),
        "client": None,
        "server": None,
    }
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"], json.loads(b"".join(message.get("body", b"") for message in sent[1:]))


class TestHost:
    @pytest.mark.parametrize(
        "host",
        [
            b"localhost.",
            b"LocalHost.:80",
            b"127.0.0.1.",
            b"[::1]",
            b"[0:0:0:0:0:0:0:1]:8000",
            b"[2001:DB8::7]",
            b"[2001:db8:0:0::7]:1",
            b"b\xc3\xbccher.example",
        ],
    )
    def test_spellings_of_an_allowed_host_are_equal(self, host: bytes):
        settings = ServeSettings(allowed_hosts=("2001:db8::7", "b\xc3\xbccher.example"))
        assert raw(Client(settings).app, headers=[(b"host", host)])[0] == 200

    @pytest.mark.parametrize(
        "headers",
        [
            [],
            [(b"host", b"localhost"), (b"host", b"localhost")],
            [(b"host", b"localhost"), (b"host", b"evil.example")],
            [(b"host", b"evil.example"), (b"x-forwarded-host", b"localhost")],
            [(b"host", b"localhost, evil.example")],
            [(b"host", b"localhost@evil.example")],
            [(b"host", b"localhost:")],
            [(b"host", b"localhost:x")],
            [(b"host", b"localhost:123456")],
            [(b"host", b"localhost..")],
            [(b"host", b"localhost/")],
            [(b"host", b"localhost\x00")],
            [(b"host", b"evil.example\tlocalhost")],
            [(b"host", b"[::1")],
            [(b"host", b"::1]")],
            [(b"host", b"[::1]evil")],
            [(b"host", b"[evil.example]")],
            [(b"host", b"127.1")],
            [(b"host", b"2130706433")],
            [(b"host", b"0x7f.0.0.1")],
            [(b"host", b"\xff" * 10_000)],
            [(b"host", b".")],
            [(b"host", b"*")],
        ],
    )
    def test_other_hosts_are_400(self, client: Client, headers: list):
        status, body = raw(client.app, headers=headers)
        assert (status, body["error"]["code"]) == (400, "unknown_host")
        assert len(body["error"]["message"]) < 400

    @pytest.mark.parametrize("path", ["http://evil.example/v1/index", "evil", "", "*"])
    def test_request_targets_that_are_not_paths_are_400(self, client: Client, path: str):
        assert raw(client.app, path=path)[0] == 400

    def test_two_host_headers_are_400_even_if_any_host_is_allowed(self):
        app = Client(ServeSettings(allowed_hosts=("*",))).app
        assert raw(app, headers=[(b"host", b"evil.example")])[0] == 200
        assert raw(app, headers=[(b"host", b"a"), (b"host", b"b")])[0] == 400


def depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth, value.values()), default=0)
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


VALUES = st.recursive(
    st.none() | st.integers() | st.text('[]{}"\\a', max_size=6),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('[]{}"\\', max_size=4), inner, max_size=4),
    max_leaves=40,
)


@settings(deadline=None)
@given(VALUES, st.integers(0, 40))
def test_nesting_is_that_of_the_parsed_value(value: object, more: int):
    for _ in range(more):
        value = [value]
    text = json.dumps(value)
    brackets = text.count("[") + text.count("{")
    assert nesting(text.encode()) == (depth(value) if brackets > MAX_JSON_DEPTH else 0)


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_nesting_accepts_any_bytes(data: bytes):
    assert nesting(b"[" * 40 + data) >= 0


HOSTILE = [
    b"[" * (MAX_JSON_BYTES - 1),
    b'{"a":' * (MAX_JSON_BYTES // 5),
    b"[{}," * (MAX_JSON_BYTES // 4),
    b"[]," * (MAX_JSON_BYTES // 3),
    b'"",' * (MAX_JSON_BYTES // 3 - 20) + b"[" * 40,
    b'"' + b"\\" * (MAX_JSON_BYTES - 50) + b"[" * 40,
    b"[" * 40 + b'"' + b"\\\\" * (MAX_JSON_BYTES // 2 - 50),
    b"[" * 40 + b'"\\' * (MAX_JSON_BYTES // 2 - 50),
]


@pytest.mark.parametrize("body", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_json_is_400_quickly_and_in_bounded_memory(client: Client, body: bytes):
    client("POST", "/v1/search", content=b"{}", headers=JSON)
    tracemalloc.start()
    started = time.monotonic()
    response = client("POST", "/v1/search", content=body, headers=JSON)
    seconds, (_, peak) = time.monotonic() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert_failure(response, 400, response.json()["error"]["code"])
    assert seconds < 3
    assert peak < 40 * MAX_JSON_BYTES


def test_json_at_the_nesting_limit_passes(client: Client):
    def search(levels: int) -> Any:
        return client(
            "POST", "/v1/search", content=b'{"text": ' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}", headers=JSON
        )

    assert_failure(search(MAX_JSON_DEPTH), 422, "invalid_request")
    assert_failure(search(MAX_JSON_DEPTH + 1), 400, "bad_request", "nested deeper")


def test_many_brackets_without_nesting_pass(client: Client):
    content = json.dumps({"song_ids": ["[" * 999] * 900 + ['"\\['] * 100}).encode()
    assert_failure(client("POST", "/v1/search", content=content, headers=JSON), 404, "song_not_found")


@pytest.mark.parametrize(
    "content",
    [
        b'{"k": NaN, "text": "a"}',
        b'{"k": Infinity, "text": "a"}',
        b'{"vector": [-Infinity]}',
        b'{"vector": [1e999]}',
        b"NaN",
    ],
)
def test_non_finite_numbers_are_errors(client: Client, content: bytes):
    assert_failure(client("POST", "/v1/search", content=content, headers=JSON), 422, "invalid_request")


def test_text_with_half_a_surrogate_pair_is_escaped_in_the_error():
    """JSON can contain half a surrogate pair, and UTF-8 cannot."""
    assert json.loads(failure(404, "no song '\ud800'").body)["error"]["message"] == "no song '\\ud800'"


def multipart(*parts: bytes, end: bytes = b"\r\n--x--\r\n") -> dict[str, Any]:
    return {
        "content": b"".join(b"\r\n--x\r\n" + part for part in parts) + end,
        "headers": {"content-type": "multipart/form-data; boundary=x"},
    }


FIELD = b'Content-Disposition: form-data; name="k"\r\n\r\n1'
FILE = b'Content-Disposition: form-data; name="file"; filename="%s"\r\n\r\nsound'


class TestMultipart:
    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (multipart(*[FIELD] * 2_000), 400),
            (multipart(*[FILE % b"a"] * 2_000), 400),
            (multipart(FILE % b"a", end=b""), 422),
            (multipart(FILE % (b"a" * 50_000)), 400),
            (multipart(b"X: " + b"y" * 60_000 + b"\r\n" + FIELD), 400),
            (multipart(*[b"X: y\r\n" * 100 + FIELD]), 400),
            (multipart(b"no header at all"), 400),
            (multipart(b"Content-Disposition: attachment\r\n\r\n"), 400),
            (multipart(), 422),
            ({"content": b"", "headers": {"content-type": "multipart/form-data; boundary=x"}}, 422),
            ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400),
            ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary="}}, 400),
            ({"content": b"--x", "headers": {"content-type": "multipart/form-data; boundary=" + "y" * 5_000}}, 400),
            ({"content": b"a=1&" * 2_000, "headers": {"content-type": "application/x-www-form-urlencoded"}}, 400),
            ({"content": b"{}", "headers": JSON}, 415),
            ({"content": b"audio", "headers": {"content-type": "audio/wav"}}, 415),
        ],
        ids=range(16),
    )
    def test_malformed_forms_are_4xx(self, client: Client, request_: dict, status: int):
        response = client("POST", "/v1/search/audio", **request_)
        assert_failure(response, status, response.json()["error"]["code"])

    @pytest.mark.parametrize(
        "name", [b"../../etc/passwd", b"/etc/passwd", b"C:\\x", b"\x00", b"", b"%00", b"\xff\xfe", b"a" * 3_000]
    )
    def test_file_names_have_no_effect(self, client: Client, name: bytes):
        response = client("POST", "/v1/search/audio", **multipart(FILE % name))
        assert response.status_code in (200, 400, 422)


def test_a_search_without_a_json_content_type_is_415(client: Client):
    for kind in ("text/plain", "application/xml", ""):
        response = client("POST", "/v1/search", content=b'{"text": "a"}', headers={"content-type": kind})
        assert_failure(response, 415, "unsupported_media_type")


class TestResponses:
    @pytest.mark.parametrize(
        ("method", "path", "options", "status"),
        [
            ("GET", "/healthz", {}, 200),
            ("GET", "/openapi.json", {}, 200),
            ("GET", "/nothing", {}, 404),
            ("GET", "/v1/search/", {}, 404),
            ("PATCH", "/v1/search", {}, 405),
            ("OPTIONS", "/v1/search", {}, 405),
            ("GET", "/healthz", {"headers": {"host": "evil"}}, 400),
            ("GET", "/v1/index", {"headers": {"authorization": "Bearer x"}}, 401),
            ("POST", "/v1/search", {"content": b" " * (MAX_JSON_BYTES + 1)}, 413),
            ("POST", "/v1/search", {"json": {}}, 422),
            ("POST", "/v1/search", {"json": {"text": "a"}}, 500),
        ],
    )
    def test_all_responses_carry_the_default_headers(self, method: str, path: str, options: dict, status: int):
        client = Client()
        client.backend.error = ZeroDivisionError() if status == 500 else None
        response = client(method, path, **options)
        assert response.status_code == status
        for name, value in HEADERS.items():
            assert response.headers.get_list(name) == [value]
        if status >= 400:
            assert_failure(response, status, response.json()["error"]["code"])
        assert "access-control-allow-origin" not in response.headers

    def test_rejections_carry_the_default_headers(self):
        client = Client(ServeSettings(requests_per_second=0.01, request_burst=1))
        client("GET", "/v1/index")
        response = client("GET", "/v1/index")
        assert_failure(response, 429, "rate_limited")
        assert response.headers["retry-after"] == "100"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert client("GET", "/healthz").status_code == 200

    def test_openapi_lists_the_status_codes(self, client: Client):
        schema = client("GET", "/openapi.json").json()
        for methods in schema["paths"].values():
            for operation in methods.values():
                assert {"400", "401", "413", "422", "429", "503"} <= set(operation["responses"])


class TestOtherOrigins:
    PREFLIGHT = {"access-control-request-method": "POST", "access-control-request-headers": "authorization"}  # noqa: RUF012

    def test_other_origins_are_not_allowed_by_default(self, client: Client):
        response = client("GET", "/healthz", headers={"origin": "https://page.example"})
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert (
            client("OPTIONS", "/v1/search", headers={"origin": "https://page.example", **self.PREFLIGHT}).status_code
            == 405
        )

    def test_other_origins_are_allowed_by_name(self):
        client = Client(ServeSettings(allowed_origins=("https://page.example",)))
        page = {"origin": "https://page.example"}
        preflight = client("OPTIONS", "/v1/search", headers={**page, **self.PREFLIGHT})
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == page["origin"]
        assert "access-control-allow-credentials" not in preflight.headers
        heading = {**self.PREFLIGHT, "access-control-request-method": "HEAD"}
        assert client("OPTIONS", "/v1/index", headers={**page, **heading}).status_code == 200
        refused = client("GET", "/v1/index", headers={**page, "authorization": "Bearer x"})
        assert_failure(refused, 401, "unauthorised")
        assert refused.headers["access-control-allow-origin"] == page["origin"]
        other = client("OPTIONS", "/v1/search", headers={"origin": "https://evil.example", **self.PREFLIGHT})
        assert_failure(other, 400, "unknown_origin")
        assert (
            "access-control-allow-origin"
            not in client("GET", "/healthz", headers={"origin": "https://evil.example"}).headers
        )
