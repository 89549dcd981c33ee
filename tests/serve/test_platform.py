"""Several replicas with keys, changed and hurt while they serve: hot swap, live updates, isolation, metrics and
logs."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import ray

from htcl_ray.config import Config
from htcl_ray.index.song_index import SongIndex
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.search.service import SearchService
from htcl_ray.serving.application import serving
from htcl_ray.workspace.storage import Workspace
from tests.worlds.processes import children_of, command_line, replicas
from tests.worlds.small_workspace import SONGS, first_version, song_id, sound, wav, write_other_index

pytestmark = pytest.mark.serve

READ, WRITE = {"authorization": "Bearer reads-only-0123456789"}, {"authorization": "Bearer writes-too-0123456789"}
KEYS = """
- {name: page, key: reads-only-0123456789, scopes: [read]}
- {name: catalogue, key: writes-too-0123456789, scopes: [read, write]}
"""


@pytest.fixture(scope="module")
def config(indexed: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A copy of the workspace with a second index of the same models and other vectors, so that its results are known
    by their scores."""
    folder = tmp_path_factory.mktemp("platform")
    shutil.copytree(indexed.workspace, folder / "workspace")
    keys = folder / "keys.yaml"
    keys.write_text(KEYS)
    keys.chmod(0o600)
    config = indexed.with_overrides(
        {
            "workspace": str(folder / "workspace"),
            "serve.encoder_replicas": 2,
            "serve.ingress_replicas": 2,
            "serve.encoder_cpus": 0.5,
            "serve.cache_entries": 0,
            "serve.poll_seconds": 0.2,
            "serve.api_keys_file": str(keys),
        }
    )
    write_other_index(config, "other")
    return config


@pytest.fixture(scope="module")
def url(config: Config) -> Iterator[str]:
    with serving(config) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    # A connection kept open may stay with one replica; requests of their own connections reach them all.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(base_url=url, timeout=60, headers=WRITE, limits=limits) as client:
        yield client


def activate(client: httpx.Client, version: str) -> httpx.Response:
    return client.post("/v1/index/activate", json={"version": version})


