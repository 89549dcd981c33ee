"""Token buckets, limits of requests in progress, deadlines, and the identity of clients."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from htcl_ray.config.sections import ServeSettings
from htcl_ray.serving.api_keys import Key
from htcl_ray.serving.middleware.admission import Admission, DrainBody, RateLimit, TokenBuckets
from htcl_ray.serving.middleware.client_address import ClientAddress, client_of, client_of_hops

pytestmark = pytest.mark.unit


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@settings(deadline=None)
@given(
    rate=st.sampled_from([0.5, 1.0, 4.0, 8.0]),
    burst=st.integers(1, 5),
    steps=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 64)), max_size=60),
)
def test_token_buckets_match_a_naive_simulation(rate: float, burst: int, steps: list[tuple[str, int]]):
    """Times in sixteenths of a second and rates that are powers of 2 keep the naive simulation exact."""
    clock = Clock()
    buckets = TokenBuckets(rate, burst, clock=clock)
    naive = {"a": float(burst), "b": float(burst)}
    for client, sixteenths in steps:
        clock.now += sixteenths / 16
        naive = {name: min(burst, tokens + rate * sixteenths / 16) for name, tokens in naive.items()}
        wait = buckets.take(client)
        if naive[client] >= 1:
            assert wait == 0
            naive[client] -= 1
        else:
            assert wait == pytest.approx((1 - naive[client]) / rate)


def test_the_reported_wait_is_exact():
    clock = Clock()
    buckets = TokenBuckets(3, 2, clock=clock)
    assert [buckets.take("a") for _ in range(2)] == [0, 0]
    wait = buckets.take("a")
    assert wait == pytest.approx(1 / 3)
    clock.now += wait * 0.99
    assert buckets.take("a") > 0
    clock.now += wait * 0.0101
    assert buckets.take("a") == 0


def test_the_least_recent_clients_are_forgotten_first():
    clock = Clock()
    buckets = TokenBuckets(0.001, 1, size=100, clock=clock)
    for number in range(1_000):
        assert buckets.take(f"client {number}") == 0
        assert len(buckets) <= 100
    assert buckets.take("client 950") > 0
    assert buckets.take("client 0") == 0


@pytest.mark.parametrize(
    ("client", "expected"),
    [
        (("192.0.2.1", 5), "address 192.0.2.1"),
        (("::ffff:192.0.2.1", 5), "address 192.0.2.1"),
        (("2001:db8::1", 5), "address 2001:db8::"),
        (("2001:db8::ffff:0:0:1", 5), "address 2001:db8::"),
        (("2001:db8:0:1::1", 5), "address 2001:db8:0:1::"),
        (("fe80::1%eth0", 5), "address fe80::"),
        (("testclient", 5), "address testclient"),
        (None, "address unknown"),
    ],
)
def test_client_identity(client: Any, expected: str):
    assert client_of({"client": client}) == expected
    assert client_of({"client": client, "state": {"key": Key("app", frozenset(), b"")}}) == "key app"


def send(app: Any, method: str = "GET", path: str = "/", **options: Any) -> httpx.Response:
    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path, **options)

    return asyncio.run(ask())


def assert_rejected(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status
    assert set(response.json()["error"]) == {"code", "message"}
    assert response.json()["error"]["code"] == code
    assert int(response.headers["retry-after"]) >= 1


def fast_app() -> FastAPI:
    app = FastAPI()

    @app.get("/{path:path}")
    async def respond(path: str) -> dict[str, str]:
        return {}

    return app


def test_an_empty_bucket_is_429_with_whole_seconds_in_retry_after():
    clock = Clock()
    app = fast_app()
    app.add_middleware(RateLimit, buckets=TokenBuckets(0.4, 3, clock=clock))
    assert [send(app).status_code for _ in range(3)] == [200] * 3
    response = send(app)
    assert_rejected(response, 429, "rate_limited")
    assert response.headers["retry-after"] == str(math.ceil(1 / 0.4))
    clock.now += 3
    assert send(app).status_code == 200
    assert send(app).status_code == 429
    for probe in ("/healthz", "/readyz"):
        assert send(app, path=probe).status_code == 200


class Gate:
    """Application whose responses wait until `open` is set, and which counts cancelled requests."""

    def __init__(self, most: int = 2, seconds: float = 30.0, receive_seconds: float = 30.0) -> None:
        self.open = asyncio.Event()
        self.cancelled = 0
        self.read = 0
        app = FastAPI()

        @app.get("/healthz")
        async def healthz() -> dict[str, str]:
            return {}

        @app.get("/wait")
        async def wait() -> dict[str, str]:
            try:
                await self.open.wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
            return {}

        @app.get("/thread")
        async def thread() -> dict[str, str]:
            await run_in_threadpool(time.sleep, 1.0)
            return {}

        @app.get("/timeout")
        async def timeout() -> dict[str, str]:
            raise TimeoutError("its own")

        @app.post("/body")
        async def body(request: Request) -> dict[str, int]:
            return {"read": len(await request.body())}

        app.add_middleware(Admission, max_requests=most, seconds=seconds, receive_seconds=receive_seconds)
        self.app = app


def test_excess_requests_are_429_immediately_and_probes_pass():
    async def scene() -> None:
        gate = Gate(most=2)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate.app), base_url="http://localhost") as client:
            for _ in range(2):  # twice, to see that the limit is restored
                inside = [asyncio.create_task(client.get("/wait")) for _ in range(2)]
                await asyncio.sleep(0.05)
                for _ in range(3):
                    assert_rejected(await client.get("/wait"), 429, "overloaded")
                assert (await client.get("/healthz")).status_code == 200
                gate.open.set()
                assert [response.status_code for response in await asyncio.gather(*inside)] == [200, 200]
                gate.open.clear()

    asyncio.run(scene())


def test_a_request_beyond_its_deadline_is_503_and_cancelled():
    async def scene() -> None:
        gate = Gate(seconds=0.1, most=1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate.app), base_url="http://localhost") as client:
            for number in (1, 2):  # the limit is restored
                assert_rejected(await client.get("/wait"), 503, "deadline_exceeded")
                assert gate.cancelled == number

    started = time.monotonic()
    asyncio.run(scene())
    assert time.monotonic() - started < 2


def test_a_blocked_thread_does_not_delay_the_deadline():
    async def scene() -> float:
        gate = Gate(seconds=0.1)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate.app), base_url="http://localhost") as client:
            started = time.monotonic()
            assert_rejected(await client.get("/thread"), 503, "deadline_exceeded")
            return time.monotonic() - started

    assert asyncio.run(scene()) < 0.8


def test_a_slow_body_is_408():
    async def drip() -> AsyncIterator[bytes]:
        for _ in range(1_000):
            yield b"x"
            await asyncio.sleep(0.02)

    started = time.monotonic()
    response = send(Gate(receive_seconds=0.2).app, "POST", "/body", content=drip())
    assert (response.status_code, response.json()["error"]["code"]) == (408, "request_timeout")
    assert time.monotonic() - started < 2


def test_a_timeout_error_of_the_application_is_raised():
    with pytest.raises(TimeoutError, match="its own"):
        send(Gate().app, path="/timeout")


def test_a_started_response_is_cut_off_at_the_deadline():
    sent: list[Any] = []

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await asyncio.sleep(5)

    async def collect(message: Any) -> None:
        sent.append(message)

    middleware = Admission(inner, 1, 0.05, 30)
    with pytest.raises(TimeoutError):
        asyncio.run(middleware({"type": "http", "path": "/", "headers": []}, None, collect))  # type: ignore[arg-type]
    assert [message["type"] for message in sent] == ["http.response.start"]


class Upload:
    """Request whose body arrives by calls of `arrive`; `status` is None until the response starts."""

    def __init__(self, app: Any, path: str, size: int, client: str = "192.0.2.1") -> None:
        self.parts: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.status: int | None = None
        self.parts_left_at_response: int | None = None
        headers = [(b"host", b"localhost"), (b"content-length", str(size).encode())]
        scope = {
            "type": "http",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": headers,
        }
        self.task = asyncio.ensure_future(
            app({**scope, "client": (client, 1), "http_version": "1.1", "scheme": "http"}, self.receive, self.send)
        )

    def arrive(self, data: bytes, more: bool) -> None:
        self.parts.put_nowait({"type": "http.request", "body": data, "more_body": more})

    async def receive(self) -> dict[str, Any]:
        return await self.parts.get()

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.parts_left_at_response = self.parts.qsize()


def test_incomplete_bodies_do_not_count_as_requests_in_progress():
    async def scene() -> None:
        gate = Gate(most=2)
        stalled = [Upload(gate.app, "/body", 100_000, f"192.0.2.{number}") for number in range(10)]
        await asyncio.sleep(0.05)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate.app), base_url="http://localhost") as client:
            for _ in range(5):
                assert (await client.post("/body", content=b"x" * 50)).status_code == 200
        for upload in stalled:  # each completes once its body has arrived
            upload.arrive(b"x" * 99_999, more=True)
            upload.arrive(b"x", more=False)
            await asyncio.wait_for(upload.task, 5)
            assert upload.status == 200

    asyncio.run(scene())


def test_uploads_in_transit_of_one_client_are_limited():
    async def scene() -> None:
        gate = Gate(most=2)
        mine = [Upload(gate.app, "/body", 100_000) for _ in range(3)]
        await asyncio.sleep(0.05)
        assert [upload.status for upload in mine] == [None, None, 429]
        other = Upload(gate.app, "/body", 100_000, "192.0.2.2")
        other.arrive(b"x" * 100_000, more=False)
        await asyncio.wait_for(other.task, 5)
        assert other.status == 200
        mine[0].arrive(b"x" * 100_000, more=False)
        await asyncio.wait_for(mine[0].task, 5)
        again = Upload(gate.app, "/body", 100_000)
        again.arrive(b"x" * 100_000, more=False)
        await asyncio.wait_for(again.task, 5)
        assert (mine[0].status, again.status) == (200, 200)
        mine[1].task.cancel()

    asyncio.run(scene())


def test_uploads_in_transit_are_limited_in_all():
    async def scene() -> None:
        gate = Gate(most=1)
        many = [Upload(gate.app, "/body", 100_000, f"192.0.2.{number}") for number in range(9)]
        await asyncio.sleep(0.05)
        assert [upload.status for upload in many] == [None] * 8 + [429]
        for upload in many:
            upload.task.cancel()

    asyncio.run(scene())


@pytest.mark.parametrize("size", [100_000, 1_000_001])
def test_a_rejection_drains_the_body_unless_it_is_too_large(size: int):
    """A connection that is closed earlier is reset, and the client does not see the response."""

    async def reject(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 429, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def scene() -> None:
        upload = Upload(DrainBody(reject, 1_000_000), "/body", size)
        for _ in range(3):
            upload.arrive(b"x" * 1000, more=True)
        await asyncio.sleep(0.05)
        if size > 1_000_000:
            assert (upload.status, upload.parts_left_at_response) == (429, 3)
            return
        assert upload.status is None
        upload.arrive(b"x", more=False)
        await asyncio.wait_for(upload.task, 5)
        assert (upload.status, upload.parts_left_at_response) == (429, 0)

    asyncio.run(scene())


@pytest.mark.parametrize(
    ("hops", "trusted", "client"),
    [
        (["198.51.100.9"], [], "198.51.100.9"),
        (["1.2.3.4", "198.51.100.9"], [], "198.51.100.9"),  # a header that no trusted proxy vouches for
        (["1.2.3.4", "198.51.100.9", "10.0.0.5"], ["10.0.0.0/8"], "198.51.100.9"),
        (["198.51.100.9", "10.0.0.6", "10.0.0.5"], ["10.0.0.0/8"], "198.51.100.9"),
        (["1.2.3.4", "198.51.100.9", "10.0.0.5", "203.0.113.2"], ["10.0.0.0/8"], "203.0.113.2"),
        (["10.0.0.6", "10.0.0.5"], ["10.0.0.0/8"], "10.0.0.6"),
        (["1.2.3.4", "nonsense", "10.0.0.5"], ["10.0.0.0/8"], "nonsense"),
        (["2001:db8::9", "::ffff:10.0.0.5"], ["10.0.0.0/8"], "2001:db8::9"),
        (["198.51.100.9", "2001:db8::1"], ["2001:db8::/32"], "198.51.100.9"),
    ],
)
def test_the_client_is_the_last_untrusted_address(hops: list[str], trusted: list[str], client: str):
    assert client_of_hops(hops, [ipaddress.ip_network(network) for network in trusted]) == client


class TestClientAddress:
    @pytest.fixture
    def seen(self) -> dict[str, Any]:
        return {}

    def ask(
        self, seen: dict[str, Any], headers: dict[str, str], token: str = "", trusted: tuple[str, ...] = ()
    ) -> httpx.Response:
        app = FastAPI()

        @app.get("/")
        async def root(request: Request) -> None:
            seen["client"] = request.client.host if request.client else None

        app.add_middleware(ClientAddress, trusted_proxies=trusted, token=token)
        return send(app, headers=headers)

    def test_a_forwarded_header_of_an_untrusted_peer_is_ignored(self, seen: dict[str, Any]):
        self.ask(seen, {"x-forwarded-for": "1.2.3.4"})
        assert seen["client"] == "127.0.0.1"

    def test_a_forwarded_header_of_a_trusted_proxy_is_used(self, seen: dict[str, Any]):
        self.ask(seen, {"x-forwarded-for": "9.9.9.9, 1.2.3.4"}, trusted=("127.0.0.1",))
        assert seen["client"] == "1.2.3.4"

    def test_haproxy_of_this_application_appends_the_peer(self, seen: dict[str, Any]):
        self.ask(seen, {"x-forwarded-for": "9.9.9.9, 1.2.3.4", "x-htcl-front": "token"}, token="token")
        assert seen["client"] == "1.2.3.4"

    def test_without_the_token_only_the_connection_counts(self, seen: dict[str, Any]):
        self.ask(seen, {"x-forwarded-for": "9.9.9.9"}, token="token")
        assert seen["client"] == "127.0.0.1"

    def test_haproxy_of_another_application_is_rejected(self, seen: dict[str, Any]):
        response = self.ask(seen, {"x-forwarded-for": "1.2.3.4", "x-htcl-front": "other"}, token="token")
        assert_rejected(response, 503, "unavailable")
        assert seen == {}


@pytest.mark.parametrize("network", ["10.0.0.1/8", "proxy.example", ""])
def test_a_trusted_proxy_is_an_address_or_network(network: str):
    with pytest.raises(ValidationError, match=r"is not an address or network; expected one such as 10\.0\.0\.7"):
        ServeSettings(trusted_proxies=(network,))
