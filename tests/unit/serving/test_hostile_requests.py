"""The benchmark of hostile uploads: its requests are reproducible and as described, its summary reports problems."""

from __future__ import annotations

import io

import httpx
import numpy as np
import pytest
import soundfile

from benchmarks.hostile_requests import AUDIO, DAMAGES, SEARCH, handmade, hostile_files, requests, upload
from benchmarks.hostile_uploads import Exchange, send, shape_problem, summary, undocumented
from tests.unit.serving.test_http_app import Client

pytestmark = pytest.mark.unit


def files() -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for format in ("WAV", "FLAC", "OGG"):
        file = io.BytesIO()
        soundfile.write(file, rng.uniform(-0.5, 0.5, 4_000), 16_000, format=format)
        files.append(file.getvalue())
    return [*files, b"x"]


def test_requests_are_determined_by_the_seed():
    originals = files()
    count = len(list(handmade())) + 64
    first, second, other = (list(requests(originals, count, seed)) for seed in (1, 1, 2))
    assert first == second != other
    assert len(first) == count
    assert {request.kind.removeprefix("damaged: ") for request in first} >= set(DAMAGES)
    assert len(list(requests(originals, 5, 0))) == 5


def test_false_headers_differ_from_the_file():
    made = dict(hostile_files())
    hour = soundfile.info(io.BytesIO(made["an hour of silence in little FLAC"]))
    assert hour.frames == 3_600 * 16_000
    assert len(made["an hour of silence in little FLAC"]) < 300_000
    assert soundfile.info(io.BytesIO(made["FLAC of an hour that declares a second"])).frames == 16_000
    declared = soundfile.info(io.BytesIO(made["FLAC of 4 kB that declares 100 hours"]))
    assert (declared.frames, len(made["FLAC of 4 kB that declares 100 hours"])) == (100 * 3_600 * 16_000, 4_096)
    assert soundfile.info(io.BytesIO(made["WAV of 1,024 channels"])).channels == 1_024


def test_every_kind_gets_a_documented_response():
    """The backend of these tests accepts any bytes as audio, without decoding."""
    client = Client()
    openapi = client("GET", "/openapi.json").json()
    exchanges = []
    for request in handmade():
        response = client(
            request.method,
            request.path or request.route,
            content=request.content,
            headers={"content-type": request.content_type},
        )
        exchanges.append(
            Exchange(request.kind, request.route, request.method, response.status_code, 0.0, shape_problem(response))
        )
    assert not undocumented(exchanges, openapi)
    assert not [exchange for exchange in exchanges if exchange.problem]
    assert {exchange.status for exchange in exchanges} >= {200, 400, 404, 413, 422}


def test_a_well_formed_upload_is_accepted():
    client = Client()
    request = upload("good", b"audio", "a.wav", [("k", "2")])
    response = client("POST", AUDIO, content=request.content, headers={"content-type": request.content_type})
    assert response.status_code == 200
    assert response.json()["k"] == 2


def test_the_summary_reports_problems():
    openapi = {"paths": {SEARCH: {"post": {"responses": {"200": {}, "400": {}}}}}}
    exchanges = [
        Exchange("fine", SEARCH, "POST", 400, 0.1, None),
        Exchange("odd", SEARCH, "POST", 500, 0.2, "not JSON"),
        Exchange("gone", SEARCH, "POST", 0, 9.0, "no response"),
        Exchange("elsewhere", "/v1/other", "POST", 404, 0.1, None),
    ]
    report = summary(exchanges, openapi, [{1: 10_000_000}, {1: 12_000_000}], [{7, 8}, {8, 9}])
    assert report["statuses"] == {"0": 1, "400": 1, "404": 1, "500": 1}
    assert report["undocumented"] == {"POST /v1/search 500": 1}
    assert report["problems"] == ["odd: not JSON", "gone: no response"]
    assert report["slowest"][0] == {"kind": "gone", "status": 0, "seconds": 9.0}
    assert report["replica_megabytes"] == {"1": [10, 12]}
    assert (report["replicas_restarted"], report["decoders_replaced_at_least"]) == (False, 1)
    assert summary(exchanges, openapi, [{1: 1}, {2: 1}], [set(), set()])["replicas_restarted"]


def test_responses_are_checked_by_their_form():
    def exchange_with(status: int, text: str) -> Exchange:
        transport = httpx.MockTransport(lambda request: httpx.Response(status, text=text))
        with httpx.Client(transport=transport, base_url="http://localhost") as client:
            return send(client, upload("a", b""))

    assert exchange_with(200, "{}").problem is None
    assert exchange_with(400, '{"error": {"code": "a", "message": "b"}}').problem is None
    for text in ("Internal Server Error", '{"detail": "x"}', '{"error": "x"}', "[]"):
        assert exchange_with(500, text).problem
