"""Prometheus metrics of the ingress and encoder replicas, which Ray exports from every node, and the request log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]
REQUEST_ID = "x-request-id"
"""Header that Ray Serve takes from the client or generates, and returns."""
MAX_ID_LENGTH = 128
UNKNOWN_ENDPOINT = "other"
"""Label of every path without a route, so that clients cannot create labels."""
CLIENT_CLOSED = 499
"""Status that is recorded when the client disconnects before the response."""
log = logging.getLogger("ray.serve.htcl")
"""Child of Ray Serve's logger, whose handlers write a file of JSON lines for each replica."""


class IngressMetrics:
    """Metrics of a process that serves HTTP. Ray prefixes their names with `ray_`."""

    def __init__(self) -> None:
        self._requests = Histogram(
            "htcl_request_seconds",
            "Seconds from the arrival of a request at the application to the end of its response.",
            SECONDS,
            ("endpoint", "status"),
        )
        self._stages = Histogram("htcl_stage_seconds", "Seconds of one stage of a request.", SECONDS, ("stage",))
        self._errors = Counter("htcl_errors", "Responses with a status of 400 or more.", ("endpoint", "status"))
        self._searches = Counter(
            "htcl_answers", "Searches that returned results, by whether these are empty.", ("empty",)
        )
        self._cache = Counter("htcl_query_cache", "Lookups in the cache of query vectors: hit or miss.", ("result",))
        self.requests_in_progress = 0
        """Requests that have arrived and have no complete response, as `RequestObserver` counts them."""
        self._in_progress = Gauge("htcl_requests_under_way", "Requests in progress.")
        self._songs = Gauge("htcl_index_songs", "Searchable songs of the served index.")
        self._age = Gauge("htcl_index_age_seconds", "Seconds since the served index was built.")
        self._updates = Gauge("htcl_updates_applied", "Entries of the update log that the served index has applied.")
        self._drift = Gauge(
            "htcl_query_drift",
            "1 - cosine between the mean of recent queries and the mean of the index, in the semantic space.",
            ("kind",),
        )
        self._drift_values: dict[str, float] = {}

    def record_request(self, endpoint: str, status: int, seconds: float) -> None:
        """Record a request at its end."""
        tags = {"endpoint": endpoint, "status": str(status)}
        self._requests.observe(seconds, tags)
        if status >= 400:
            self._errors.inc(1, tags)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a request: `search`."""
        with _timed(self._stages, name):
            yield

    def record_search(self, num_results: int) -> None:
        """Record a search by its number of results."""
        self._searches.inc(1, {"empty": "no" if num_results else "yes"})

    def record_cache(self, hit: bool) -> None:
        """Record a lookup in the cache of query vectors."""
        self._cache.inc(1, {"result": "hit" if hit else "miss"})

    def set_state(self, songs: int, age_seconds: float, updates: int) -> None:
        """Set the gauges of the replica; called about once a second."""
        self._in_progress.set(self.requests_in_progress)
        self._songs.set(songs)
        self._age.set(age_seconds)
        self._updates.set(updates)
        for kind, value in self._drift_values.items():  # Ray stops exporting a gauge that is not set for seconds
            self._drift.set(value, {"kind": kind})

    def set_drift(self, kind: str, value: float) -> None:
        """Set the drift of the queries of a kind, text or audio; exported by the next `set_state`."""
        self._drift_values[kind] = value


class EncoderMetrics:
    """Metrics of an encoder replica."""

    def __init__(self) -> None:
        self._stages = Histogram("htcl_stage_seconds", "Seconds of one stage of a request.", SECONDS, ("stage",))
        self._batches = Histogram(
            "htcl_batch_size", "Texts, or audio windows, in one call of the encoder.", SIZES, ("kind",)
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage of a request: `decode`, `encode_audio` or `encode_text`."""
        with _timed(self._stages, name):
            yield

    def record_batch(self, kind: str, size: int) -> None:
        """Record one call of the encoder."""
        self._batches.observe(size, {"kind": kind})


class RequestObserver:
    """Outermost ASGI middleware: one log line and the metrics of every request, rejected ones included."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics | None = None) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle the request, then record it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = Headers(scope=scope).get(REQUEST_ID, "")[:MAX_ID_LENGTH]
        status = CLIENT_CLOSED
        started = time.perf_counter()

        async def observed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._count(1)
        try:
            await self._app(scope, receive, observed)
        finally:
            self._count(-1)
            self._record(scope, request_id, status, time.perf_counter() - started)

    def _count(self, step: int) -> None:
        if self._metrics is not None:
            self._metrics.requests_in_progress += step

    def _record(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", None)
        endpoint = f"{scope['method']} {route}" if route else UNKNOWN_ENDPOINT
        if self._metrics is not None:
            self._metrics.record_request(endpoint, status, seconds)
        key = (scope.get("state") or {}).get("key")
        log.info(
            "request",
            extra={
                "http_request_id": request_id,
                "endpoint": endpoint,
                "status": status,
                "milliseconds": round(1000 * seconds, 2),
                "key": getattr(key, "name", None),
            },
        )


@contextmanager
def _timed(stages: Histogram, name: str) -> Iterator[None]:
    started = time.perf_counter()
    try:
        yield
    finally:
        stages.observe(time.perf_counter() - started, {"stage": name})
