"""The page, its policy and the map of the catalogue over ASGI."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import httpx
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.song_index import SongIndex
from htcl_ray.search.song_map import draw_map, evenly_chosen, score_quantiles, song_map
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.routes import page_routes
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, unit_vectors, write_index

pytestmark = pytest.mark.unit


class Backend:
    def __init__(self, workspace: Workspace) -> None:
        self.live = LiveIndex(workspace, ServeSettings(), VERSIONS)


class Client:
    """Client over ASGI, in front of a live index."""

    def __init__(self, workspace: Workspace) -> None:
        self.backend = Backend(workspace)
        self.app = create_app(self.backend, ServeSettings(max_upload_bytes=1_234_567))

    async def ask(self, path: str) -> httpx.Response:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.get(path)

    def __call__(self, path: str) -> httpx.Response:
        return asyncio.run(self.ask(path))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(str(tmp_path / "workspace"))
    write_index(made, "v1", {f"song {i}": i for i in range(20)}, titles={"song 3": "Drei"})
    return made


@pytest.fixture
def client(workspace: Workspace) -> Client:
    return Client(workspace)


class Elements(HTMLParser):
    """Parser that collects tags with their attributes, and the text of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside in self.inline:
            self.inline[self._inside].append(data)

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def test_the_page_loads_nothing_external_and_its_policy_forbids_it(client: Client):
    response = client("/")
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    page = Elements()
    page.feed(response.text)
    for tag, attributes in page.tags:
        assert "src" not in attributes, f"<{tag}> loads something"
        assert "style" not in attributes, "the policy allows no style attribute"
        assert not [name for name in attributes if name.startswith("on")], "the policy allows no handler attribute"
        if "href" in attributes:
            assert attributes["href"].startswith(("#", "data:"))
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", response.text.replace("url(#", ""))
    policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
    for tag in ("script", "style"):
        assert len(page.inline[tag]) == 1
        digest = base64.b64encode(hashlib.sha256(page.inline[tag][0].encode()).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == policy["media-src"] == "'self'"


def test_the_page_contains_the_settings_of_the_server(client: Client):
    page = Elements()
    page.feed(client("/").text)
    body = next(attributes for tag, attributes in page.tags if tag == "body")
    assert body == {"data-max-upload-bytes": "1234567", "data-play-audio": "true", "data-little-coverage": "0.5"}


def test_the_map_contains_every_song_with_its_metadata(client: Client):
    body = client("/v1/map").json()
    assert body["index"] == "v1"
    songs = {song["song_id"]: song for song in body["songs"]}
    assert set(songs) == {f"song {i}" for i in range(20)}
    assert songs["song 3"]["title"] == "Drei"
    assert all(0 <= song[axis] <= 1 for song in songs.values() for axis in "xy")
    assert client("/v1/map").json() == body


def test_concurrent_requests_share_one_drawing_of_the_map(
    client: Client, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
):
    drawn = []
    monkeypatch.setattr(page_routes, "draw_map", lambda index: drawn.append(len(index)) or draw_map(index))

    async def crowd() -> list[httpx.Response]:
        return await asyncio.gather(*(client.ask("/v1/map") for _ in range(8)))

    assert len({response.text for response in asyncio.run(crowd())}) == 1
    assert drawn == [20]
    write_index(workspace, "v2", {"only": 1, "two": 2})
    client.backend.live.activate("v2")
    assert {song["song_id"] for song in client("/v1/map").json()["songs"]} == {"only", "two"}
    assert drawn == [20, 2]


def test_the_map_of_the_index_is_not_drawn_again(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Positions are those of the build, without songs that were removed since."""
    index = SongIndex.load(workspace.local_copy("index/v1"))
    index.song_map = draw_map(index)
    index.save(tmp_path / "drawn", inputs=index.manifest["inputs"], quality=index.manifest["quality"])
    workspace.publish(tmp_path / "drawn", "index/v2", index.manifest)
    monkeypatch.setattr(page_routes, "draw_map", lambda index: 1 / 0)
    client = Client(workspace)
    client.backend.live.activate("v2")
    client.backend.live.remove("song 5")
    songs = {song["song_id"]: (song["x"], song["y"]) for song in client("/v1/map").json()["songs"]}
    drawn = {row["song_id"]: pytest.approx((row["x"], row["y"]), abs=1e-4) for row in index.song_map.to_pylist()}
    assert len(drawn) == 20
    assert songs == {song_id: place for song_id, place in drawn.items() if song_id != "song 5"}


def test_a_failed_map_is_tried_again(client: Client, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patched:
        patched.setattr(page_routes, "draw_map", lambda index: 1 / 0)
        assert client("/v1/map").status_code == 500
    assert len(client("/v1/map").json()["songs"]) == 20


def test_removed_and_renamed_songs_change_the_map_immediately(client: Client):
    client("/v1/map")
    client.backend.live.remove("song 5")
    client.backend.live.describe("song 3", {"title": "Three"})
    songs = {song["song_id"]: song for song in client("/v1/map").json()["songs"]}
    assert set(songs) == {f"song {i}" for i in range(20) if i != 5}
    assert songs["song 3"]["title"] == "Three"


def test_an_estimated_genre_is_no_label_of_the_map(client: Client):
    live = client.backend.live
    live.describe("song 3", {"genre": ["jazz"], "estimated": ["genre"]})
    live.describe("song 4", {"genre": ["folk"]})
    songs = {song["song_id"]: song for song in client("/v1/map").json()["songs"]}
    assert (songs["song 3"]["genre"], songs["song 4"]["genre"]) == (None, ["folk"])


def test_an_index_with_removed_songs_is_drawn(client: Client):
    for i in range(19):
        client.backend.live.remove(f"song {i}")
    client.backend.live.upsert("song 2", unit_vectors(99), {})
    assert {song["song_id"] for song in client("/v1/map").json()["songs"]} == {"song 2", "song 19"}


def test_the_background_is_the_distribution_of_the_cosines_of_all_pairs(client: Client):
    """The share of pairs below a score from the quantiles equals that from counting the pairs."""
    index = client.backend.live.service.index
    ids = [f"song {i}" for i in range(20)]
    vectors = index.vectors_of(ids)
    body = client("/v1/background").json()
    assert body["index"] == "v1"
    for half, quantiles in ((vectors.semantic, body["semantic"]), (vectors.preference, body["preference"])):
        pairs = [float(half[i] @ half[j]) for i in range(20) for j in range(i)]
        assert quantiles == sorted(quantiles)
        assert [quantiles[0], quantiles[-1]] == pytest.approx([min(pairs), max(pairs)], abs=1e-4)
        for score in (-0.9, -0.4, 0.0, 0.3, 0.75, 0.99):
            assert np.searchsorted(quantiles, score) / 1001 == pytest.approx(
                np.mean([pair < score for pair in pairs]), abs=0.01
            )


def test_the_background_follows_the_index_without_removed_songs(client: Client, workspace: Workspace):
    before = client("/v1/background").json()
    assert client("/v1/background").json() == before
    vectors = unit_vectors(1), unit_vectors(2)
    write_index(workspace, "v2", {"one": 1, "two": 2, "gone": 3})
    client.backend.live.activate("v2")
    client.backend.live.remove("gone")
    body = client("/v1/background").json()
    assert (body["index"], len(body["semantic"])) == ("v2", 1001)
    cosine = float(vectors[0].semantic[0] @ vectors[1].semantic[0])
    assert body["semantic"] == pytest.approx([cosine] * 1001, abs=1e-4)


def test_one_song_has_no_background(client: Client, workspace: Workspace):
    write_index(workspace, "v2", {"one": 1})
    client.backend.live.activate("v2")
    assert client("/v1/background").json() == {"index": "v2", "semantic": None, "preference": None}


def test_the_background_of_a_thousand_songs_is_near_that_of_all():
    vectors = unit_vectors(5, 2_500)
    index = SongIndex.build([f"{i:04}" for i in range(2_500)], vectors, model_versions=dict(VERSIONS))
    semantic, preference = score_quantiles(index)
    cosines = (vectors.semantic @ vectors.semantic.T)[np.triu_indices(2_500, 1)]
    assert semantic == pytest.approx(np.quantile(cosines, np.linspace(0, 1, 1001)), abs=0.05)
    assert preference != semantic


def grouped(groups: int, each: int, width: int = 32) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(groups, width))
    label = np.repeat(np.arange(groups), each)
    vectors = centres[label] + 0.6 * rng.normal(size=(groups * each, width))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), label


def test_the_map_separates_groups_of_songs():
    vectors, label = grouped(6, 40)
    places = song_map(vectors)
    assert places.shape == (240, 2)
    assert places.min() == 0
    assert places.max() == 1
    neighbours = NearestNeighbors(n_neighbors=6).fit(places).kneighbors(return_distance=False)
    assert (label[neighbours] == label[:, None]).mean() > 0.9
    occupied = len({tuple(cell) for cell in np.minimum((places * 5).astype(int), 4)})
    assert occupied >= 13, "at least half of 25 cells hold songs"
    np.testing.assert_array_equal(places, song_map(vectors))


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9])
def test_maps_of_few_songs(count: int):
    places = song_map(unit_vectors(1, max(count, 1)).semantic[:count])
    assert places.shape == (count, 2)
    assert np.isfinite(places).all()
    assert not len(places) or (places.min() >= 0 and places.max() <= 1)
    assert len(np.unique(places, axis=0)) == count


@pytest.mark.parametrize("count", [2, 12])
def test_identical_songs_are_in_the_middle(count: int):
    np.testing.assert_array_equal(song_map(np.ones((count, 4), dtype=np.float32)), 0.5)


@pytest.mark.parametrize(("rows", "most"), [(0, 5), (1, 5), (4, 5), (5, 5), (6, 5), (5_001, 5_000), (1_000_000, 5_000)])
def test_songs_are_sampled_evenly(rows: int, most: int):
    chosen = evenly_chosen(rows, most)
    assert len(chosen) == min(rows, most)
    if rows > 1:
        assert (chosen[0], chosen[-1]) == (0, rows - 1)
        gaps = np.diff(chosen)
        assert gaps.max() - gaps.min() <= 1
