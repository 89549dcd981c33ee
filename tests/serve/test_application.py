"""The running application: real Ray Serve, real models, real HTTP."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, IndexNotFoundError, MismatchError, WorkspaceError
from htcl_ray.search.results import SearchResults
from htcl_ray.search.service import SearchService
from htcl_ray.serving import application
from htcl_ray.serving.application import serving
from htcl_ray.workspace.manifest import file_sha256
from tests.worlds.processes import replicas
from tests.worlds.small_workspace import SONGS, song_id, sound, wav

pytestmark = pytest.mark.serve


@pytest.fixture(scope="module")
def url(indexed: Config) -> Iterator[str]:
    with serving(indexed) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def service(indexed: Config) -> SearchService:
    """The same service in this process."""
    return SearchService.open(indexed)


def assert_same(response: httpx.Response, expected: SearchResults) -> None:
    assert response.status_code == 200, response.text
    body = response.json()
    assert [result["song_id"] for result in body["results"]] == [hit.song_id for hit in expected.hits]
    assert body["text_coverage"] == pytest.approx(expected.text_coverage)
    for result, hit in zip(body["results"], expected.hits, strict=True):
        assert result["semantic_score"] == pytest.approx(hit.semantic_score, abs=1e-5)
        assert result["preference_score"] == pytest.approx(hit.preference_score, abs=1e-5)
        assert result["score"] == pytest.approx(
            (1 - body["blend"]) * hit.semantic_score + body["blend"] * hit.preference_score, abs=1e-5
        )


def test_responses_equal_those_of_the_service_in_process(client: httpx.Client, service: SearchService, indexed: Config):
    clip = wav(sound(40, indexed.audio), indexed.audio)
    for blend in (0.0, 0.5, 1.0):
        options = {"k": 6, "blend": blend}
        assert_same(
            client.post("/v1/search", json={"text": "jazz number 4", **options}),
            service.search_text("jazz number 4", **options),
        )
        upload = client.post(
            "/v1/search/audio",
            files={"file": ("clip.wav", clip)},
            data={name: str(value) for name, value in options.items()},
        )
        assert_same(upload, service.search_audio(clip, **options))
        assert_same(
            client.post("/v1/search", json={"song_id": song_id(2), **options}),
            service.search_songs([song_id(2)], **options),
        )
        assert_same(
            client.get(f"/v1/songs/{song_id(2)}/similar", params=options), service.search_songs([song_id(2)], **options)
        )


def test_a_text_of_which_nothing_is_known_is_told_also_when_it_is_remembered(client: httpx.Client):
    for text, coverage in (("\U0001f3b5\U0001f3b6", 0), ("jazz \U0001f3b5\U0001f3b6", 4 / 6), ("jazz", 1)):
        for _ in range(2):
            assert client.post("/v1/search", json={"text": text}).json()["text_coverage"] == pytest.approx(coverage)


def test_an_upload_of_a_song_finds_it_and_noise_does_not(client: httpx.Client, indexed: Config):
    for i in (0, 5, 9):
        clip = sound(i, indexed.audio)
        noise = np.random.default_rng(i).normal(scale=clip.std(), size=len(clip)).astype(np.float32)
        responses = [
            client.post("/v1/search/audio", files={"file": ("x.wav", wav(wave, indexed.audio))}).json()["results"]
            for wave in (clip, noise)
        ]
        assert responses[0][0]["song_id"] == song_id(i)
        assert responses[0][0]["score"] > 0.999
        assert [result["score"] for result in responses[0]] != pytest.approx(
            [result["score"] for result in responses[1]], abs=1e-3
        )


def test_metadata_and_index(client: httpx.Client, indexed: Config):
    song = client.get(f"/v1/songs/{song_id(3)}").json()
    assert (song["title"], song["artist"], song["genre"], song["year"], song["lyrics"]) == (
        "number 3",
        "artist 3",
        ["rock"],
        1993,
        None,
    )
    index = client.get("/v1/index").json()
    assert (index["songs"], index["dim"], index["has_preference"]) == (SONGS, 12, True)
    written = json.loads((Path(indexed.workspace) / "index" / index["version"] / "manifest.json").read_text())
    written["config"]["workspace"] = Path(
        indexed.workspace
    ).name  # a path of the server, of which clients see the last name
    assert index["manifest"] == written
    assert client.get("/readyz").json() == {"status": "ready", "index": index["version"], "songs": SONGS}
    assert client.get("/healthz").status_code == 200
    assert "/v1/search/audio" in client.get("/openapi.json").json()["paths"]


def test_concurrent_requests_get_the_same_responses(client: httpx.Client, service: SearchService, indexed: Config):
    clips = [wav(sound(60 + i, indexed.audio), indexed.audio) for i in range(16)]

    def ask(i: int) -> httpx.Response:
        if i % 2:
            return client.post("/v1/search", json={"text": f"folk number {i // 2}", "k": 4})
        return client.post("/v1/search/audio", files={"file": ("x.wav", clips[i // 2])}, data={"k": "4"})

    with ThreadPoolExecutor(32) as pool:
        responses = list(pool.map(ask, range(32)))
    for i, response in enumerate(responses):
        expected = (
            service.search_text(f"folk number {i // 2}", k=4) if i % 2 else service.search_audio(clips[i // 2], k=4)
        )
        assert_same(response, expected)


def test_bad_requests_leave_the_replicas_alone(client: httpx.Client, indexed: Config):
    before = replicas()
    assert len(before) == 2
    good = wav(sound(1, indexed.audio), indexed.audio)
    rng = np.random.default_rng(0)
    uploads: list[tuple[bytes, set[int]]] = [
        (b"", {415}),
        (b"not audio at all" * 100, {415}),
        (good[:20], {415}),
        (wav(np.zeros(10, np.float32), indexed.audio), {422}),
        (wav(np.full(16_000, np.nan, np.float32), indexed.audio), {422}),
        (b"#EXTM3U\nhttp://localhost/x\n", {415}),
        (good + b"x" * 2_000_000, {413}),
        *((rng.bytes(5_000), {415}) for _ in range(5)),
    ]
    for _ in range(10):
        damaged = bytearray(good)
        for place in rng.integers(0, len(damaged), size=20):
            damaged[place] ^= int(rng.integers(1, 256))
        uploads.append((bytes(damaged), {200, 415, 422}))
    for data, statuses in uploads:
        response = client.post("/v1/search/audio", files={"file": ("x", data)})
        assert response.status_code in statuses, response.text
        if response.status_code != 200:
            assert set(response.json()["error"]) == {"code", "message"}
    for response, status in (
        (client.post("/v1/search", content=b"{", headers={"content-type": "application/json"}), 400),
        (client.post("/v1/search", json={"text": "a", "k": 0}), 422),
        (client.post("/v1/search", json={"song_id": "unknown"}), 404),
        (client.get("/nothing"), 404),
        (client.get("/healthz", headers={"host": "evil.example"}), 400),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"code", "message"}
    assert client.post("/v1/search/audio", files={"file": ("x.wav", good)}).status_code == 200
    assert replicas() == before


def test_an_upload_without_a_length_is_cut_off(client: httpx.Client):
    def endless() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(100):
            yield b"y" * 100_000

    response = client.post(
        "/v1/search/audio", content=endless(), headers={"content-type": "multipart/form-data; boundary=x"}
    )
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "too_large"


def test_a_second_application_on_the_cluster_is_refused(url: str, indexed: Config):
    with pytest.raises(ConfigError, match="already runs"), serving(indexed):
        pass
    assert httpx.get(f"{url}/readyz").status_code == 200


class TestRefusedBeforeRayStarts:
    @pytest.fixture(autouse=True)
    def no_ray(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(application, "connect", lambda config: pytest.fail("Ray was started"))

    def test_a_port_that_is_taken(self, indexed: Config):
        with socket.create_server(("127.0.0.1", 0)) as other:
            port = other.getsockname()[1]
            with (
                pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port} .*in use.*serve\.port"),
                serving(indexed.with_overrides({"serve.port": port})),
            ):
                pass

    def test_a_workspace_without_an_index(self, tmp_path: Path, indexed: Config):
        with (
            pytest.raises(WorkspaceError, match="run 'htcl index' first"),
            serving(indexed.with_overrides({"workspace": str(tmp_path)})),
        ):
            pass

    def test_an_unknown_version(self, indexed: Config):
        with pytest.raises(IndexNotFoundError, match="no finished index 'nothing'"), serving(indexed, "nothing"):
            pass

    def test_an_index_of_other_weights(self, tmp_path: Path, indexed: Config):
        import shutil

        from htcl_ray.models import HTCL

        copied = tmp_path / "workspace"
        shutil.copytree(indexed.workspace, copied)
        folder = copied / "models" / "preference" / "preference-0"
        manifest = json.loads((folder / "manifest.json").read_text())
        model = HTCL.from_pretrained(folder)
        model.audio_head[0].weight.data.mul_(2)
        model.save_pretrained(folder)
        manifest["files"] = {name: file_sha256(folder / name) for name in manifest["files"]}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with (
            pytest.raises(MismatchError, match=r"preference model \w{16}.*loaded is \w{16}"),
            serving(indexed.with_overrides({"workspace": str(copied)})),
        ):
            pass
