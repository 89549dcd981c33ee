"""Request ids, log lines and labels, over ASGI."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest
from fastapi import FastAPI
from starlette.responses import PlainTextResponse

from htcl_ray.serving.observability import RequestObserver

pytestmark = pytest.mark.unit


class Recorded:
    """Metrics that keep what is recorded."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, int]] = []
        self.requests_in_progress = 0

    def record_request(self, endpoint: str, status: int, seconds: float) -> None:
        assert 0 <= seconds < 5
        self.requests.append((endpoint, status))


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture
def app(recorded: Recorded) -> RequestObserver:
    inner = FastAPI()

    @inner.get("/songs/{name}")
    async def song(name: str) -> PlainTextResponse:
        return PlainTextResponse(name)

    @inner.get("/waiting")
    async def waiting() -> PlainTextResponse:
        return PlainTextResponse(str(recorded.requests_in_progress))

    @inner.get("/fails")
    async def fails() -> None:
        raise RuntimeError("broken")

    return RequestObserver(inner, recorded)  # type: ignore[arg-type]


def get(app: RequestObserver, path: str, **headers: str) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path, headers={name.replace("_", "-"): value for name, value in headers.items()})

    return asyncio.run(send())


def test_metrics_are_labelled_with_the_route_not_the_path(app: RequestObserver, recorded: Recorded):
    for path in ("/songs/a", "/songs/b", "/nothing/secret", "/fails"):
        get(app, path)
    assert recorded.requests == [
        ("GET /songs/{name}", 200),
        ("GET /songs/{name}", 200),
        ("other", 404),
        ("GET /fails", 500),
    ]


def test_requests_in_progress_return_to_0_after_a_failure(app: RequestObserver, recorded: Recorded):
    for path in ("/songs/a", "/fails"):
        get(app, path)
        assert recorded.requests_in_progress == 0
    assert get(app, "/waiting").text == "1"


def test_the_log_line_names_key_endpoint_and_status(
    app: RequestObserver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="ray.serve.htcl"):
        get(app, "/songs/secret-name", x_request_id="abc")
    line = caplog.records[-1]
    assert (line.http_request_id, line.endpoint, line.status) == ("abc", "GET /songs/{name}", 200)  # type: ignore[attr-defined]
    assert "secret-name" not in str(vars(line))


def test_a_long_request_id_is_cut_in_the_log(
    app: RequestObserver, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="ray.serve.htcl"):
        get(app, "/songs/a", x_request_id="x" * 10_000)
    assert caplog.records[-1].http_request_id == "x" * 128  # type: ignore[attr-defined]
