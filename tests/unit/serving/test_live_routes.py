"""Adding, changing and removing songs, and activating indexes, over HTTP."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from fastapi import FastAPI

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import AudioError, InputError, QueryError
from htcl_ray.index.live.live_index import LiveIndex, SwitchInProgress
from htcl_ray.index.live.update_log import Update, UpdateLog
from htcl_ray.index.vectors import Vectors
from htcl_ray.schemas import Reason
from htcl_ray.serving import error_responses
from htcl_ray.serving.error_responses import EVERYWHERE
from htcl_ray.serving.routes.operation_routes import index_routes
from htcl_ray.serving.routes.song_routes import song_routes
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, content_of, contents, unit_vectors, write_index

pytestmark = pytest.mark.unit


class Backend:
    """Backend that encodes bytes by their length; bytes that begin with `bad` are not audio."""

    def __init__(self, live: LiveIndex) -> None:
        self.live = live

    @property
    def service(self):
        return self.live.service

    @property
    def index_version(self) -> str:
        return self.live.version

    async def encode_song(self, data: bytes) -> Vectors:
        if data.startswith(b"bad"):
            raise AudioError(Reason.UNDECODABLE, "it is no audio")
        return unit_vectors(len(data))

    async def encode_vector(self, vector: list[float]) -> Vectors:
        if len(vector) != 3:
            raise QueryError(f"the vector has {len(vector)} numbers; this model was trained on vectors of 3")
        return unit_vectors(int(vector[0]))


class Client:
    """Client over ASGI that sends a key with the given scopes."""

    def __init__(self, workspace: Workspace, scopes: tuple[str, ...] | None = ("read", "write")) -> None:
        settings = ServeSettings(max_upload_bytes=1_000)
        self.live = LiveIndex(workspace, settings, VERSIONS)
        app = FastAPI(responses=EVERYWHERE)
        error_responses.install(app)
        backend = Backend(self.live)
        app.include_router(song_routes(backend, settings))
        app.include_router(index_routes(backend))
        self.app = app
        self.key = None if scopes is None else SimpleNamespace(name="tester", scopes=scopes)

    def __call__(self, method: str, path: str, **options) -> httpx.Response:
        async def with_key(scope, receive, send):
            scope.setdefault("state", {})["key"] = self.key
            await self.app(scope, receive, send)

        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(with_key, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "workspace"))
    write_index(made, "v1", {"a": 1, "b": 2}, titles={"a": "Aria"})
    return made


@pytest.fixture
def client(workspace: Workspace) -> Client:
    return Client(workspace)


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory: pytest.TempPathFactory) -> Client:
    """Client of requests that must not change the workspace, shared by the tests of this module."""
    made = Workspace(str(tmp_path_factory.mktemp("unchanged") / "workspace"))
    write_index(made, "v1", {"a": 1, "b": 2}, titles={"a": "Aria"})
    client = Client(made)
    write_index(made, "others", {"a": 1}, model_versions={"semantic": "others", "preference": "weights-p"})
    return client


def assert_failure(response: httpx.Response, status: int, code: str, message: str = "") -> None:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    assert set(body) == {"code", "message"}
    assert body["code"] == code
    assert message in body["message"]


@pytest.mark.parametrize("value", [np.nan, 0.0, 2.0])
def test_a_vector_without_unit_norm_is_not_written(
    client: Client, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, value: float
):
    """Over HTTP it is 500, and the update log refuses it as well."""
    damaged = Vectors(unit_vectors(7).semantic, unit_vectors(7).preference * np.float32(value))
    before = contents(client.live.service.index), workspace.children("updates")

    async def encode_song(backend: Backend, data: bytes) -> Vectors:
        return damaged

    monkeypatch.setattr(Backend, "encode_song", encode_song)
    assert_failure(client("PUT", "/v1/songs/new", files={"file": ("x.mp3", b"x" * 77)}), 500, "internal")
    with pytest.raises(
        InputError,
        match=r"the preference vector of song 'new' has .*; expected unit norm: the encoder that gave it is damaged",
    ):
        UpdateLog(workspace).append(Update("new", damaged, VERSIONS, {}))
    assert (contents(client.live.service.index), workspace.children("updates")) == before


@pytest.mark.parametrize("song_id", ["new", "with/slash", "ü ?#", "a"])
def test_a_song_with_audio_and_metadata_is_searchable_immediately(client: Client, workspace: Workspace, song_id: str):
    metadata = {"title": "Neu", "genre": ["jazz", "folk"], "year": 1999}
    response = client(
        "PUT",
        f"/v1/songs/{quote(song_id)}",
        files={"file": ("../../x.MP3", b"x" * 77)},
        data={"metadata": json.dumps(metadata)},
    )
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["song_id"], body["index"], body["update"]) == (song_id, "v1", client.live.active.replay.last)
    song = client("GET", f"/v1/songs/{quote(song_id)}").json()
    assert {name: song[name] for name in metadata} == metadata
    assert contents(client.live.service.index)[song_id] == content_of(77, "Neu")
    kept = Path(client.live.service.index.metadata_of(song_id)["audio_path"])
    assert kept.read_bytes() == b"x" * 77
    assert (kept.parent, kept.suffix) == (Path(workspace.full("uploads")), ".mp3")
    assert contents(Client(workspace).live.service.index) == contents(client.live.service.index)


def test_metadata_alone_keeps_the_audio_and_audio_alone_the_metadata(client: Client):
    assert client("PUT", "/v1/songs/a", json={"title": "Ballad", "album": "One"}).status_code == 200
    assert contents(client.live.service.index)["a"] == content_of(1, "Ballad")
    assert client("PUT", "/v1/songs/a", data={"metadata": '{"title": "Chant"}'}).status_code == 200
    assert client("GET", "/v1/songs/a").json()["album"] is None
    assert client("PUT", "/v1/songs/a", files={"file": ("x", b"y" * 5)}).status_code == 200
    assert contents(client.live.service.index)["a"] == content_of(5, "Chant")


@pytest.mark.parametrize("as_form", [False, True])
def test_a_vector_takes_the_place_of_audio(client: Client, as_form: bool):
    vector, title = [9, 0.5, 1], {"title": "Given"}
    sent = (
        {"data": {"vector": "[9, 0.5, 1]", "metadata": json.dumps(title)}}
        if as_form
        else {"json": {"vector": vector, **title}}
    )
    assert client("PUT", "/v1/songs/new", **sent).status_code == 200
    assert contents(client.live.service.index)["new"] == content_of(9, "Given")
    assert client("PUT", "/v1/songs/a", json={"vector": [4, 0, 0]}).status_code == 200
    assert contents(client.live.service.index)["a"] == content_of(4, "Aria")  # its metadata stays


def test_a_song_is_removed(client: Client):
    assert client("DELETE", "/v1/songs/a").status_code == 200
    assert set(contents(client.live.service.index)) == {"b"}
    assert_failure(client("DELETE", "/v1/songs/a"), 404, "song_not_found")
    assert_failure(client("PUT", "/v1/songs/a", json={"title": "x"}), 404, "song_not_found")


BAD_PUTS = [
    ({"json": {"vector": [1, 2]}}, 422, "invalid_query", "the vector has 2 numbers"),
    ({"json": {"vector": []}}, 422, "invalid_request", "vector"),
    ({"json": {"vector": ["x"]}}, 422, "invalid_request", "vector"),
    ({"data": {"vector": '[1], "title": "x"'}}, 400, "malformed_json", ""),
    ({"data": {"vector": "[1, 2, 3]"}, "files": {"file": ("a", b"x")}}, 422, "invalid_query", "a file and a vector"),
    ({}, 422, "invalid_query", "neither"),
    ({"json": {"titel": "x"}}, 422, "invalid_request", "titel"),
    ({"json": {"year": 1e300}}, 422, "invalid_request", "year"),
    ({"json": []}, 422, "invalid_request", ""),
    ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "malformed_json", ""),
    ({"content": b'{"title": "\\ud800"}', "headers": {"content-type": "application/json"}}, 400, "malformed_json", ""),
    ({"content": b"\xff", "headers": {"content-type": "application/json"}}, 400, "malformed_json", ""),
    ({"files": {"file": ("a", b"x")}, "data": {"metadata": "{"}}, 400, "malformed_json", ""),
    ({"files": {"file": ("a", b"x")}, "data": {"metadata": '{"genre": "rock"}'}}, 422, "invalid_request", "genre"),
    ({"files": {"file": ("a", b"bad")}}, 415, "undecodable", "no audio"),
    ({"files": {"file": ("a", b"x" * 1001)}}, 413, "too_large", "1000"),
    ({"data": {"file": "text"}}, 422, "invalid_request", "file"),
    ({"content": b'{"title": "x"}'}, 415, "unsupported_media_type", "no Content-Type"),
    (
        {"content": b'{"title": "x"}', "headers": {"content-type": "application/x-www-form-urlencoded"}},
        415,
        "unsupported_media_type",
        "JSON",
    ),
]


@pytest.mark.parametrize(("options", "status", "code", "message"), BAD_PUTS)
def test_an_invalid_put_changes_nothing(unchanged: Client, options: dict, status: int, code: str, message: str):
    assert_failure(unchanged("PUT", "/v1/songs/a", **options), status, code, message)
    assert not unchanged.live.workspace.exists("updates")
    assert not unchanged.live.workspace.exists("uploads")


@pytest.mark.parametrize("song_id", ["", "x" * 1001])
def test_an_invalid_id_is_an_error(unchanged: Client, song_id: str):
    assert_failure(unchanged("PUT", f"/v1/songs/{song_id}", files={"file": ("a", b"x")}), 422, "invalid_request")


@pytest.mark.parametrize("scopes", [None, ("read",)])
def test_every_write_needs_a_key_with_write_scope(workspace: Workspace, scopes: tuple[str, ...] | None):
    client = Client(workspace, scopes)
    for method, path, options in (
        ("PUT", "/v1/songs/a", {"json": {"title": "x"}}),
        ("DELETE", "/v1/songs/a", {}),
        ("POST", "/v1/index/activate", {"json": {"version": "v1"}}),
    ):
        assert_failure(client(method, path, **options), 401, "unauthorised", "write")
    assert not workspace.exists("updates")
    assert not workspace.exists("index/active.json")
    assert client("GET", "/v1/songs/a").json()["title"] == "Aria"


def test_activating_another_index(client: Client, workspace: Workspace):
    write_index(workspace, "v2", {"a": 10, "c": 3})
    client("PUT", "/v1/songs/new", files={"file": ("a", b"x")})
    client("DELETE", "/v1/songs/a")
    response = client("POST", "/v1/index/activate", json={"version": "v2"})
    assert response.status_code == 200, response.text
    assert (response.json()["version"], response.json()["songs"]) == ("v2", 2)
    served = client("GET", "/v1/index").json()
    assert (served["version"], served["songs"], served["activated_at"]) == ("v2", 2, response.json()["activated_at"])
    assert served["updates"] == {
        "applied": 2,
        "skipped": 0,
        "broken": 0,
        "last": client.live.active.replay.last,
        "songs_added": 1,
        "songs_removed": 1,
        "files": 2,
        "failed_polls": 0,
    }


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"version": "nothing"}, 404, "index_not_found"),
        ({"version": "../v1"}, 422, "invalid_request"),
        ({"version": ".."}, 422, "index_refused"),
        ({"version": "active.json"}, 404, "index_not_found"),
        ({"version": "others"}, 422, "index_refused"),
        ({"version": 3}, 422, "invalid_request"),
        ({}, 422, "invalid_request"),
    ],
)
def test_an_index_that_cannot_be_served_is_an_error(unchanged: Client, body: dict, status: int, code: str):
    assert_failure(unchanged("POST", "/v1/index/activate", json=body), status, code)
    assert unchanged("GET", "/v1/index").json()["version"] == "v1"


@pytest.mark.parametrize("name", ["workspace", "a folder with spaces"])
def test_no_response_shows_the_path_of_the_workspace(tmp_path: Path, name: str):
    made = Workspace(str(tmp_path / name))
    write_index(made, "v1", {"a": 1}, titles={"a": "Aria"})
    write_index(made, "damaged", {"a": 1}, titles={"a": "Aria"})
    made.write_bytes("index/damaged/index.faiss", b"x")
    made.write_bytes("index/half/manifest.json", b"{")
    manifest = made.manifest("index/v1") or {}
    places = {
        "workspace": made.uri,
        "data": {"catalog": [f"{made.uri}/songs.csv", "s3://key:secret@bucket/b.csv"]},
        "audio": {"n_mels": 128},
    }
    made.finish("index/v1", {**manifest, "config": places})
    client = Client(made)
    responses = [
        client("POST", "/v1/index/activate", json={"version": version}) for version in ("nothing", "damaged", "half")
    ]
    assert [response.status_code for response in responses] == [404, 422, 422]
    served = client("GET", "/v1/index")
    assert served.json()["manifest"]["config"] == {
        "workspace": name,
        "data": {"catalog": ["songs.csv", "b.csv"]},
        "audio": {"n_mels": 128},
    }
    for response in (*responses, served):
        assert str(tmp_path) not in response.text
        assert "secret" not in response.text
        assert "://" not in response.text
    for version, response in zip(("nothing", "damaged", "half"), responses, strict=True):
        assert version in response.json()["error"]["message"]


def test_a_concurrent_activation_is_429(client: Client, monkeypatch: pytest.MonkeyPatch):
    def busy(version: str) -> None:
        raise SwitchInProgress

    monkeypatch.setattr(client.live, "activate", busy)
    response = client("POST", "/v1/index/activate", json={"version": "v1"})
    assert_failure(response, 429, "too_many_requests", "another index is being loaded")
    assert int(response.headers["retry-after"]) > 0


def test_failing_storage_is_503(client: Client, monkeypatch: pytest.MonkeyPatch):
    def down(*_: object, **__: object) -> None:
        raise OSError("the network is down")

    monkeypatch.setattr(client.live.workspace, "write_bytes", down)
    response = client("PUT", "/v1/songs/a", json={"title": "x"})
    assert_failure(response, 503, "unavailable")
    assert "retry-after" in response.headers
    assert client("GET", "/v1/songs/a").json()["title"] == "Aria"
