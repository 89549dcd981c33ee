"""HEAD and GET of every route, and songs whose ids contain slashes or look like other paths."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import httpx
import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.types import Message

from htcl_ray.client import Client as HttpClient
from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.live_index import Active
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import UpdateLog
from htcl_ray.index.song_index import SongIndex
from htcl_ray.search.service import SearchService
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.middleware.request_line import RequestLine, song_path
from htcl_ray.serving.routes.audio_routes import PIECE_BYTES
from htcl_ray.serving.signed_urls import SignedUrls
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import unit_vectors

pytestmark = pytest.mark.unit

IDS = [
    "a",
    "a/b",
    "a/b/similar",
    "a/b/audio",
    "a/b/audio-url",
    "similar",
    "a/similar",
    "/",
    "a%2Fb",
    "100%",
    "ü ?#",
    "a/b/similar/similar",
    ".",
    "x/",
]
AUDIO = np.random.default_rng(0).bytes(3 * PIECE_BYTES)
SIGNING_KEY = b"k" * 32
Response = tuple[int, dict[str, str], bytes]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("audio")
    (folder / "a.mp3").write_bytes(AUDIO)
    metadata = pa.table({"title": IDS, "audio_path": pa.array([str(folder / "a.mp3")] * len(IDS), pa.string())})
    service = SearchService(
        SongIndex.build(IDS, unit_vectors(0, len(IDS)), metadata=metadata, model_versions={"semantic": "s"})
    )
    replay = Replay(service.index, UpdateLog(Workspace(str(folder / "nowhere"))))
    active = Active("v1", service, "2026-01-01T00:00:00.000000+00:00", replay)
    return SimpleNamespace(live=SimpleNamespace(active=active, broken={}, failed_polls=0), check_ready=_ready)


@pytest.fixture(scope="module")
def app(backend: SimpleNamespace) -> FastAPI:
    return create_app(backend, ServeSettings(), signing_key=SIGNING_KEY)


async def _ready() -> None:
    return None


def send_raw(app: Any, method: str, raw_path: str, query: str = "", **headers: str) -> Response:
    """Status, headers and body of a request with exactly this raw path."""
    sent: list[Message] = []

    received = iter([{"type": "http.request", "body": b"", "more_body": False}])

    async def receive() -> Message:
        for message in received:
            return message
        await asyncio.Event().wait()  # the client stays
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "root_path": "",
        "query_string": query.encode(),
        "path": unquote(raw_path),
        "raw_path": raw_path.encode(),
        "client": ("127.0.0.1", 1),
        "headers": [
            (b"host", b"localhost"),
            *((name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()),
        ],
    }
    asyncio.run(app(scope, receive, send))
    assert sent[-1] == {"type": "http.response.body", "body": sent[-1]["body"]} or not sent[-1].get("more_body")
    body = b"".join(message.get("body", b"") for message in sent if message["type"] == "http.response.body")
    return sent[0]["status"], {name.decode(): value.decode() for name, value in sent[0]["headers"]}, body


GETS = {
    "/": {},
    "/openapi.json": {},
    "/healthz": {},
    "/readyz": {},
    "/v1/index": {},
    "/v1/map": {},
    "/v1/songs/a": {},
    "/v1/songs/missing": {},
    "/v1/songs/a/similar": {"query": "k=3"},
    "/v1/songs/a/similar?": {"query": "k=0"},
    "/rest/getSonicSimilarTracks": {"query": "id=a&f=json"},
    "/rest/getSonicSimilarTracks.view": {"query": "id=a"},
    "/rest/findSonicPath": {"query": "startSongId=a&endSongId=/"},
    "/v1/nothing": {},
    "/rest/getOpenSubsonicExtensions": {},
    "/rest/tokenInfo": {},
    "/v1/songs/a/audio": {},
    "/v1/songs/a/audio?1": {"range": "bytes=10-19"},
    "/v1/songs/a/audio?2": {"range": "bytes=99999999-"},
    "/v1/songs/a/audio?3": {"range": "bytes=-5"},
    "/v1/songs/missing/audio": {},
    "/v1/songs/a/audio?4": {"authorization": "Bearer wrong-0123456789"},
    "/v1/index?": {"host": "elsewhere"},
}


@pytest.mark.parametrize("path", GETS)
def test_head_is_get_without_the_body(app: FastAPI, path: str):
    raw_path, options = path.partition("?")[0], dict(GETS[path])
    status, headers, body = send_raw(app, "GET", raw_path, **options)
    assert body
    assert send_raw(app, "HEAD", raw_path, **options) == (status, headers, b"")


def test_every_get_route_is_tested(app: FastAPI):
    templates = {route.path_format for route in app.routes if isinstance(route, APIRoute) and "GET" in route.methods}
    tested = {
        path.partition("?")[0]
        .replace("/v1/songs/a", "/v1/songs/{song_id}")
        .replace("/v1/songs/missing", "/v1/songs/{song_id}")
        for path in GETS
    }
    missing = templates - tested
    assert {path.removesuffix(".view") for path in missing} <= tested


def test_head_respects_if_none_match(app: FastAPI):
    etag = send_raw(app, "GET", "/v1/songs/a/audio")[1]["etag"]
    assert send_raw(app, "HEAD", "/v1/songs/a/audio", if_none_match=etag)[0] == 304


def test_head_reads_no_audio(app: FastAPI, monkeypatch: pytest.MonkeyPatch):
    from htcl_ray.serving.routes import audio_routes

    monkeypatch.setattr(audio_routes, "_pieces", lambda *_: pytest.fail("the file was read"))
    status, headers, body = send_raw(app, "HEAD", "/v1/songs/a/audio")
    assert (status, headers["content-length"], body) == (200, str(len(AUDIO)), b"")


def test_a_signed_url_allows_head(monkeypatch: pytest.MonkeyPatch, backend: SimpleNamespace):
    monkeypatch.setenv("HTCL_API_KEYS", "[{name: n, key: reads-0123456789abcdef, scopes: [read]}]")
    guarded = create_app(backend, ServeSettings(host="192.0.2.1", allowed_hosts=("*",)), signing_key=SIGNING_KEY)
    url, _ = SignedUrls(SIGNING_KEY).make("a/b")
    path, _, query = url.partition("?")
    assert path == "/v1/songs/a%2Fb/audio"
    assert send_raw(guarded, "HEAD", path, query)[0] == send_raw(guarded, "GET", path, query)[0] == 200
    assert send_raw(guarded, "HEAD", path)[0] == 401
    assert send_raw(guarded, "HEAD", "/v1/songs/a%2Fb%2Faudio", query)[0] == 401, (
        "a song of another id is not what was signed"
    )


def test_head_is_405_where_get_is(app: FastAPI):
    status, headers, body = send_raw(app, "HEAD", "/v1/search")
    assert (status, headers["allow"], body) == (405, "POST", b"")
    assert send_raw(app, "OPTIONS", "/v1/index")[1]["allow"] == "GET, HEAD"
    assert not any("head" in operations for operations in app.openapi()["paths"].values())


def test_the_log_names_head_and_the_route():
    scopes: list[dict[str, Any]] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        scope["route"] = SimpleNamespace(path=scope["method"])
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for more in (True, True, False):
            await send({"type": "http.response.body", "body": b"x", "more_body": more})

    async def outer(scope: Any, receive: Any, send: Any) -> None:
        await RequestLine(inner)(scope, receive, send)
        scopes.append(scope)

    assert send_raw(outer, "HEAD", "/v1/songs/a%2Fb/similar") == (200, {}, b"")
    assert (scopes[0]["method"], scopes[0]["route"].path, scopes[0]["path"]) == (
        "HEAD",
        "GET",
        "/v1/songs/a%2Fb/similar",
    )


@pytest.mark.parametrize("song_id", IDS)
def test_encoded_slashes_belong_to_the_id(app: FastAPI, song_id: str):
    path = f"/v1/songs/{quote(song_id, safe='')}"
    assert song_path(song_id) == path
    status, _, body = send_raw(app, "GET", path)
    assert (status, json.loads(body)["song_id"]) == (200, song_id)
    status, _, body = send_raw(app, "GET", f"{path}/similar", "k=100")
    assert {result["song_id"] for result in json.loads(body)["results"]} == {*IDS} - {song_id}
    assert send_raw(app, "GET", f"{path}/audio")[::2] == (200, AUDIO)
    status, _, body = send_raw(app, "POST", f"{path}/audio-url")
    assert json.loads(body)["url"].partition("?")[0] == f"{path}/audio"


@pytest.mark.parametrize(
    ("raw_path", "song_id", "is_song"),
    [
        ("/v1/songs/a/b", "a/b", True),
        ("/v1/songs/a/b/similar", "a/b", False),
        ("/v1/songs/a/b%2Fsimilar", "a/b/similar", True),
        ("/v1/songs/a%2Fb/similar", "a/b", False),
        ("/v1/songs/a%2fb%2fsimilar/similar", "a/b/similar", False),
        ("/v1/songs/a/b/similar/similar", "a/b/similar", False),
        ("/v1/songs/a%2Fb/s%69milar", "a/b", False),
        ("/v1/songs/similar", "similar", True),
        ("/v1/songs/a%252Fb", "a%2Fb", True),
        ("/v1/songs/a/similar", "a", False),
        ("/v1/songs/a%2Fsimilar", "a/similar", True),
        ("/v1/songs/x/", "x/", True),
        ("/v1/songs/%2F", "/", True),
    ],
)
def test_a_literal_slash_may_end_the_id(app: FastAPI, raw_path: str, song_id: str, is_song: bool):
    status, _, body = send_raw(app, "GET", raw_path, "" if is_song else "k=100")
    assert status == 200
    given = json.loads(body)
    if is_song:
        assert given["song_id"] == song_id
    else:
        assert {result["song_id"] for result in given["results"]} == {*IDS} - {song_id}


def test_without_a_raw_path_the_decoded_path_is_used(app: FastAPI):
    async def without(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "raw_path": None}, receive, send)

    assert json.loads(send_raw(without, "GET", "/v1/songs/a%2Fb")[2])["song_id"] == "a/b"
    assert "results" in json.loads(send_raw(without, "GET", "/v1/songs/a%2Fb%2Fsimilar")[2])


@pytest.mark.parametrize("song_id", IDS)
def test_players_and_the_python_client_can_address_every_song(app: FastAPI, song_id: str):
    body = send_raw(app, "GET", "/rest/getSonicSimilarTracks", f"id={quote(song_id, safe='')}&f=json&count=50")[2]
    matches = json.loads(body)["subsonic-response"]["sonicMatch"]
    assert {match["entry"]["id"] for match in matches} == {*IDS} - {song_id}

    def handle(request: httpx.Request) -> httpx.Response:
        status, headers, body = send_raw(
            app, request.method, request.url.raw_path.partition(b"?")[0].decode(), request.url.query.decode()
        )
        return httpx.Response(status, headers=headers, content=body)

    with HttpClient("http://localhost", transport=httpx.MockTransport(handle)) as client:
        assert client.song(song_id).song_id == song_id
        assert len(client.similar(song_id, k=100).results) == len(IDS) - 1


def test_the_page_encodes_the_whole_id():
    page = Path("htcl_ray/serving/routes/page.html").read_text(encoding="utf-8")
    assert "/v1/songs/${encodeURIComponent(" in page
    assert page.count("/v1/songs/") == page.count("/v1/songs/${encodeURIComponent(")
