"""What the client sends again and when, and that its results are those of the server."""

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

from htcl_ray.api import search, updates
from htcl_ray.client import AsyncClient, Client, NoResponseError, RequestError, Retries, clients, results, retries
from htcl_ray.client.retries import retry_after

pytestmark = pytest.mark.unit

FOUND = {"results": [], "k": 10, "blend": 0.5, "index": "v1"}
Outcome = httpx.Response | Exception


class Clock:
    """Time that passes by waiting only."""

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


Ask = Callable[..., tuple[Any, list[httpx.Request]]]


@pytest.fixture(params=["threads", "asyncio"])
def ask(request: pytest.FixtureRequest, clock: Clock) -> Ask:
    """Sends one call to a server with these outcomes, in order; the last one stays."""

    def run(outcomes: list[Outcome], name: str, *args: Any, patience: Retries | None = None, **kwargs: Any):
        seen: list[httpx.Request] = []

        def answer(sent: httpx.Request) -> httpx.Response:
            seen.append(sent)
            outcome = outcomes[min(len(seen), len(outcomes)) - 1]
            if isinstance(outcome, Exception):
                raise outcome
            return httpx.Response(outcome.status_code, content=outcome.content, headers=outcome.headers)

        async def awaited() -> Any:
            async with AsyncClient(
                "http://server/base", key="k" * 16, retries=patience, transport=httpx.MockTransport(answer)
            ) as client:
                return await getattr(client, name)(*args, **kwargs)

        def threaded() -> Any:
            with Client(
                "http://server/base", key="k" * 16, retries=patience, transport=httpx.MockTransport(answer)
            ) as client:
                return getattr(client, name)(*args, **kwargs)

        try:
            return (asyncio.run(awaited()) if request.param == "asyncio" else threaded()), seen
        except (RequestError, NoResponseError) as error:
            return error, seen

    return run


@pytest.mark.parametrize("status", [429, 503])
def test_the_server_says_how_long_to_wait(ask: Ask, clock: Clock, status: int):
    given, seen = ask([refused(status, "7"), refused(status, "2"), httpx.Response(200, json=FOUND)], "search", "piano")
    assert given.index == "v1"
    assert len(seen) == 3
    assert 7 <= clock.waits[0] <= 7.25
    assert 2 <= clock.waits[1] <= 2.25


def test_without_a_word_from_the_server_waits_double(ask: Ask, clock: Clock):
    given, seen = ask([refused(503)], "search", "piano", patience=Retries(attempts=8, first_wait=1, longest_wait=8))
    assert (given.status, given.code, given.message) == (503, "busy", "try again")
    assert len(seen) == 8
    for wait, longest in zip(clock.waits, [1, 2, 4, 8, 8, 8, 8], strict=True):
        assert longest / 2 <= wait <= longest
    assert len(set(clock.waits)) == 7


@pytest.mark.parametrize(
    "broken", [httpx.ConnectError("no"), httpx.ReadError("reset"), httpx.RemoteProtocolError("closed")]
)
def test_a_broken_connection_is_tried_again(ask: Ask, clock: Clock, broken: Exception):
    given, seen = ask([broken, broken, httpx.Response(200, json=FOUND)], "search", "piano")
    assert (given.index, len(seen), len(clock.waits)) == ("v1", 3, 2)
    given, seen = ask([broken], "search", "piano")
    assert isinstance(given, NoResponseError)
    assert len(seen) == Retries().attempts


@pytest.mark.parametrize(
    "outcome",
    [httpx.ReadTimeout("slow"), *(refused(status) for status in (400, 401, 404, 413, 415, 422, 500, 502))],
    ids=str,
)
def test_what_will_not_pass_is_not_sent_again(ask: Ask, clock: Clock, outcome: Outcome):
    given, seen = ask([outcome], "search", "piano")
    assert isinstance(given, RequestError | NoResponseError)
    assert (len(seen), clock.waits) == (1, [])


def test_a_wait_beyond_the_time_is_not_begun(ask: Ask, clock: Clock):
    given, seen = ask([refused(429, "3600")], "search", "piano")
    assert (given.status, given.retry_after) == (429, 3600)
    assert (len(seen), clock.waits) == (1, [])
    given, seen = ask([refused(429, "20")], "search", "piano", patience=Retries(attempts=100, seconds=65))
    assert len(seen) == 4
    assert sum(clock.waits) <= 65


@pytest.mark.parametrize("name", ["ready", "alive"])
def test_probes_are_sent_once(ask: Ask, clock: Clock, name: str):
    given, seen = ask([refused(503, "1")], name)
    assert (given.status, len(seen), clock.waits) == (503, 1, [])


