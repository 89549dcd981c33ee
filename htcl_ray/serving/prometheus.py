"""What is measured while serving, as Prometheus metrics that Ray exports from every node."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from ray.util.metrics import Counter, Gauge, Histogram

SECONDS = [0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30]
SIZES = [1, 2, 4, 8, 16, 32, 64, 128]


class IngressMeasurements:
    """Of a process that answers HTTP. Ray puts `ray_` before the names."""

    def __init__(self) -> None:
        self._requests = Histogram(
            "htcl_request_seconds",
            "From the first byte that reaches the application to the answer's end.",
            SECONDS,
            ("endpoint", "status"),
        )
        self._stages = Histogram("htcl_stage_seconds", "Parts of a request.", SECONDS, ("stage",))
        self._errors = Counter("htcl_errors", "Answers that are not a success.", ("endpoint", "status"))
        self._answers = Counter("htcl_answers", "Searches that were answered.", ("empty",))
        self._cache = Counter(
            "htcl_query_cache", "Queries whose vectors were remembered (hit) or not (miss).", ("result",)
        )
        self.under_way = 0
        """Requests that were taken and are not answered, as the middleware counts them."""
        self._waiting = Gauge("htcl_requests_under_way", "Requests that were taken and are not answered.")
        self._songs = Gauge("htcl_index_songs", "Songs that can be found.")
        self._age = Gauge("htcl_index_age_seconds", "Since the index that is served was built.")
        self._updates = Gauge("htcl_updates_applied", "Entries of the update log that the served index has taken in.")
        self._drift = Gauge(
            "htcl_query_drift",
            "1 - cosine between the mean of recent queries and the mean of the index, in the semantic space.",
            ("kind",),
        )

        self._drift_values: dict[str, float] = {}

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """One request, at its end."""
        tags = {"endpoint": endpoint, "status": str(status)}
        self._requests.observe(seconds, tags)
        if status >= 400:
            self._errors.inc(1, tags)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of a request: `search`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._stages.observe(time.perf_counter() - started, {"stage": name})

    def answer(self, results: int) -> None:
        """A search that was answered with so many songs."""
        self._answers.inc(1, {"empty": "no" if results else "yes"})

    def remembered(self, hit: bool) -> None:
        """A query that was looked up in the cache."""
        self._cache.inc(1, {"result": "hit" if hit else "miss"})

    def state(self, songs: int, age_seconds: float, updates: int) -> None:
        """What a replica is in: called about once a second."""
        self._waiting.set(self.under_way)
        self._songs.set(songs)
        self._age.set(age_seconds)
        self._updates.set(updates)
        for kind, value in self._drift_values.items():  # Ray stops exporting a gauge that is not set for seconds
            self._drift.set(value, {"kind": kind})

    def drift(self, kind: str, value: float) -> None:
        """Drift of the queries of a kind: text or audio; exported with the next `state`."""
        self._drift_values[kind] = value


class EncoderMeasurements:
    """Of an encoder replica."""

    def __init__(self) -> None:
        self._stages = Histogram("htcl_stage_seconds", "Parts of a request.", SECONDS, ("stage",))
        self._batches = Histogram(
            "htcl_batch_size", "Texts, or windows of sound, that one encoder call took together.", SIZES, ("kind",)
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measure a part of a request: `decode`, `encode_audio` or `encode_text`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._stages.observe(time.perf_counter() - started, {"stage": name})

    def batch(self, kind: str, size: int) -> None:
        """One call of the encoder."""
        self._batches.observe(size, {"kind": kind})
