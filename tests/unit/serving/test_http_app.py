"""Every route and every failure of the HTTP application, over ASGI: no cluster, no socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest
from ray.serve.exceptions import BackPressureError, RayServeException

from htcl_ray.api.requests import Filter, Play
from htcl_ray.config.sections import AudioRecipe, ServeSettings
from htcl_ray.errors import AudioError, HtclError, InputError, NoResponseError, RequestError
from htcl_ray.index.live.live_index import Active
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import UpdateLog
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.schemas import Reason
from htcl_ray.search.service import SearchService
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.middleware.request_checks import MAX_JSON_BYTES
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import sound, wav

pytestmark = pytest.mark.unit

IDS = ["a", "b", "c", "with/slash", "ü ?#"]
RECIPE = AudioRecipe(clip_seconds=2)


def vectors(seed: int, rows: int) -> Vectors:
    rng = np.random.default_rng(seed)
    halves = rng.normal(size=(2, rows, 3))
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    return Vectors(*halves.astype(np.float32))


class FakeBackend:
    """Backend that encodes text and bytes by their hash, or raises `error`."""

    def __init__(self) -> None:
        metadata = pa.table(
            {"artist": ["A", "A", "B", None, None], "year": pa.array([1990, 1995, 2000, None, 1991], pa.int32())}
        )
        versions = {"semantic": "s1", "preference": "p1"}
        self.service = SearchService(
            SongIndex.build(IDS, vectors(0, len(IDS)), metadata=metadata, model_versions=versions)
        )
        replay = Replay(self.service.index, UpdateLog(Workspace("nowhere")))
        active = Active("v1", self.service, "2026-01-01T00:00:00.000000+00:00", replay)
        self.live = SimpleNamespace(active=active, broken={}, failed_polls=0)
        self.error: Exception | None = None

    async def encode_text(self, text: str) -> Vectors:
        if self.error:
            raise self.error
        return replace(vectors(sum(text.encode()), 1), text_coverage=np.array([min(1, len(text) / 10)]))

    async def encode_audio(self, data: bytes) -> Vectors:
        if self.error:
            raise self.error
        return vectors(len(data), 1)

    async def check_ready(self) -> None:
        if self.error:
            raise self.error


class Client:
    """Synchronous client over ASGI."""

    def __init__(self, settings: ServeSettings | None = None) -> None:
        self.backend = FakeBackend()
        self.app = create_app(self.backend, settings or ServeSettings(max_upload_bytes=200_000))

    def __call__(self, method: str, path: str, **options) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())


@pytest.fixture(scope="module")
def shared_client() -> Client:
    return Client()


@pytest.fixture
def client(shared_client: Client) -> Client:
    shared_client.backend.error = None
    return shared_client


def assert_failure(response: httpx.Response, status: int, code: str, message: str = "") -> None:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"code", "message"}
    assert body["error"]["code"] == code
    assert message in body["error"]["message"]


def result_ids(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [result["song_id"] for result in response.json()["results"]]


def test_search_returns_the_results_of_the_service(client: Client):
    service = client.backend.service
    seeds, query = ["a", "b"], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    expected = {
        "text": service.search(vectors(sum(b"calm"), 1), k=3, blend=0.2),
        "song_id": service.search_songs(["a"], k=3, blend=0.2),
        "song_ids": service.search_songs(seeds, k=3, blend=0.2),
        "vector": service.search_vector(query, k=3, blend=0.2),
    }
    for name, value in (("text", "calm"), ("song_id", "a"), ("song_ids", seeds), ("vector", query)):
        response = client("POST", "/v1/search", json={name: value, "k": 3, "blend": 0.2})
        assert result_ids(response) == [hit.song_id for hit in expected[name].hits]
        body = response.json()
        assert (body["k"], body["blend"], body["index"]) == (3, 0.2, "v1")
        for result, hit in zip(body["results"], expected[name].hits, strict=True):
            assert result["score"] == pytest.approx(0.8 * hit.semantic_score + 0.2 * hit.preference_score)
            assert {"title", "artist", "genre", "year"} <= set(result)


def test_only_text_queries_report_text_coverage(client: Client):
    assert client("POST", "/v1/search", json={"text": "calm"}).json()["text_coverage"] == 0.4
    assert client("POST", "/v1/embeddings", json={"text": "calm"}).json()["text_coverage"] == 0.4
    files = {"file": ("a.wav", b"123")}
    others = [
        *(
            client("POST", "/v1/search", json=body)
            for body in ({"song_id": "a"}, {"song_ids": ["a"]}, {"vector": [1, 0, 0, 1, 0, 0]})
        ),
        *(client("POST", path, files=files) for path in ("/v1/search/audio", "/v1/embeddings")),
        client("POST", "/v1/recommend", json={"history": [{"song_id": "a"}]}),
        client("GET", "/v1/songs/a/similar"),
    ]
    for response in others:
        assert response.json()["text_coverage"] is None


def test_defaults(client: Client):
    body = client("POST", "/v1/search", json={"text": "calm"}).json()
    assert (body["k"], body["blend"]) == (10, 0.5)


def test_uploads(client: Client):
    data = wav(sound(0, RECIPE, seconds=0.5), RECIPE)
    response = client("POST", "/v1/search/audio", files={"file": ("a.wav", data)}, data={"k": "2", "blend": "1"})
    assert result_ids(response) == [
        hit.song_id for hit in client.backend.service.search(vectors(len(data), 1), k=2, blend=1).hits
    ]
    assert (response.json()["k"], response.json()["blend"]) == (2, 1)
    assert client("POST", "/v1/search/audio", files={"file": ("a.wav", data)}).json()["k"] == 10


JSON = {"content-type": "application/json"}
NOT_A_WEIGHT = b'{"history": [{"song_id": "a", "weight": NaN}]}'
OPTIONS = {
    "k": 3,
    "blend": 0.25,
    "filter": {"year": {"gte": 1990, "lte": 1999}},
    "max_per_artist": 1,
    "collapse_duplicates": False,
}


def test_options_have_the_same_effect_in_every_route(client: Client):
    service = client.backend.service
    options = {**OPTIONS, "filter": Filter.model_validate(OPTIONS["filter"])}
    flat = {name: json.dumps(value) if isinstance(value, dict) else str(value) for name, value in OPTIONS.items()}
    file = {"file": ("a.wav", b"12345")}
    likes = [hit.song_id for hit in service.search_songs(["b"], **options).hits]
    assert likes, "the filter must leave something"
    assert result_ids(client("POST", "/v1/search", json={"song_id": "b", **OPTIONS})) == likes
    assert result_ids(client("GET", "/v1/songs/b/similar", params=flat)) == likes
    assert result_ids(client("POST", "/v1/recommend", json={"history": [{"song_id": "b"}], **OPTIONS})) == likes
    near = [hit.song_id for hit in service.search(vectors(5, 1), **options).hits]
    assert result_ids(client("POST", "/v1/search/audio", files=file, data=flat)) == near
    assert result_ids(client("POST", "/v1/search", json={"text": "\x05", **OPTIONS})) == near


def test_negatives_and_histories(client: Client):
    service = client.backend.service
    body = {"song_ids": ["a"], "negative_song_ids": ["b"]}
    assert result_ids(client("POST", "/v1/search", json=body)) == [
        hit.song_id for hit in service.search_songs(["a"], ["b"]).hits
    ]
    history = [
        {"song_id": "a", "weight": 2, "timestamp": 1_700_000_000},
        {"song_id": "b", "weight": -0.5},
        {"song_id": "zz"},
    ]
    response = client("POST", "/v1/recommend", json={"history": history, "half_life_days": 7})
    history = [Play("a", 2, 1_700_000_000), Play("b", -0.5)]
    assert result_ids(response) == [hit.song_id for hit in service.recommend(history, half_life_days=7).hits]
    assert response.json()["unknown_song_ids"] == ["zz"]


def test_embeddings(client: Client):
    by_text = client("POST", "/v1/embeddings", json={"text": "calm"})
    expected = vectors(sum(b"calm"), 1)
    assert by_text.json() == {
        "semantic": expected.semantic[0].tolist(),
        "preference": expected.preference[0].tolist(),
        "text_coverage": 0.4,
        "model_versions": {"semantic": "s1", "preference": "p1"},
    }
    by_audio = client("POST", "/v1/embeddings", files={"file": ("a.wav", b"123")}).json()
    assert by_audio["semantic"] == vectors(3, 1).semantic[0].tolist()
    vector = [*by_audio["semantic"], *by_audio["preference"]]
    near = client("POST", "/v1/search/audio", files={"file": ("a.wav", b"123")})
    assert result_ids(client("POST", "/v1/search", json={"vector": vector})) == result_ids(near)


@pytest.mark.parametrize(
    ("path", "options", "status", "code", "message"),
    [
        ("/v1/embeddings", {"json": {}}, 422, "invalid_request", "body.text: Field required"),
        ("/v1/embeddings", {"json": {"text": ""}}, 422, "invalid_request", "body.text"),
        ("/v1/embeddings", {"json": {"text": " "}}, 422, "invalid_query", "the text is empty"),
        ("/v1/embeddings", {"content": b"{"}, 415, "unsupported_media_type", "no Content-Type"),
        ("/v1/embeddings", {"content": b"{", "headers": JSON}, 400, "malformed_json", "the body is not JSON"),
        ("/v1/embeddings", {"content": b""}, 400, "malformed_json", "not JSON"),
        ("/v1/embeddings", {"files": {"other": b"1"}}, 422, "invalid_query", "neither a file nor a text"),
        ("/v1/embeddings", {"data": {"text": "calm"}}, 415, "unsupported_media_type", "Content-Type"),
        ("/v1/recommend", {"json": {"history": []}}, 422, "invalid_request", "body.history"),
        ("/v1/recommend", {"json": {"history": [{"song_id": "zz"}]}}, 404, "song_not_found", "none of the 1 songs"),
        ("/v1/recommend", {"json": {"history": [{"song_id": "a", "weight": 0}]}}, 422, "invalid_query", "weight"),
        ("/v1/recommend", {"content": NOT_A_WEIGHT, "headers": JSON}, 422, "invalid_request", "weight"),
        (
            "/v1/recommend",
            {"json": {"history": [{"song_id": "a", "timestamp": 1e300}]}},
            422,
            "invalid_request",
            "timestamp",
        ),
        (
            "/v1/recommend",
            {"json": {"history": [{"song_id": "a"}], "half_life_days": 0}},
            422,
            "invalid_request",
            "half_life_days",
        ),
        (
            "/v1/search",
            {"json": {"text": "a", "negative_song_ids": ["b"]}},
            422,
            "invalid_request",
            "goes with song_id or song_ids",
        ),
        ("/v1/search", {"json": {"song_id": "a", "negative_song_ids": ["zz"]}}, 404, "song_not_found", "zz"),
        (
            "/v1/search",
            {"json": {"song_id": "a", "filter": {"genres": ["x"]}}},
            422,
            "invalid_request",
            "did you mean 'genre'",
        ),
        ("/v1/search", {"json": {"song_id": "a", "max_per_artist": 0}}, 422, "invalid_request", "max_per_artist"),
        (
            "/v1/search/audio",
            {"files": {"file": b"1"}, "data": {"filter": "{"}},
            400,
            "malformed_json",
            "the form field filter is not JSON",
        ),
        (
            "/v1/search/audio",
            {"files": {"file": b"1"}, "data": {"filter": '{"yeer": 1}'}},
            422,
            "invalid_request",
            "form field filter: ",
        ),
        (
            "/v1/search/audio",
            {"files": {"file": b"1"}, "data": {"filter": "[" * 100_000}},
            400,
            "malformed_json",
            "not JSON",
        ),
    ],
)
def test_invalid_queries_are_errors(client: Client, path: str, options: dict, status: int, code: str, message: str):
    assert_failure(client("POST", path, **options), status, code, message)


@pytest.mark.parametrize("song_id", IDS)
def test_songs_with_unusual_ids(client: Client, song_id: str):
    path = f"/v1/songs/{quote(song_id)}"
    assert client("GET", path).json()["song_id"] == song_id
    assert sorted([*result_ids(client("GET", f"{path}/similar", params={"k": 10})), song_id]) == sorted(IDS)
    assert len(result_ids(client("GET", f"{path}/similar?k=2&blend=0"))) == 2


def test_operations(client: Client):
    assert client("GET", "/healthz").json() == {"status": "ok"}
    assert client("GET", "/readyz").json() == {"status": "ready", "index": "v1", "songs": len(IDS)}
    index = client("GET", "/v1/index").json()
    assert (index["version"], index["songs"], index["dim"], index["has_preference"]) == ("v1", len(IDS), 3, True)


BAD_SEARCHES = [
    ({}, 422, "invalid_request", "exactly one"),
    ({"text": "a", "song_id": "a"}, 422, "invalid_request", "text and song_id"),
    ({"text": "a", "k": 0}, 422, "invalid_request", "body.k"),
    ({"text": "a", "k": 1001}, 422, "invalid_request", "1000"),
    ({"text": "a", "k": 10**400}, 422, "invalid_request", "body.k"),
    ({"text": "a", "k": "many"}, 422, "invalid_request", "body.k"),
    ({"text": "a", "blend": 1.5}, 422, "invalid_request", "body.blend"),
    ({"text": "a", "blend": "x"}, 422, "invalid_request", "body.blend"),
    ({"text": ""}, 422, "invalid_request", "body.text"),
    ({"text": " "}, 422, "invalid_query", "empty"),
    ({"text": 5}, 422, "invalid_request", "body.text"),
    ({"text": "x" * 10_001}, 422, "invalid_request", "10000"),
    ({"song_ids": []}, 422, "invalid_request", "body.song_ids"),
    ({"vector": []}, 422, "invalid_query", "expected 6"),
    ({"vector": [1.0]}, 422, "invalid_query", "expected 6"),
    ({"vector": [0.0] * 6}, 422, "invalid_query", "zero"),
    ({"vector": [1e300] * 6}, 422, "invalid_query", "not finite"),
    ({"text": "a", "colour": "red"}, 422, "invalid_request", "colour"),
    ({"song_id": "missing"}, 404, "song_not_found", "'missing'"),
    ({"song_ids": ["a", "missing"]}, 404, "song_not_found", "'missing'"),
    ([], 422, "invalid_request", ""),
    ("text", 422, "invalid_request", ""),
    (None, 422, "invalid_request", ""),
]


@pytest.mark.parametrize(("body", "status", "code", "message"), BAD_SEARCHES)
def test_invalid_search_bodies_are_errors(client: Client, body, status: int, code: str, message: str):
    content = json.dumps(body).encode()
    response = client("POST", "/v1/search", content=content, headers={"content-type": "application/json"})
    assert_failure(response, status, code, message)


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"{", 400, "malformed_json"),
        (b"{'text': 'a'}", 400, "malformed_json"),
        (b"\xff\xfe", 400, None),
        (b"[" * 200_000, 400, "bad_request"),
        (b'{"text": "\\ud800"}', 422, "invalid_request"),
        (b'{"vector": [NaN, 1, 1, 1, 1, 1]}', 422, "invalid_request"),
        (b'{"text": "a", "blend": NaN}', 422, "invalid_request"),
        (b'{"text": "a", "blend": Infinity}', 422, "invalid_request"),
        (b'{"text": "a", "k": ' + b"9" * 5_000 + b"}", 400, "bad_request"),
        (b"", 422, "invalid_request"),
    ],
)
def test_malformed_json_bodies_are_errors(client: Client, content: bytes, status: int, code: str | None):
    response = client("POST", "/v1/search", content=content, headers={"content-type": "application/json"})
    assert_failure(response, status, code or response.json()["error"]["code"])


def test_unknown_paths_and_songs_are_404(client: Client):
    assert_failure(client("GET", "/v1/nothing"), 404, "not_found", "/v1/nothing")
    assert_failure(client("GET", "/v2"), 404, "not_found")
    assert_failure(client("PUT", "/v1/search"), 405, "method_not_allowed")
    assert_failure(client("GET", "/v1/songs/missing"), 404, "song_not_found")
    assert_failure(client("GET", "/v1/songs/missing/similar"), 404, "song_not_found")
    assert_failure(client("GET", "/v1/songs/a/similar?k=0"), 422, "invalid_request", "query.k")
    assert_failure(client("GET", "/v1/songs/a/similar?blend=nan"), 422, "invalid_request", "query.blend")


def test_invalid_uploads_are_errors(client: Client):
    wrong = "/v1/search/audio"
    good = wav(sound(0, RECIPE, seconds=0.2), RECIPE)
    assert_failure(client("POST", wrong, json={}), 415, "unsupported_media_type", "multipart/form-data")
    assert_failure(client("POST", wrong, data={"file": "text"}), 415, "unsupported_media_type", "multipart/form-data")
    assert_failure(
        client("POST", wrong, files={"file": ("a", good)}, data={"k": "0"}), 422, "invalid_request", "form field k: "
    )
    assert_failure(
        client("POST", wrong, files={"file": ("a", good)}, data={"blend": "nan"}),
        422,
        "invalid_request",
        "form field blend: ",
    )
    broken = {"content-type": "multipart/form-data; boundary=x"}
    assert_failure(client("POST", wrong, content=b"--y\r\nnonsense", headers=broken), 400, "bad_request")
    assert_failure(
        client("POST", wrong, content=b"x", headers={"content-type": "multipart/form-data"}), 400, "bad_request"
    )


@pytest.mark.parametrize("reason", list(Reason))
def test_unusable_audio_has_a_status_and_code_for_each_reason(client: Client, reason: Reason):
    client.backend.error = AudioError(reason, "reason")
    unusable = (Reason.TOO_SHORT, Reason.NOT_FINITE, Reason.TOO_MANY_CHANNELS, Reason.SAMPLE_RATE_TOO_HIGH)
    status = 422 if reason in unusable else 413 if reason is Reason.TOO_LONG else 415
    assert_failure(client("POST", "/v1/search/audio", files={"file": ("a", b"x")}), status, reason.value, "reason")


def all_errors(kind: type = HtclError) -> Iterator[type[HtclError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from all_errors(child)


def test_every_error_of_the_package_has_a_response(client: Client):
    kinds = [
        kind for kind in all_errors() if kind not in (RequestError, NoResponseError)
    ]  # raised by the Python client only
    assert len(kinds) >= 9
    for kind in kinds:
        client.backend.error = AudioError(Reason.UNDECODABLE, "secret") if kind is AudioError else kind("secret")
        response = client("POST", "/v1/search", json={"text": "a"})
        assert_failure(response, response.status_code, response.json()["error"]["code"])
        assert response.status_code in (404, 415, 422, 500)
        if response.status_code == 500:
            assert "secret" not in response.text


def test_unexpected_errors_are_500_without_details(client: Client):
    client.backend.error = ZeroDivisionError("secret")
    response = client("POST", "/v1/search", json={"text": "a"})
    assert_failure(response, 500, "internal")
    assert "secret" not in response.text


def test_full_encoders_are_429(client: Client):
    client.backend.error = BackPressureError(num_queued_requests=9, max_queued_requests=8)
    response = client("POST", "/v1/search", json={"text": "calm"})
    assert_failure(response, 429, "overloaded", "try again")
    assert response.headers["retry-after"] == "1"


def test_errors_of_another_replica_keep_their_status(client: Client):
    from ray.exceptions import RayActorError, RayTaskError

    cause = AudioError(Reason.UNDECODABLE, "no format")
    client.backend.error = RayTaskError("encode_audio", "traceback", cause).as_instanceof_cause()
    assert_failure(client("POST", "/v1/search/audio", files={"file": ("a", b"x")}), 415, "undecodable", "no format")
    for error in (RayActorError(), RayServeException("gone"), TimeoutError()):
        client.backend.error = error
        response = client("GET", "/readyz")
        assert_failure(response, 503, "unavailable")
        assert response.headers["retry-after"]
    client.backend.error = RayTaskError("encode_text", "traceback", InputError("secret")).as_instanceof_cause()
    assert_failure(client("POST", "/v1/search", json={"text": "a"}), 500, "internal")


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_an_invalid_vector_of_the_encoder_is_500(client: Client, monkeypatch: pytest.MonkeyPatch, value: float):
    async def damaged(content: object) -> Vectors:
        given = vectors(1, 1)
        given.preference[0, 1:] = value
        return Vectors(given.semantic, given.preference * (value != 0))

    monkeypatch.setattr(client.backend, "encode_text", damaged)
    monkeypatch.setattr(client.backend, "encode_audio", damaged)
    for path in ("/v1/search", "/v1/embeddings"):
        assert_failure(client("POST", path, json={"text": "calm"}), 500, "internal")
    for path in ("/v1/search/audio", "/v1/embeddings"):
        assert_failure(client("POST", path, files={"file": ("a", b"x")}), 500, "internal")


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1:8000", "[::1]:8000", "[::1]", "music.example:443", "192.0.2.7"]
)
def test_allowed_hosts(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HTCL_API_KEYS", '[{"name": "a", "key": "0123456789abcdef", "scopes": ["read"]}]')
    client = Client(ServeSettings(host="192.0.2.7", allowed_hosts=("Music.example",)))
    assert client("GET", "/healthz", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "localhost.evil.example", "evil.example:80", "127.0.0.1.evil.example", "", "localhost:80:80"],
)
def test_hosts_that_are_not_allowed_are_400(host: str, client: Client):
    assert_failure(client("GET", "/healthz", headers={"host": host}), 400, "unknown_host", "serve.allowed_hosts")


NO_TYPE = {"content": b'{"text": "calm piano"}'}
AS_FIELDS = {**NO_TYPE, "headers": {"content-type": "application/x-www-form-urlencoded"}}
FIELD = {"files": {"file": (None, b"audio"), "k": (None, b"3")}}
MISTAKES = [
    *((path, NO_TYPE, 415, "no Content-Type") for path in ("/v1/search", "/v1/recommend", "/v1/embeddings")),
    *(
        (path, AS_FIELDS, 415, "'application/x-www-form-urlencoded'")
        for path in ("/v1/search", "/v1/recommend", "/v1/embeddings")
    ),
    ("/v1/search/audio", NO_TYPE, 415, "no Content-Type of its body; expected multipart/form-data"),
    ("/v1/search/audio", {"json": {"k": 3}}, 415, "multipart/form-data"),
    ("/v1/search/audio", FIELD, 422, "file name"),
    ("/v1/embeddings", FIELD, 422, "file name"),
    ("/v1/search/audio", {"files": {"k": (None, b"3")}}, 422, "file name"),
    (
        "/v1/search/audio",
        {"files": {"file": ("a", b"1")}, "data": {"filter": "{genre:rock}"}},
        400,
        "the form field filter is not JSON: ",
    ),
    (
        "/v1/search/audio",
        {"files": {"file": ("a", b"1")}, "data": {"filter": "[1]"}},
        422,
        "form field filter: expected a JSON object",
    ),
    ("/v1/search/audio", {"files": {"file": ("a", b"1"), "filter": ("f.json", b"{}")}}, 422, "form field filter: "),
    ("/v1/search", {"json": {"text": "a", "filter": 5}}, 422, "body.filter: expected a JSON object"),
    ("/v1/search", {"json": [1]}, 422, "body: expected a JSON object"),
    ("/v1/search", {"json": {"text": "a" * MAX_JSON_BYTES}}, 413, "the most of one that is not multipart/form-data"),
]


@pytest.mark.parametrize(("path", "options", "status", "said"), MISTAKES)
def test_errors_name_the_missing_or_wrong_part(client: Client, path: str, options: dict, status: int, said: str):
    response = client("POST", path, **options)
    assert response.status_code == status
    message = response.json()["error"]["message"]
    assert said in message
    for misleading in (
        "UploadFile",
        "class",
        "dictionary",
        "object to extract",
        "Filter",
        "instance of",
        "max_upload_bytes",
    ):
        assert misleading not in message
    if "form field" in message:
        assert "body" not in message


def test_an_invalid_filter_parameter_is_named(client: Client):
    assert_failure(
        client("GET", "/v1/songs/a/similar?filter={"), 400, "malformed_json", "the parameter filter is not JSON"
    )


def test_audio_errors_show_no_folder(client: Client):
    client.backend.error = AudioError(
        Reason.UNDECODABLE, "/tmp/a/b/x.mp3: no audio, s3://bucket/ü/y.wav neither; 3/4 is fine"
    )
    response = client("POST", "/v1/search/audio", files={"file": ("a", b"1")})
    assert_failure(response, 415, "undecodable", "x.mp3: no audio, y.wav neither; 3/4 is fine")
    assert "/tmp" not in response.text


def test_an_oversized_upload_names_the_setting(client: Client):
    response = client("POST", "/v1/search/audio", files={"file": ("a", b"x" * 400_000)})
    assert_failure(response, 413, "too_large", "serve.max_upload_bytes")


def test_any_host_can_be_allowed():
    assert (
        Client(ServeSettings(allowed_hosts=("*",)))("GET", "/healthz", headers={"host": "evil.example"}).status_code
        == 200
    )


def test_an_oversized_declared_length_is_rejected_unread(client: Client):
    response = client(
        "POST", "/v1/search", content=b" " * (MAX_JSON_BYTES + 1), headers={"content-type": "application/json"}
    )
    assert_failure(response, 413, "too_large", str(MAX_JSON_BYTES))
    response = client("POST", "/v1/search/audio", files={"file": ("a", b"x" * 300_000)})
    assert_failure(response, 413, "too_large", "serve.max_upload_bytes")
    response = client("POST", "/v1/search/audio", files={"file": ("a", b"x" * 200_001)})
    assert_failure(response, 413, "too_large", "200000")


def test_a_declared_length_is_checked_before_the_body_is_read(client: Client):
    async def ask() -> list[dict]:
        async def receive() -> dict:
            pytest.fail("the body was read")

        sent: list[dict] = []
        headers = [(b"host", b"localhost"), (b"content-length", str(MAX_JSON_BYTES + 1).encode())]
        scope = {"type": "http", "method": "POST", "path": "/v1/search", "query_string": b"", "headers": headers}

        async def send(message: dict) -> None:
            sent.append(message)

        await client.app(scope, receive, send)
        return sent

    assert asyncio.run(ask())[0]["status"] == 413


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x"])
def test_an_endless_body_is_rejected_while_it_is_read(client: Client, kind: str):
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        while sent < 20_000_000:
            sent += 50_000
            yield b"y" * 50_000

    path = "/v1/search" if kind.endswith("json") else "/v1/search/audio"
    response = client("POST", path, content=endless(), headers={"content-type": kind})
    assert_failure(response, 413, "too_large")
    assert sent < 2 * MAX_JSON_BYTES


@pytest.mark.parametrize(
    ("path", "allowed"), [("/v1/search", "POST"), ("/v1/songs/a", "DELETE, GET, HEAD, PUT"), ("/healthz", "GET, HEAD")]
)
def test_a_wrong_method_is_405_with_the_allowed_methods(client: Client, path: str, allowed: str):
    response = client("OPTIONS", path)
    assert_failure(response, 405, "method_not_allowed", f"it takes {allowed}")
    assert response.headers["allow"] == allowed


class TestOpenApi:
    @pytest.fixture
    def schema(self, client: Client) -> dict:
        return client("GET", "/openapi.json").json()

    def test_lists_the_routes(self, schema: dict):
        calls = {(method.upper(), path) for path, methods in schema["paths"].items() for method in methods}
        assert calls == {
            ("POST", "/v1/search"),
            ("POST", "/v1/search/audio"),
            ("POST", "/v1/recommend"),
            ("POST", "/v1/embeddings"),
            ("GET", "/v1/songs/{song_id}"),
            ("GET", "/v1/songs/{song_id}/similar"),
            ("GET", "/v1/songs/{song_id}/audio"),
            ("POST", "/v1/songs/{song_id}/audio-url"),
            ("GET", "/v1/map"),
            ("PUT", "/v1/songs/{song_id}"),
            ("DELETE", "/v1/songs/{song_id}"),
            ("GET", "/v1/background"),
            ("GET", "/v1/index"),
            ("POST", "/v1/index/activate"),
            ("GET", "/rest/getOpenSubsonicExtensions"),
            ("GET", "/rest/tokenInfo"),
            ("GET", "/rest/getSonicSimilarTracks"),
            ("GET", "/rest/findSonicPath"),
            ("GET", "/healthz"),
            ("GET", "/readyz"),
        }

    def test_every_response_has_a_schema(self, schema: dict):
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                for status, response in operation["responses"].items():
                    if path == "/v1/songs/{song_id}/audio" and status in ("200", "206", "304"):
                        assert "application/json" not in response.get("content", {})
                        continue
                    reference = response["content"]["application/json"]["schema"]["$ref"]
                    assert (reference == "#/components/schemas/ErrorResponse") == (status != "200"), (path, status)
                assert {"200", "400", "413", "422", "503"} <= set(operation["responses"])

    def test_examples_are_valid_requests(self, schema: dict, client: Client):
        for path, name in (("/v1/search", "SearchRequest"), ("/v1/recommend", "RecommendRequest")):
            examples = schema["components"]["schemas"][name]["examples"]
            assert examples
            for example in examples:
                assert client("POST", path, json=example).status_code in (200, 404)
