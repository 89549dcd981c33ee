"""Requests of music players over ASGI, with responses checked against a JSON Schema of OpenSubsonic's specification."""

from __future__ import annotations

import asyncio
import json
import logging
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import httpx
import jsonschema
import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config.sections import ServeSettings
from htcl_ray.index.live.live_index import Active
from htcl_ray.index.live.replay import Replay
from htcl_ray.index.live.update_log import UpdateLog
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.service import SearchService
from htcl_ray.serving.api_keys import Keys
from htcl_ray.serving.http_app import create_app
from htcl_ray.serving.subsonic.subsonic_responses import NAMESPACE, Entry
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.unit

SCHEMA = json.loads((REPOSITORY / "tests" / "worlds" / "opensubsonic.schema.json").read_text(encoding="utf-8"))
KEY = "player+key/0123456789="
PLAYER = {"v": "1.16.1", "c": "player", "f": "json"}
CALLS = {
    "getSonicSimilarTracks": {"id": "s1"},
    "findSonicPath": {"startSongId": "s1", "endSongId": "s2"},
    "tokenInfo": {},
}
SONGS = 40


def backend() -> SimpleNamespace:
    rng = np.random.default_rng(0)
    halves = rng.normal(size=(2, SONGS, 4))
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    metadata = pa.table(
        {
            "title": ["Aria & \x07 <b>", None, *[f"Song {i}" for i in range(2, SONGS)]],
            "artist": [f"Artist {i % 3}" for i in range(SONGS)],
            "genre": [["jazz", "folk"] if i % 2 else None for i in range(SONGS)],
            "mood": [["calm"] if i == 1 else [] for i in range(SONGS)],
            "year": pa.array([1990 + i for i in range(SONGS)], pa.int32()),
            "audio_path": [f"/secret/{i}.wav" for i in range(SONGS)],
        }
    )
    index = SongIndex.build([f"s{i}" for i in range(SONGS)], Vectors(*halves.astype(np.float32)), metadata=metadata)
    service = SearchService(index)
    replay = Replay(index, UpdateLog(Workspace("nowhere")))
    return SimpleNamespace(
        live=SimpleNamespace(active=Active("v1", service, "2026-01-01T00:00:00.000000+00:00", replay))
    )


class Player:
    """Sends requests as a player does; every response must match the specification."""

    def __init__(self, *, exposed: bool = False, **settings: Any) -> None:
        self.backend = backend()
        entries = [{"name": "living room", "key": KEY, "scopes": ["read"]}]
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HTCL_API_KEYS", json.dumps(entries))
            keys = Keys.from_settings(ServeSettings(host="0.0.0.0" if exposed else "127.0.0.1"))
        self.app = create_app(self.backend, ServeSettings(**settings), keys)

    def send(self, name: str, headers: dict[str, str] | None = None, **parameters: Any) -> httpx.Response:
        async def get() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
                return await client.get(f"/rest/{name}", params=PLAYER | parameters, headers=headers)

        return asyncio.run(get())

    def __call__(self, name: str, headers: dict[str, str] | None = None, **parameters: Any) -> dict[str, Any]:
        response = self.send(name, headers, **parameters)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"] == "application/json"
        jsonschema.validate(response.json(), SCHEMA)
        return response.json()["subsonic-response"]


@pytest.fixture(scope="module")
def player() -> Player:
    return Player()


@pytest.fixture(scope="module")
def guest() -> Player:
    """Player of an application that needs keys."""
    return Player(exposed=True)


def code(response: dict[str, Any]) -> int:
    assert response["status"] == "failed"
    return response["error"]["code"]


def test_estimated_values_are_not_told_to_players():
    song = {
        "song_id": "s",
        "title": "T",
        "artist": None,
        "album": None,
        "year": None,
        "genre": ["jazz"],
        "mood": ["calm"],
    }
    stated, estimated = (Entry.of({**song, "estimated": names}) for names in (None, ["genre"]))
    assert (stated.genre, stated.moods) == ("jazz", ["calm"])
    assert (estimated.genre, estimated.genres, estimated.moods) == (None, None, ["calm"])


@pytest.mark.parametrize("suffix", ["", ".view"])
def test_a_player_requests_extensions_similar_songs_and_a_path(guest: Player, suffix: str):
    offered = guest(f"getOpenSubsonicExtensions{suffix}")
    assert {extension["name"] for extension in offered["openSubsonicExtensions"]} == {
        "sonicSimilarity",
        "apiKeyAuthentication",
    }
    assert guest(f"tokenInfo{suffix}", apiKey=KEY)["tokenInfo"] == {"username": "living room"}
    similar = guest(f"getSonicSimilarTracks{suffix}", id="s3", count=5, apiKey=KEY)["sonicMatch"]
    similar_ids = [match["entry"]["id"] for match in similar]
    assert len(similar_ids) == 5
    path = guest(f"findSonicPath{suffix}", startSongId="s3", endSongId=similar_ids[-1], count=7, apiKey=KEY)[
        "sonicMatch"
    ]
    ids = [match["entry"]["id"] for match in path]
    assert (ids[0], ids[-1], len(set(ids))) == ("s3", similar_ids[-1], 7)
    assert path[0]["similarity"] == 1


