"""Retries of the clients, their errors, and their response models."""

from __future__ import annotations

import asyncio
import pickle
import random
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import htcl_ray.client
from htcl_ray.api import responses
from htcl_ray.client import AsyncClient, Client, NoResponseError, RequestError, Retries, clients, retries
from htcl_ray.client.retries import retry_after

pytestmark = pytest.mark.unit

EMPTY = {"results": [], "k": 10, "blend": 0.5, "index": "v1"}
Outcome = httpx.Response | Exception


class Clock:
    """Clock that advances only by sleeping."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 1_000.0, []
        monkeypatch.setattr(retries, "time", SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(clients, "time", SimpleNamespace(sleep=self.sleep))
        monkeypatch.setattr(clients, "asyncio", SimpleNamespace(sleep=self.awaited_sleep, to_thread=asyncio.to_thread))

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def awaited_sleep(self, seconds: float) -> None:
        self.sleep(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    random.seed(0)
    return Clock(monkeypatch)


def refused(status: int, retry: str | None = None) -> httpx.Response:
    headers = {} if retry is None else {"Retry-After": retry}
    return httpx.Response(status, json={"error": {"code": "busy", "message": "try again"}}, headers=headers)


Send = Callable[..., tuple[Any, list[httpx.Request]]]


@pytest.fixture(params=["threads", "asyncio"])
def send(request: pytest.FixtureRequest, clock: Clock) -> Send:
    """Send one call to a server with these outcomes in order; the last one repeats."""

    def run(outcomes: list[Outcome], name: str, *args: Any, patience: Retries | None = None, **kwargs: Any):
        seen: list[httpx.Request] = []

        def respond(sent: httpx.Request) -> httpx.Response:
            seen.append(sent)
            outcome = outcomes[min(len(seen), len(outcomes)) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return httpx.Response(outcome.status_code, content=outcome.content, headers=outcome.headers)

        async def awaited() -> Any:
            async with AsyncClient(
                "http://server/base", key="k" * 16, retries=patience, transport=httpx.MockTransport(respond)
            ) as client:
                return await getattr(client, name)(*args, **kwargs)

        def threaded() -> Any:
            with Client(
                "http://server/base", key="k" * 16, retries=patience, transport=httpx.MockTransport(respond)
            ) as client:
                return getattr(client, name)(*args, **kwargs)

        try:
            return (asyncio.run(awaited()) if request.param == "asyncio" else threaded()), seen
        except (RequestError, NoResponseError) as error:
            return error, seen

    return run


@pytest.mark.parametrize("status", [429, 503])
def test_retry_waits_as_retry_after_says(send: Send, clock: Clock, status: int):
    result, seen = send(
        [refused(status, "7"), refused(status, "2"), httpx.Response(200, json=EMPTY)], "search", "piano"
    )
    assert result.index == "v1"
    assert len(seen) == 3
    assert 7 <= clock.waits[0] <= 7.25
    assert 2 <= clock.waits[1] <= 2.25


def test_backoff_doubles_without_retry_after(send: Send, clock: Clock):
    result, seen = send([refused(503)], "search", "piano", patience=Retries(attempts=8, first_wait=1, longest_wait=8))
    assert (result.status, result.code, result.message) == (503, "busy", "try again")
    assert len(seen) == 8
    for wait, longest in zip(clock.waits, [1, 2, 4, 8, 8, 8, 8], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(clock.waits)) == 7


@pytest.mark.parametrize(
    "broken", [httpx.ConnectError("no"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed")]
)
def test_connection_error_is_retried(send: Send, clock: Clock, broken: Exception):
    result, seen = send([broken, broken, httpx.Response(200, json=EMPTY)], "search", "piano")
    assert (result.index, len(seen), len(clock.waits)) == ("v1", 3, 2)
    result, seen = send([broken], "search", "piano")
    assert isinstance(result, NoResponseError)
    assert len(seen) == Retries().attempts


@pytest.mark.parametrize(
    "outcome",
    [httpx.ReadTimeout("slow"), *(refused(status) for status in (400, 401, 404, 413, 415, 422, 500, 502))],
    ids=str,
)
def test_permanent_error_is_not_retried(send: Send, clock: Clock, outcome: Outcome):
    result, seen = send([outcome], "search", "piano")
    assert isinstance(result, RequestError | NoResponseError)
    assert (len(seen), clock.waits) == (1, [])


def test_retry_after_beyond_the_limit_is_not_waited_for(send: Send, clock: Clock):
    result, seen = send([refused(429, "3600")], "search", "piano")
    assert (result.status, result.retry_after) == (429, 3600)
    assert (len(seen), clock.waits) == (1, [])
    result, seen = send([refused(429, "20")], "search", "piano", patience=Retries(attempts=100, seconds=65))
    assert len(seen) == 4
    assert sum(clock.waits) <= 65


@pytest.mark.parametrize("name", ["ready", "alive"])
def test_probes_are_not_retried(send: Send, clock: Clock, name: str):
    result, seen = send([refused(503, "1")], name)
    assert (result.status, len(seen), clock.waits) == (503, 1, [])


@pytest.mark.parametrize(
    ("name", "args"), [("put_song", ("a", b"audio")), ("delete_song", ("a",)), ("activate", ("v2",))]
)
def test_retried_uploads_are_complete(send: Send, clock: Clock, name: str, args: tuple):
    body = {"song_id": "a", "update": "u", "index": "v1", "version": "v2", "activated_at": "now", "songs": 1}
    _, seen = send([httpx.ConnectError("no"), refused(503), httpx.Response(200, json=body)], name, *args)
    assert len(seen) == 3
    bodies = [
        request.read().replace(request.headers.get("content-type", "").partition("boundary=")[2].encode() or b"-", b"")
        for request in seen
    ]
    assert bodies[0] == bodies[1] == bodies[2]
    assert (b"audio" in bodies[0]) == (name == "put_song")


def test_key_and_path_are_sent(send: Send):
    _, seen = send(
        [httpx.Response(200, json=EMPTY)], "similar", "a/b", k=3, filter={"year": 1990}, collapse_duplicates=False
    )
    assert seen[0].headers["authorization"] == "Bearer " + "k" * 16
    assert seen[0].url.raw_path.startswith(b"/base/v1/songs/a%2Fb/similar?")
    assert dict(seen[0].url.params) == {"k": "3", "filter": '{"year": 1990}', "collapse_duplicates": "false"}


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b'{"detail": "x"}', b'{"error": "x"}', b"[1]", b"\xff"])
def test_error_of_another_shape_raises(send: Send, body: bytes):
    result, _ = send([httpx.Response(502, content=body)], "index")
    assert (result.status, result.code) == (502, "error")
    assert "GET /v1/index" in result.message


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"results": 1}'])
def test_invalid_response_raises(send: Send, body: bytes):
    result, _ = send([httpx.Response(200, content=body)], "search", "piano")
    assert (result.status, result.code) == (200, "not_understood")


def test_unknown_response_fields_are_ignored(send: Send):
    result, _ = send([httpx.Response(200, json={**EMPTY, "new": 1})], "search", "piano")
    assert result.index == "v1"


def test_retry_after_takes_seconds_and_dates():
    def seconds(told: str) -> float | None:
        return retry_after(httpx.Response(503, headers={"Retry-After": told}))

    assert seconds("12") == 12
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert seconds(format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert seconds(format_datetime(later - timedelta(days=1), usegmt=True)) == 0
    for nonsense in ("", "soon", "-5", "1.5", "9" * 40):
        assert seconds(nonsense) is None
    assert retry_after(httpx.Response(503)) is None


def test_client_exports_the_models_of_the_server():
    exported = {name: getattr(htcl_ray.client, name) for name in htcl_ray.client.__all__}
    models = {name for name, value in exported.items() if issubclass(value, responses.ApiResponse)}
    assert len(models) == 10
    assert all(exported[name] is getattr(responses, name) for name in models)
    assert all(exported[name].model_config["extra"] == "ignore" for name in models)


def test_both_clients_have_the_same_calls():
    def calls(of: type) -> set[str]:
        return {name for name in vars(of) if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
    assert len(calls(Client)) == 14
    assert all(getattr(Client, name).__doc__ for name in calls(Client))


def test_errors_can_be_pickled():
    error = pickle.loads(pickle.dumps(RequestError(429, "rate_limited", "too many", 3.0)))
    assert (error.status, error.code, error.message, error.retry_after) == (429, "rate_limited", "too many", 3.0)