def eventually(check: Any, seconds: float = 5.0) -> None:
    """Several requests in a row, so that every replica responded to some of them."""
    deadline = time.monotonic() + seconds
    while not all(check() for _ in range(8)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Load:
    """Searches by song in threads until the end of the block; every response is kept."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._stop = threading.Event()
        self.responses: list[tuple[int, dict[str, Any]]] = []

    def __enter__(self) -> Load:
        self._pool = ThreadPoolExecutor(4)
        self._running = [self._pool.submit(self._ask, seed) for seed in range(4)]
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for running in self._running:
            running.result(timeout=60)
        self._pool.shutdown()

    def _ask(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        with httpx.Client(base_url=self._url, timeout=30, headers=READ) as client:
            while not self._stop.is_set():
                row = int(rng.integers(SONGS))
                response = client.get(f"/v1/songs/{song_id(row)}/similar", params={"k": 5})
                self.responses.append((row, response.json() | {"status": response.status_code}))


def test_indexes_are_swapped_under_load_without_a_failed_or_mixed_response(
    client: httpx.Client, url: str, config: Config
):
    workspace, first = Workspace(config.workspace), first_version(config)
    services = {name: SearchService(SongIndex.load(workspace.local_copy(f"index/{name}"))) for name in (first, "other")}
    expected = {
        (name, row): [
            (hit.song_id, pytest.approx(hit.score, abs=1e-5)) for hit in service.search_songs([song_id(row)]).hits[:5]
        ]
        for name, service in services.items()
        for row in range(SONGS)
    }
    with Load(url) as load:
        for version in ("other", first, "other", first):
            time.sleep(0.5)
            response = activate(client, version)
            assert response.status_code == 200, response.text
            assert client.get("/v1/index").status_code == 200
        time.sleep(1)
    assert Counter(response["status"] for _, response in load.responses) == {200: len(load.responses)}
    seen = Counter(response["index"] for _, response in load.responses)
    assert set(seen) == {first, "other"}
    assert min(seen.values()) > 10
    for row, response in load.responses:
        assert [(result["song_id"], result["score"]) for result in response["results"]] == expected[
            response["index"], row
        ]


def test_every_replica_follows_an_activation(client: httpx.Client, config: Config):
    for version in ("other", first_version(config)):
        assert activate(client, version).status_code == 200
        eventually(lambda version=version: client.get("/v1/index").json()["version"] == version)


def test_a_bad_index_is_refused_and_the_old_one_serves_on(client: httpx.Client, config: Config):
    write_other_index(config, "strange", model_versions={"semantic": "another", "preference": "model"})
    serving_now = first_version(config)
    assert activate(client, serving_now).status_code == 200
    for version, statuses in (("strange", {422}), ("missing", {404}), ("../index/other", {422}), ("", {422})):
        response = activate(client, version)
        assert response.status_code in statuses, response.text
    eventually(lambda: client.get("/v1/index").json()["version"] == serving_now)


def test_an_upserted_song_is_returned_by_all_replicas_and_after_a_swap(client: httpx.Client, config: Config):
    clip = wav(sound(300, config.audio), config.audio)
    metadata = {"title": "new one", "artist": "somebody", "genre": ["rock"]}
    put = client.put("/v1/songs/new/1", files={"file": ("clip.wav", clip)}, data={"metadata": json.dumps(metadata)})
    assert put.status_code == 200, put.text

    def is_first() -> bool:
        response = client.post("/v1/search/audio", files={"file": ("clip.wav", clip)}, data={"k": "1"})
        return response.status_code == 200 and response.json()["results"][0]["song_id"] == "new/1"

    eventually(is_first)
    assert client.get("/v1/songs/new/1").json()["title"] == "new one"
    assert activate(client, "other").status_code == 200
    eventually(is_first)
    assert client.delete("/v1/songs/new/1").status_code in (200, 204)
    eventually(lambda: client.get("/v1/songs/new/1").status_code == 404)
    assert activate(client, first_version(config)).status_code == 200
    eventually(lambda: client.get("/v1/songs/new/1").status_code == 404)


def test_writing_needs_a_key_that_may_write(url: str):
    with httpx.Client(base_url=url, timeout=30) as anonymous:
        for headers in ({}, READ, {"authorization": "Bearer guess"}):
            for response in (
                anonymous.delete(f"/v1/songs/{song_id(1)}", headers=headers),
                anonymous.post("/v1/index/activate", json={"version": "other"}, headers=headers),
            ):
                assert response.status_code == 401
                assert set(response.json()["error"]) == {"code", "message"}


def test_the_same_bytes_have_the_same_vector_on_every_replica_and_in_every_batch(client: httpx.Client, config: Config):
    models = Path(config.workspace) / "models"
    encoder = SongEncoder.load(models / "semantic/semantic-0", models / "preference/preference-0")
    clips = [sound(500 + i, config.audio) for i in range(6)]
    files = [wav(clip, config.audio) for clip in clips]

    def embed(i: int) -> tuple[int, dict[str, Any]]:
        response = client.post("/v1/embeddings", files={"file": ("x.wav", files[i % len(files)])})
        assert response.status_code == 200, response.text
        return i % len(files), response.json()

    with ThreadPoolExecutor(12) as pool:
        responses = list(pool.map(embed, range(60)))
    for i, response in responses:
        alone = encoder.encode_waveforms([clips[i]])
        np.testing.assert_allclose(response["semantic"], alone.semantic[0], atol=1e-5)
        np.testing.assert_allclose(response["preference"], alone.preference[0], atol=1e-5)


def test_a_dead_decoder_affects_no_other_request(client: httpx.Client, config: Config):
    before, clip = replicas(), wav(sound(3, config.audio), config.audio)
    decoders = [child for replica in before for child in children_of(replica)]
    assert len(decoders) >= 2
    for pid in decoders:
        os.kill(pid, signal.SIGKILL)
    statuses = [client.post("/v1/search/audio", files={"file": ("x.wav", clip)}).status_code for _ in range(8)]
    assert set(statuses) <= {200, 415, 503}
    assert statuses[-1] == 200
    assert replicas() == before


def test_with_two_encoders_the_death_of_one_is_not_seen(client: httpx.Client):
    """A call in progress in it is repeated."""
    encoders = [pid for pid in replicas() if ":Encoder" in command_line(pid)]
    assert len(encoders) == 2
    with ThreadPoolExecutor(8) as pool:
        searches = [pool.submit(client.post, "/v1/search", json={"text": f"folk {number}"}) for number in range(60)]
        time.sleep(0.1)
        os.kill(encoders[0], signal.SIGKILL)
        assert Counter(search.result().status_code for search in searches) == {200: 60}


def test_metrics_are_exported(client: httpx.Client, config: Config):
    client.post("/v1/search", json={"text": "rock"})
    client.post("/v1/search/audio", files={"file": ("x.wav", wav(sound(4, config.audio), config.audio))})
    client.get("/nothing")
    wanted = [
        'ray_htcl_request_seconds_count{.*endpoint="POST /v1/search".*status="200"',
        *(
            f'ray_htcl_stage_seconds_count{{.*stage="{stage}"'
            for stage in ("decode", "encode_audio", "encode_text", "search")
        ),
        'ray_htcl_batch_size_count{.*kind="text"',
        'ray_htcl_errors.*endpoint="other".*status="404"',
        'ray_htcl_answers.*empty="no"',
        'ray_htcl_query_drift{.*kind="audio"',
        "ray_htcl_index_songs{",
        "ray_htcl_index_age_seconds{",
        "ray_htcl_requests_under_way{",
    ]
    deadline = time.monotonic() + 40
    missing = wanted
    while missing and time.monotonic() < deadline:
        time.sleep(1)
        exported = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=10).text
        missing = [pattern for pattern in wanted if not re.search(pattern, exported)]
    assert not missing


def test_a_request_is_a_line_of_json_with_its_id(client: httpx.Client):
    response = client.get("/healthz", headers={"x-request-id": "trace-me-1"})
    assert response.headers["x-request-id"] == "trace-me-1"
    folder = Path(ray._private.worker.global_worker.node.get_session_dir_path()) / "logs" / "serve"
    deadline = time.monotonic() + 10
    lines: list[dict[str, Any]] = []
    while not lines and time.monotonic() < deadline:
        time.sleep(0.2)
        text = "\n".join(file.read_text(errors="replace") for file in folder.glob("replica_htcl_Ingress_*.log"))
        lines = [json.loads(line) for line in text.splitlines() if "trace-me-1" in line]
    assert lines[0]["endpoint"] == "GET /healthz"
    assert lines[0]["status"] == 200
    assert lines[0]["key"] == "catalogue"


def test_the_drift_of_a_query_long_ago_is_still_exported(client: httpx.Client):
    """Ray forgets a gauge that is not set for some seconds."""
    client.post("/v1/search", json={"text": "one last query"})
    time.sleep(30)
    exported = httpx.get(f"http://127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}/metrics", timeout=10).text
    assert re.search('ray_htcl_query_drift{.*kind="text"', exported)