def test_similar_songs_are_those_of_the_service(player: Player):
    service = player.backend.live.active.service
    for count in (1, 6, 10):
        expected = service.search_songs(["s7"], k=count).hits
        matches = player("getSonicSimilarTracks", id="s7", count=count)["sonicMatch"]
        assert [match["entry"]["id"] for match in matches] == [hit.song_id for hit in expected]
        assert [match["similarity"] for match in matches] == pytest.approx(
            [(1 + hit.score) / 2 for hit in expected], abs=1e-6
        )


def test_default_counts_are_those_of_the_specification(player: Player):
    assert len(player("getSonicSimilarTracks", id="s1")["sonicMatch"]) == 10
    assert len(player("findSonicPath", startSongId="s1", endSongId="s2")["sonicMatch"]) == 25


def test_excessive_counts_are_capped(player: Player):
    assert len(player("getSonicSimilarTracks", id="s1", count=10**9)["sonicMatch"]) == SONGS - 1
    assert len(player("findSonicPath", startSongId="s1", endSongId="s2", count=10**9)["sonicMatch"]) == SONGS


def test_an_entry_omits_unknown_fields(player: Player):
    entries = {
        match["entry"]["id"]: match["entry"]
        for match in player("getSonicSimilarTracks", id="s5", count=SONGS)["sonicMatch"]
    }
    assert entries["s1"] == {
        **{
            "id": "s1",
            "title": "s1",
            "isDir": False,
            "isVideo": False,
            "type": "music",
            "mediaType": "song",
            "artist": "Artist 1",
        },
        **{"year": 1991, "genre": "jazz", "genres": [{"name": "jazz"}, {"name": "folk"}], "moods": ["calm"]},
    }
    assert set(entries["s2"]) == {"id", "title", "isDir", "isVideo", "type", "mediaType", "artist", "year"}
    assert "secret" not in json.dumps(entries)


@pytest.mark.parametrize(
    ("name", "parameters", "expected", "said"),
    [
        ("getSonicSimilarTracks", {}, 10, "id"),
        ("getSonicSimilarTracks", {"id": ""}, 10, "id"),
        ("getSonicSimilarTracks", {"id": "missing"}, 70, "missing"),
        ("getSonicSimilarTracks", {"id": "s1", "count": "many"}, 0, "count"),
        ("getSonicSimilarTracks", {"id": "s1", "count": 0}, 0, "count"),
        ("getSonicSimilarTracks", {"id": "s1", "f": "jsonp", "callback": "alert"}, 0, "jsonp"),
        ("getSonicSimilarTracks", {"id": "s1", "f": "yaml"}, 0, "yaml"),
        ("findSonicPath", {"startSongId": "s1"}, 10, "endSongId"),
        ("findSonicPath", {"endSongId": "s1"}, 10, "startSongId"),
        ("findSonicPath", {"startSongId": "s1", "endSongId": "missing"}, 70, "missing"),
        ("findSonicPath", {"startSongId": "missing", "endSongId": "s1"}, 70, "missing"),
        ("findSonicPath", {"startSongId": "s1", "endSongId": "s2", "count": -1}, 0, "count"),
        ("tokenInfo", {}, 10, "apiKey"),
    ],
)
def test_errors_have_the_code_of_the_specification(
    player: Player, name: str, parameters: dict, expected: int, said: str
):
    response = player(name, **parameters)
    assert code(response) == expected
    assert said in response["error"]["message"]


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ({}, 10),
        ({"apiKey": "wrong-key-0123456789"}, 44),
        ({"apiKey": ""}, 44),
        ({"apiKey": KEY + "é"}, 44),
        ({"u": "me", "p": "secret"}, 42),
        ({"u": "me", "t": "0af", "s": "salt"}, 41),
        ({"u": "me", "apiKey": KEY}, 43),
        ({"apiKey": [KEY, KEY]}, 43),
    ],
)
def test_invalid_credentials_have_the_code_of_the_specification(guest: Player, name: str, sent: dict, expected: int):
    assert code(guest(name, **CALLS[name], **sent)) == expected


