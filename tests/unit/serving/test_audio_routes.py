"""The songs' audio over ASGI: ranges of bytes against slices of the file, and addresses that are signed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import httpx
import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.song_index import SongIndex
from htcl_ray.search.service import SearchService
from htcl_ray.serving.api_keys import Keys
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.routes.audio_routes import MAX_OPEN_RANGE_BYTES, NotSatisfiable, requested_bytes
from htcl_ray.serving.signed_urls import LIFETIME_SECONDS, SignedUrls
from tests.worlds.live import unit_vectors

pytestmark = pytest.mark.unit

CONTENT = np.random.default_rng(0).bytes(5_000)
IDS = ["a", "with/slash ü", "gone", "silent", "folder", "page", "large", "nothing"]
KEY = "reads-0123456789abcdef"
SIGNING_KEY = b"k" * 32


class Client:
    """httpx over ASGI, before songs whose files lie in `folder`."""

    def __init__(self, folder: Path, settings: ServeSettings | None = None, keys: Keys | None = None) -> None:
        for name, content in (
            ("a.mp3", CONTENT),
            ("b.flac", CONTENT[:100]),
            ("page.html", b"<script>"),
            ("empty.wav", b""),
        ):
            (folder / name).write_bytes(content)
        self.large = np.random.default_rng(1).bytes(MAX_OPEN_RANGE_BYTES + 70_000)
        (folder / "large.ogg").write_bytes(self.large)
        paths = ["a.mp3", "b.flac", "gone.mp3", None, "", "page.html", "large.ogg", "empty.wav"]
        whole = [None if name is None else str(folder / name) for name in paths]
        whole[1] = (folder / "b.flac").as_uri()
        metadata = pa.table({"audio_path": pa.array(whole, pa.string())})
        index = SongIndex.build(IDS, unit_vectors(0, len(IDS)), metadata=metadata)
        self.backend = SimpleNamespace(
            live=SimpleNamespace(active=SimpleNamespace(version="v1", service=SearchService(index)))
        )
        self.app = create_app(self.backend, settings or ServeSettings(), keys, signing_key=SIGNING_KEY)

    def __call__(self, path: str, method: str = "GET", **headers: str) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.request(
                    method, path, headers={name.replace("_", "-"): value for name, value in headers.items()}
                )

        return asyncio.run(send())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("audio")


@pytest.fixture(scope="module")
def client(folder: Path) -> Client:
    return Client(folder)


@pytest.fixture
def guarded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Client:
    """Where reading needs a key."""
    monkeypatch.setenv("HTCL_API_KEYS", f"[{{name: listener, key: {KEY}, scopes: [read]}}]")
    return Client(folder, ServeSettings(host="192.0.2.1", allowed_hosts=("*",)))


def assert_failure(response: httpx.Response, status: int, code: str) -> None:
    assert response.status_code == status, response.text
    assert response.json()["error"]["code"] == code


def path_of(song_id: str) -> str:
    return f"/v1/songs/{quote(song_id)}/audio"


def test_the_whole_file_is_sent_without_a_range(client: Client):
    response = client(path_of("a"))
    assert response.status_code == 200
    assert response.content == CONTENT
    assert response.headers["content-type"] == "audio/mpeg"
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-length"] == str(len(CONTENT))
    assert "content-range" not in response.headers


def test_files_named_by_uri_and_by_ids_of_any_characters(client: Client):
    response = client(path_of("with/slash ü"))
    assert (response.status_code, response.headers["content-type"], response.content) == (
        200,
        "audio/flac",
        CONTENT[:100],
    )


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("bytes=0-0", slice(0, 1)),
        ("bytes=0-99", slice(0, 100)),
        ("bytes=100-199", slice(100, 200)),
        ("bytes=4999-", slice(4999, 5000)),
        ("bytes=0-", slice(0, 5000)),
        ("bytes=10-999999", slice(10, 5000)),
        ("bytes=-1", slice(-1, None)),
        ("bytes=-500", slice(-500, None)),
        ("bytes=-999999", slice(0, 5000)),
        ("Bytes=0-9", slice(0, 10)),
        ("bytes= 5-9 ", slice(5, 10)),
    ],
)
def test_a_range_is_that_slice_of_the_file(client: Client, header: str, expected: slice):
    response = client(path_of("a"), range=header)
    assert response.status_code == 206
    assert response.content == CONTENT[expected]
    start, stop, _ = expected.indices(len(CONTENT))
    assert response.headers["content-range"] == f"bytes {start}-{stop - 1}/5000"
    assert response.headers["content-length"] == str(stop - start)


@pytest.mark.parametrize("header", ["bytes=5000-", "bytes=5000-5001", "bytes=999999999-", "bytes=-0"])
def test_a_range_behind_the_end_is_416_with_the_size(client: Client, header: str):
    response = client(path_of("a"), range=header)
    assert_failure(response, 416, "range_not_satisfiable")
    assert response.headers["content-range"] == "bytes */5000"


@pytest.mark.parametrize(
    "header",
    [
        "bytes=0-1,5-6",
        "bytes=9-3",
        "bytes=-",
        "bytes=",
        "bytes=a-b",
        "seconds=0-1",
        "0-5",
        "bytes=0-1-2",
        "bytes=1e3-",
        "",
        "x" * 99,
    ],
)
def test_several_ranges_and_what_is_no_range_get_the_whole_file(client: Client, header: str):
    response = client(path_of("a"), range=header)
    assert (response.status_code, response.content) == (200, CONTENT)


def test_a_number_too_long_to_be_a_place_is_passed_over(client: Client):
    assert client(path_of("a"), range=f"bytes={'9' * 5_000}-").status_code == 200
    assert requested_bytes("bytes=\u0663-", 100, 100) is None


def test_ranges_without_an_end_are_cut_and_together_make_the_file(client: Client):
    parts, position = [], 0
    while position < len(client.large):
        response = client(path_of("large"), range=f"bytes={position}-")
        assert response.status_code == 206
        assert len(response.content) <= MAX_OPEN_RANGE_BYTES
        parts.append(response.content)
        position += len(response.content)
    assert len(parts) == 2
    assert b"".join(parts) == client.large
    assert client(path_of("large")).content == client.large
    assert client(path_of("large"), range=f"bytes=1-{len(client.large)}").content == client.large[1:]


def test_an_empty_file_has_no_range(client: Client):
    assert client(path_of("nothing")).content == b""
    for header in ("bytes=0-", "bytes=-5"):
        assert client(path_of("nothing"), range=header).status_code == 416


@pytest.mark.parametrize("size", [0, 1, 2, 7])
def test_every_small_range_equals_slicing(size: int):
    data = bytes(range(size))
    for first in [None, *range(size + 2)]:
        for last in [None, *range(size + 2)]:
            header = f"bytes={'' if first is None else first}-{'' if last is None else last}"
            if (first is None and last is None) or (first is not None and last is not None and last < first):
                assert requested_bytes(header, size, 100) is None
            else:
                wanted = (
                    data[first : None if last is None else last + 1]
                    if first is not None
                    else data[-last:]
                    if last
                    else b""
                )
                if wanted:
                    span = requested_bytes(header, size, 100)
                    assert data[span.start : span.stop] == wanted
                else:
                    with pytest.raises(NotSatisfiable):
                        requested_bytes(header, size, 100)


def test_if_none_match_and_if_range(client: Client):
    etag = client(path_of("a")).headers["etag"]
    same = client(path_of("a"), if_none_match=etag)
    assert (same.status_code, same.content) == (304, b"")
    assert client(path_of("a"), range="bytes=0-9", if_range=etag).content == CONTENT[:10]
    assert client(path_of("a"), range="bytes=0-9", if_range='"other"').content == CONTENT


@pytest.mark.parametrize("song_id", ["gone", "silent", "folder"])
def test_missing_audio_is_404(client: Client, song_id: str):
    assert_failure(client(path_of(song_id)), 404, "audio_not_found")
    assert_failure(client(f"{path_of(song_id)}-url", "POST"), 404, "audio_not_found")


def test_only_songs_of_the_index_have_audio(client: Client, folder: Path):
    for song_id in ("missing", str(folder / "a.mp3"), "../a.mp3", folder.as_uri() + "/a.mp3"):
        response = client(path_of(song_id))
        assert response.status_code == 404
        assert CONTENT not in response.content


def test_a_file_that_is_not_audio_is_not_displayed_as_a_page(client: Client):
    response = client(path_of("page"))
    assert response.headers["content-type"] == "application/octet-stream"
    assert response.headers["x-content-type-options"] == "nosniff"


def test_audio_is_404_when_play_audio_is_off(folder: Path):
    silent = Client(folder, ServeSettings(play_audio=False))
    assert_failure(silent(path_of("a")), 404, "audio_not_found")
    assert_failure(silent(f"{path_of('a')}-url", "POST"), 404, "audio_not_found")
    assert silent("/").status_code == 200
    assert 'data-play-audio="false"' in silent("/").text


BEARER = {"authorization": f"Bearer {KEY}"}


def test_a_signed_url_needs_no_key(guarded: Client):
    for song_id in ("a", "with/slash ü"):
        created = guarded(f"{path_of(song_id)}-url", "POST", **BEARER)
        assert created.status_code == 200, created.text
        response = guarded(created.json()["url"], range="bytes=0-9")
        assert (response.status_code, response.content) == (206, CONTENT[:10])
    assert guarded(path_of("a"), **BEARER).content == CONTENT


def test_audio_without_key_and_signature_is_401(guarded: Client):
    assert_failure(guarded(path_of("a")), 401, "unauthorised")
    assert_failure(guarded(f"{path_of('a')}-url", "POST"), 401, "unauthorised")
    assert_failure(guarded("/v1/map"), 401, "unauthorised")
    assert guarded("/").status_code == 200


def test_a_signature_is_valid_for_one_song_and_one_expiry(guarded: Client):
    url, expires = SignedUrls(SIGNING_KEY).make("a")
    assert guarded(url).status_code == 200
    query = url.partition("?")[2]
    signature = query.partition("signature=")[2]
    other_digit = "1" if signature[0] == "0" else "0"
    for tampered in (
        f"{path_of('with/slash ü')}?{query}",
        f"/v1/songs/a?{query}",
        f"/v1/songs/a/similar?{query}",
        f"/v1/index?{query}",
        url.replace(f"expires={expires}", f"expires={expires + 1}"),
        url.replace(signature, other_digit + signature[1:]),
        url.replace(signature, ""),
        url.replace(signature, signature.upper() if signature.upper() != signature else "0" * 64),
        f"{url}&expires={expires + 99}",
        f"{path_of('a')}?signature={signature}&expires={expires}",
        f"{path_of('a')}?expires=&signature={signature}",
        f"{path_of('a')}?expires=٣&signature={signature}",
    ):
        assert_failure(guarded(tampered), 401, "unauthorised")
    assert_failure(guarded(url, "POST"), 401, "unauthorised")
    assert_failure(guarded(SignedUrls(b"another key, as of another server").make("a")[0]), 401, "unauthorised")
    assert_failure(guarded(url, authorization="Bearer wrong-0123456789abcdef"), 401, "unauthorised")


def test_a_signed_url_expires(guarded: Client):
    import time

    now = time.time()
    old = SignedUrls(SIGNING_KEY, lambda: now - LIFETIME_SECONDS - 1).make("a")[0]
    assert_failure(guarded(old), 401, "unauthorised")
    url, expires = SignedUrls(SIGNING_KEY, lambda: 1_000.0).make("a")
    assert expires == 1_000 + LIFETIME_SECONDS == 1_300
    query = url.partition("?")[2].encode()
    assert SignedUrls(SIGNING_KEY, lambda: 1_299.9).allows("GET", "/v1/songs/a/audio", query)
    assert not SignedUrls(SIGNING_KEY, lambda: 1_300.0).allows("GET", "/v1/songs/a/audio", query)
    assert SignedUrls(SIGNING_KEY, lambda: 1_000.0).allows("HEAD", "/v1/songs/a/audio", query)
    assert not SignedUrls(SIGNING_KEY, lambda: 1_000.0).allows("POST", "/v1/songs/a/audio", query)
