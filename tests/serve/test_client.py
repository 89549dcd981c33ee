"""The client against the real routes, served by uvicorn from this process over a real socket."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn

from htcl_ray.client import AsyncClient, Client, NoResponseError, Play, RequestError, Retries
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import AudioError
from htcl_ray.index.live.activation import starting_pointer
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.schemas import Reason
from htcl_ray.serving.api_keys import Keys
from htcl_ray.serving.http_app import create_app
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.worlds.documented_commands import blocks
from tests.worlds.live import DIM, VERSIONS, unit_vectors, write_index

pytestmark = pytest.mark.serve

READER, WRITER = "reader-0123456789", "writer-0123456789"
SONGS = {"a": 1, "b": 2, "c": 3, "with/slash": 4, "ü ?#%2F": 5, "..": 6}


class Backend:
    """Words and bytes → vectors of their length; anything that begins with `bad` is no audio."""

    def __init__(self, live: LiveIndex) -> None:
        self.live = live

    async def encode_text(self, text: str) -> Vectors:
        return unit_vectors(1_000 + len(text))

    async def encode_audio(self, data: bytes) -> Vectors:
        if data.startswith(b"bad"):
            raise AudioError(Reason.UNDECODABLE, "it is no audio")
        return unit_vectors(len(data))

    encode_song = encode_audio

    async def encode_vector(self, vector: list[float]) -> Vectors:
        return unit_vectors(round(sum(vector)))

    async def check_ready(self) -> None:
        pass


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> LiveIndex:
    workspace = Workspace(str(tmp_path_factory.mktemp("client") / "workspace"))
    write_index(workspace, "v1", SONGS, titles={"a": "Aria"})
    write_index(workspace, "v2", SONGS)
    return LiveIndex(workspace, ServeSettings(), VERSIONS, starting_pointer(workspace, "v1"))


@pytest.fixture(scope="module")
def url(live: LiveIndex) -> Iterator[str]:
    entries = [{"name": "r", "key": READER, "scopes": ["read"]}, {"name": "w", "key": WRITER, "scopes": ["write"]}]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTCL_API_KEYS", json.dumps(entries))
        keys = Keys.from_settings(ServeSettings(host="0.0.0.0"))
    app = create_app(Backend(live), ServeSettings(max_upload_bytes=10_000), keys)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(timeout=20)


class Both:
    """Every call with both clients, which must give the same."""

    def __init__(self, url: str, key: str | None) -> None:
        self.sync = Client(url, key=key)
        self.url, self.key = url, key

    def __getattr__(self, name: str):
        def call(*args: Any, **kwargs: Any):
            async def awaited():
                async with AsyncClient(self.url, key=self.key) as client:
                    return await getattr(client, name)(*args, **kwargs)

            one = getattr(self.sync, name)(*args, **kwargs)
            for part in (*args, *kwargs.values()):
                if isinstance(part, io.IOBase):
                    part.seek(0)
            other = asyncio.run(awaited())
            if name not in ("put_song", "activate"):
                assert one == other
            return other

        return call


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[Both]:
    both = Both(url, WRITER)
    yield both
    both.sync.close()


def ids(response: Any) -> list[str]:
    return [result.song_id for result in response.results]


@pytest.mark.parametrize(
    "options",
    [{}, {"k": 2, "blend": 0.2}, {"filter": {"title": "aria"}, "max_per_artist": 1, "collapse_duplicates": False}],
)
def test_searches_are_those_of_the_service(client: Both, live: LiveIndex, options: dict[str, Any]):
    service = live.active.service
    vector = [float(x) for x in range(2 * DIM)]
    plain = {name: value for name, value in options.items() if name != "filter"}
    if "filter" in options:
        from htcl_ray.api.requests import Filter

        plain["filter"] = Filter(**options["filter"])
    cases = [
        (client.search("calm piano", **options), service.search(unit_vectors(1_010), **plain)),
        (client.search(song_id="a", **options), service.search_songs(["a"], **plain)),
        (
            client.search(song_ids=["a", "b"], negative_song_ids=["c"], **options),
            service.search_songs(["a", "b"], ["c"], **plain),
        ),
        (client.search(vector=vector, **options), service.search_vector(vector, **plain)),
        (client.search_audio(b"12345", **options), service.search(unit_vectors(5), **plain)),
        (client.similar("b", **options), service.search_songs(["b"], **plain)),
        (
            client.recommend(["a", Play("b", 2.0, 1e9), Play("unknown")], half_life_days=7, **options),
            service.recommend([Play("a"), Play("b", 2.0, 1e9)], half_life_days=7, **plain),
        ),
    ]
    for given, expected in cases:
        assert ids(given) == [hit.song_id for hit in expected.hits]
        assert [result.score for result in given.results] == pytest.approx([hit.score for hit in expected.hits])
        assert (given.k, given.blend, given.index) == (expected.k, expected.blend, "v1")
    assert cases[-1][0].unknown_song_ids == ["unknown"]


def test_a_recording_may_be_a_path_bytes_or_an_open_file(client: Both, tmp_path: Path):
    path = tmp_path / "clip.wav"
    path.write_bytes(b"x" * 44)
    with path.open("rb") as file:
        responses = [client.search_audio(audio) for audio in (path, str(path), b"x" * 44, file, io.BytesIO(b"x" * 44))]
    assert all(response == responses[0] for response in responses)


def test_vectors_can_be_searched_with(client: Both):
    for embedding in (client.embed_text("calm piano"), client.embed_audio(b"1234567890")):
        assert len(embedding.vector) == 2 * DIM
        assert embedding.model_versions == VERSIONS
    assert ids(client.search(vector=client.embed_text("calm piano").vector)) == ids(client.search("calm piano"))


@pytest.mark.parametrize("song_id", SONGS)
def test_every_song_can_be_named(client: Both, song_id: str):
    assert client.song(song_id).song_id == song_id
    assert song_id not in ids(client.similar(song_id))


@pytest.mark.parametrize("song_id", ["new", "new/with ü?#", "."])
def test_a_song_is_put_in_changed_and_taken_out(client: Both, song_id: str):
    updated = client.put_song(song_id, b"y" * 77, {"title": "Neu", "genre": ["jazz"], "year": 1999})
    assert (updated.song_id, updated.index) == (song_id, "v1")
    song = client.song(song_id)
    assert (song.title, song.genre, song.year, song.lyrics) == ("Neu", ["jazz"], 1999, None)
    assert ids(client.search_audio(b"z" * 77, k=1)) == [song_id]
    client.put_song(song_id, metadata={"title": "Alt"})
    assert (client.song(song_id).title, client.song(song_id).genre) == ("Alt", None)
    client.put_song(song_id, vector=np.array([70, 9], np.float32))
    assert ids(client.search_audio(b"z" * 79, k=1)) == [song_id]
    assert client.song(song_id).title == "Alt"
    client.put_song(song_id, audio=b"y" * 78)
    assert client.song(song_id).title == "Alt"
    assert client.sync.delete_song(song_id).song_id == song_id
    with pytest.raises(RequestError) as caught:
        client.sync.delete_song(song_id)
    assert caught.value.status == 404


def test_the_index_is_told_and_switched(client: Both):
    served = client.index()
    assert (served.version, served.songs, served.dim, served.has_preference) == ("v1", len(SONGS), DIM, True)
    assert client.ready().index == "v1"
    assert client.alive().status == "ok"
    assert client.activate("v2").version == "v2"
    assert client.index().version == "v2"
    client.activate("v1")


@pytest.mark.parametrize(
    ("ask", "status", "code", "said"),
    [
        (lambda client: client.song("unknown"), 404, "song_not_found", "unknown"),
        (lambda client: client.search("piano", song_id="a"), 422, "invalid_request", "exactly one"),
        (lambda client: client.search("piano", k=0), 422, "invalid_request", "k"),
        (lambda client: client.search_audio(b"bad"), 415, "undecodable", "no audio"),
        (lambda client: client.search_audio(b"x" * 10_001), 413, "too_large", "10000"),
        (lambda client: client.activate("nothing"), 404, "index_not_found", "nothing"),
        (lambda client: client.put_song("a"), 422, "invalid_query", "neither"),
    ],
)
def test_a_refusal_has_status_code_and_message(url: str, ask: Any, status: int, code: str, said: str):
    with Client(url, key=WRITER) as client, pytest.raises(RequestError) as caught:
        ask(client)
    assert (caught.value.status, caught.value.code) == (status, code)
    assert said in caught.value.message
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("key", "said"), [(None, "is needed"), ("unknown-0123456789", "not one"), (READER, "lacks scope write")]
)
def test_who_may_not_write_is_told_so(url: str, key: str | None, said: str):
    with Client(url, key=key) as client, pytest.raises(RequestError, match=said) as caught:
        client.delete_song("a")
    assert (caught.value.status, caught.value.code) == (401, "unauthorised")


def test_a_missing_file_is_an_error_of_the_file(client: Both, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        client.sync.search_audio(tmp_path / "missing.wav")


def test_an_unreachable_server_is_an_error():
    with Client("http://127.0.0.1:9", retries=Retries(attempts=2, first_wait=0.01)) as client:
        with pytest.raises(NoResponseError, match="POST /v1/search had no response"):
            client.search("piano")
        with pytest.raises(NoResponseError):
            client.ready()


@pytest.mark.parametrize("block", blocks(REPOSITORY / "docs" / "client.md", "python"))
def test_what_the_documentation_shows_runs(url: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "clip.wav").write_bytes(b"x" * 44)
    monkeypatch.chdir(tmp_path)
    here = block.replace(', key="an-API-key-of-yours"', "").replace(
        '"http://127.0.0.1:8000"', f'"{url}", key="{READER}"'
    )
    assert here.count(READER) == 1
    exec(compile(here, "docs/client.md", "exec"), {})