def test_a_key_in_a_header_is_accepted(guest: Player):
    assert guest("tokenInfo", {"Authorization": f"Bearer {KEY}"})["tokenInfo"]["username"] == "living room"
    assert code(guest("tokenInfo", {"Authorization": "Bearer wrong-key-0123456789"})) == 44
    assert code(guest("tokenInfo", {"Authorization": f"Bearer {KEY}"}, apiKey=KEY)) == 43


def test_a_wrong_key_is_rejected_even_if_none_is_needed(player: Player):
    assert code(player("getSonicSimilarTracks", id="s1", apiKey="wrong-key-0123456789")) == 44
    assert player("getSonicSimilarTracks", id="s1", u="me", p="whatever")["status"] == "ok"


def test_a_key_in_the_query_string_is_accepted_for_players_only(guest: Player):
    for path in ("/v1/index", "/v1/songs/s1", "/restful/x"):

        async def get(path: str = path) -> httpx.Response:
            async with httpx.AsyncClient(
                transport=httpx.ASGITransport(guest.app), base_url="http://localhost"
            ) as client:
                return await client.get(path, params={"apiKey": KEY})

        assert asyncio.run(get()).status_code == 401


def test_no_key_is_ever_logged(guest: Player, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG, "ray.serve.htcl")
    for sent in ({"apiKey": KEY}, {"apiKey": "wrong-key-0123456789"}, {"u": "me", "p": "wrong-key-0123456789"}):
        response = guest("getSonicSimilarTracks", id="missing", **sent)
        assert KEY not in json.dumps(response)
        assert "wrong-key" not in json.dumps(response)
    told = [str(vars(record)) for record in caplog.records if record.name == "ray.serve.htcl"]
    assert len(told) == 3
    assert not any("0123456789" in line for line in told)
    assert "living room" in told[0]


def test_credentials_are_removed_from_the_query_string(guest: Player):
    seen: list[bytes] = []

    async def inner(scope, receive, send):
        seen.append(scope["query_string"])

    from htcl_ray.serving.subsonic.subsonic_routes import SubsonicKeys

    for query in (b"id=a%26b&apiKey=x&f=json", b"api%4Bey=x&id=a%26b&u=me&p=x&t=x&s=x&f=json"):
        scope = {"type": "http", "path": "/rest/getOpenSubsonicExtensions", "query_string": query, "headers": []}
        asyncio.run(SubsonicKeys(inner, Keys())(scope, None, None))
    assert seen == [b"id=a%26b&f=json"] * 2


def plain(element: ElementTree.Element) -> dict[str, Any]:
    """XML response in the structure of the JSON response, with all values as strings."""
    content: dict[str, Any] = dict(element.attrib)
    for child in element:
        name = child.tag.removeprefix(f"{{{NAMESPACE}}}")
        value = plain(child) if len(child) or child.attrib else child.text
        content.setdefault(name, []).append(value)
    return content


def as_texts(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: [as_texts(part)] if isinstance(part, dict) else as_texts(part)
            for key, part in value.items()
            if part != []
        }
    if isinstance(value, list):
        return [as_texts(part) for part in value]
    return str(value).lower() if isinstance(value, bool) else str(value).replace("\x07", "\ufffd")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("getOpenSubsonicExtensions", {}),
        ("getSonicSimilarTracks", {"id": "s5", "count": SONGS}),
        ("findSonicPath", {"startSongId": "s1", "endSongId": "s0"}),
        ("getSonicSimilarTracks", {"id": "missing"}),
        ("getSonicSimilarTracks", {"id": "s1", "apiKey": "wrong-key-0123456789"}),
    ],
)
def test_xml_equals_json(player: Player, name: str, parameters: dict):
    response = player.send(name, **parameters | {"f": "xml"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/xml"
    root = ElementTree.fromstring(response.content)
    assert root.tag == f"{{{NAMESPACE}}}subsonic-response"
    assert plain(root) == as_texts(player(name, **parameters))


def test_openapi_lists_the_routes_of_players(player: Player):
    document = player.app.openapi()
    for name in ("getOpenSubsonicExtensions", "getSonicSimilarTracks", "findSonicPath", "tokenInfo"):
        content = document["paths"][f"/rest/{name}"]["get"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "application/xml"}
        model = document["components"]["schemas"][content["application/json"]["schema"]["$ref"].rpartition("/")[2]]
        assert model["required"] == ["subsonic-response"]
    assert not any(path.endswith(".view") for path in document["paths"])


def test_responses_match_the_openapi_schema(player: Player):
    document = player.app.openapi()
    for name, parameters in (*CALLS.items(), ("getOpenSubsonicExtensions", {}), ("findSonicPath", {})):
        content = document["paths"][f"/rest/{name}"]["get"]["responses"]["200"]["content"]
        schema = {**content["application/json"]["schema"], "components": document["components"]}
        jsonschema.validate({"subsonic-response": player(name, **parameters)}, schema)