@pytest.mark.parametrize(
    ("name", "args"), [("put_song", ("a", b"sound")), ("delete_song", ("a",)), ("activate", ("v2",))]
)
def test_changes_are_sent_again_whole(ask: Ask, clock: Clock, name: str, args: tuple):
    answer = {"song_id": "a", "update": "u", "index": "v1", "version": "v2", "activated_at": "now", "songs": 1}
    _, seen = ask([httpx.ConnectError("no"), refused(503), httpx.Response(200, json=answer)], name, *args)
    assert len(seen) == 3
    bodies = [
        request.read().replace(request.headers.get("content-type", "").partition("boundary=")[2].encode() or b"-", b"")
        for request in seen
    ]
    assert bodies[0] == bodies[1] == bodies[2]
    assert (b"sound" in bodies[0]) == (name == "put_song")


def test_the_key_and_the_address_are_sent(ask: Ask):
    _, seen = ask(
        [httpx.Response(200, json=FOUND)], "similar", "a/b", k=3, filter={"year": 1990}, collapse_duplicates=False
    )
    assert seen[0].headers["authorization"] == "Bearer " + "k" * 16
    assert seen[0].url.raw_path.startswith(b"/base/v1/songs/a%2Fb/similar?")
    assert dict(seen[0].url.params) == {"k": "3", "filter": '{"year": 1990}', "collapse_duplicates": "false"}


@pytest.mark.parametrize("body", [b"<html>nginx</html>", b'{"detail": "x"}', b'{"error": "x"}', b"[1]", b"\xff"])
def test_a_failure_that_is_not_of_our_shape_is_told_all_the_same(ask: Ask, body: bytes):
    given, _ = ask([httpx.Response(502, content=body)], "index")
    assert (given.status, given.code) == (502, "error")
    assert "GET /v1/index" in given.message


@pytest.mark.parametrize("body", [b"<html>hello</html>", b"{}", b'{"results": 1}'])
def test_an_answer_that_is_not_understood_is_an_error(ask: Ask, body: bytes):
    given, _ = ask([httpx.Response(200, content=body)], "search", "piano")
    assert (given.status, given.code) == (200, "not_understood")


def test_what_a_later_server_adds_is_ignored(ask: Ask):
    given, _ = ask([httpx.Response(200, json={**FOUND, "new": 1})], "search", "piano")
    assert given.index == "v1"


def test_dates_and_nonsense_in_retry_after():
    def seconds(told: str) -> float | None:
        return retry_after(httpx.Response(503, headers={"Retry-After": told}))

    assert seconds("12") == 12
    later = datetime.now(UTC) + timedelta(seconds=90)
    assert seconds(format_datetime(later, usegmt=True)) == pytest.approx(90, abs=2)
    assert seconds(format_datetime(later - timedelta(days=1), usegmt=True)) == 0
    for nonsense in ("", "soon", "-5", "1.5", "9" * 40):
        assert seconds(nonsense) is None
    assert retry_after(httpx.Response(503)) is None


def test_results_have_the_fields_of_the_servers_models():
    models = {
        name: value
        for name, value in vars(results).items()
        if isinstance(value, type) and issubclass(value, results.Answered)
    }
    assert len(models) == 12
    for name, ours in models.items():
        if ours is results.Answered:
            continue
        theirs = getattr(search, name, None) or getattr(updates, name)
        served, understood = (
            theirs.model_json_schema(mode="serialization"),
            ours.model_json_schema(mode="serialization"),
        )
        assert set(understood["properties"]) == set(served["properties"]), name
        for field, schema in understood["properties"].items():
            shape = {part: schema.get(part) for part in ("type", "anyOf", "items")}
            their_shape = {part: served["properties"][field].get(part) for part in ("type", "anyOf", "items")}
            assert strip(shape) == strip(their_shape), (name, field)


def strip(schema: Any) -> Any:
    """Without bounds, which only the server checks."""
    if isinstance(schema, dict):
        return {
            key: strip(value)
            for key, value in schema.items()
            if key not in ("minimum", "maximum", "description", "title")
        }
    return [strip(part) for part in schema] if isinstance(schema, list) else schema


def test_both_clients_have_the_same_calls():
    def calls(of: type) -> set[str]:
        return {name for name in vars(of) if not name.startswith("_")}

    assert calls(Client) == calls(AsyncClient)
    assert len(calls(Client)) == 14
    assert all(getattr(Client, name).__doc__ for name in calls(Client))


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(RequestError(429, "rate_limited", "too many", 3.0)))
    assert (error.status, error.code, error.message, error.retry_after) == (429, "rate_limited", "too many", 3.0)
