"""Filters, variety, negatives, histories and shared tags against a naive reference that looks at every song, one at a
time."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pydantic import ValidationError

from htcl_ray.api.requests import Filter, Play
from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.schemas import INDEX_SONGS
from htcl_ray.search.service import SearchService
from htcl_ray.search.song_columns import SongColumns

pytestmark = pytest.mark.unit

SONGS, DIM = 300, 6
GENRES = ["Rock", "jazz", "Ambient", "folk"]


def catalogue(seed: int = 0) -> list[dict[str, Any]]:
    """Songs of 12 artists, some unknown and some of two; every fifth has a twin in its duplicate group."""
    rng = np.random.default_rng(seed)
    return [
        {
            "song_id": f"s{row:03d}",
            "title": f"Title {row % 50}",
            "artist": None if row % 11 == 0 else f"Artist {row % 12}" + (f"; artist {row % 5}" if row % 7 == 0 else ""),
            "album": None,
            "licence": ["CC0", "CC-BY", None][row % 3],
            "genre": None if row % 13 == 0 else [GENRES[i] for i in rng.permutation(4)[: 1 + row % 2]],
            "mood": [["calm"], [], None, ["Bright", "calm"]][row % 4],
            "tags": [f"tag {row % 7}", "piano"] if row % 3 else None,
            "language": ["en"] if row % 2 else ["de", "en"],
            "year": None if row % 17 == 0 else 1980 + row % 40,
            "duplicate_group": f"g{row // 10}" if row % 5 == 0 else None,
            "estimated": [None, ["genre"], ["mood", "tags"], ["genre", "tags"]][row % 4],
        }
        for row in range(SONGS)
    ]


CATALOGUE = catalogue()


@pytest.fixture(scope="module")
def service() -> SearchService:
    halves = np.random.default_rng(1).normal(size=(2, SONGS, DIM))
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    names = [name for name in INDEX_SONGS.names if name != "song_id"]
    metadata = pa.table(
        {name: pa.array([song.get(name) for song in CATALOGUE], INDEX_SONGS.field(name).type) for name in names}
    )
    vectors = Vectors(*halves.astype(np.float32))
    index = SongIndex.build(
        [song["song_id"] for song in CATALOGUE], vectors, metadata=metadata, settings=IndexSettings(kind="flat")
    )
    return SearchService(index)


def holds(song: dict[str, Any], conditions: dict[str, Any]) -> bool:
    stated_only = conditions.get("include_estimated") is False
    for name, wanted in conditions.items():
        if name == "include_estimated":
            continue
        value = song[name]
        if stated_only and name in (song["estimated"] or ()):
            return False
        if isinstance(wanted, dict):
            if value is None or not wanted.get("gte", -math.inf) <= value <= wanted.get("lte", math.inf):
                return False
            continue
        wanted = wanted if isinstance(wanted, list) else [wanted]
        values = value if isinstance(value, list) else [value]
        if name == "artist" and value:
            values = [value, *value.split("; ")]
        if name not in ("song_id", "year"):
            wanted, values = [word.lower() for word in wanted], [word.lower() for word in values if word is not None]
        if not set(values) & set(wanted):
            return False
    return True


def naive(
    service: SearchService,
    query: tuple[np.ndarray, np.ndarray],
    blend: float,
    k: int,
    *,
    exclude: Collection[str] = (),
    conditions: dict[str, Any] | None = None,
    most: int | None = None,
    collapse: bool = True,
) -> list[str]:
    ids = [song["song_id"] for song in CATALOGUE]
    own = service.index.vectors_of(ids)
    semantic, preference = (half.astype(np.float64) / np.linalg.norm(half) for half in query)
    scores = (1 - blend) * (own.semantic.astype(np.float64) @ semantic) + blend * (
        own.preference.astype(np.float64) @ preference
    )
    artists: dict[str, int] = {}
    groups = (
        {song["duplicate_group"] for song in CATALOGUE if song["song_id"] in exclude} - {None} if collapse else set()
    )
    taken: list[str] = []
    for row in sorted(range(SONGS), key=lambda row: (-scores[row], ids[row])):
        song = CATALOGUE[row]
        credited, group = set((song["artist"] or "").lower().split("; ")) - {""}, song["duplicate_group"]
        if song["song_id"] in exclude or not holds(song, conditions or {}):
            continue
        if collapse and group is not None and group in groups:
            continue
        if most is not None and any(artists.get(artist, 0) >= most for artist in credited):
            continue
        taken.append(song["song_id"])
        for artist in credited:
            artists[artist] = artists.get(artist, 0) + 1
        groups.add(group)
        if len(taken) == k:
            break
    return taken


def ids_of(results: Any) -> list[str]:
    return [hit.song_id for hit in results.hits]


CONDITIONS: list[dict[str, Any]] = [
    {},
    {"genre": ["rock"]},
    {"genre": "JAZZ", "mood": ["Calm", "bright"]},
    {"artist": "artist 3"},
    {"year": {"gte": 1990, "lte": 1999}},
    {"year": {"gte": 2010}},
    {"year": {"lte": 1985}, "licence": ["cc0", "cc-by"]},
    {"year": 1999},
    {"year": [1999, 1981, 3000]},
    {"tags": ["tag 4"], "language": ["DE"]},
    {"song_id": ["s004", "s005", "S006", "unknown"]},
    {"title": "title 7", "genre": ["rock", "folk", "jazz"]},
    {"artist": "unknown"},
    {"genre": ["rock"], "include_estimated": False},
    {"genre": "JAZZ", "mood": ["Calm", "bright"], "include_estimated": False},
    {"tags": ["tag 4"], "include_estimated": True},
    {"include_estimated": False},
]


@pytest.mark.parametrize("conditions", CONDITIONS)
@pytest.mark.parametrize(
    ("most", "collapse", "k"), [(None, False, 10), (None, True, 10), (1, True, 40), (2, False, 300), (3, True, 300)]
)
def test_every_option_at_once(service: SearchService, conditions: dict, most: int | None, collapse: bool, k: int):
    options = {"filter": Filter.model_validate(conditions), "max_per_artist": most, "collapse_duplicates": collapse}
    for seed, blend in (("s000", 0.0), ("s010", 0.5), ("s123", 1.0)):
        own = service.index.vectors_of([seed])
        expected = naive(
            service,
            (own.semantic[0], own.preference[0]),
            blend,
            k,
            exclude=[seed],
            conditions=conditions,
            most=most,
            collapse=collapse,
        )
        assert ids_of(service.search_songs([seed], k=k, blend=blend, **options)) == expected


CREDITS = [
    "Queen",
    "Queen; David Bowie",
    "David Bowie feat. Guest",
    None,
    "Earth, Wind & Fire",
    "QUEEN (feat. Guest)",
    ";",
]


def test_every_credited_artist_is_searchable_and_counted():
    songs = pa.table(
        {
            name: pa.array(CREDITS if name == "artist" else [None] * len(CREDITS), INDEX_SONGS.field(name).type)
            for name in INDEX_SONGS.names
        }
    )
    columns = SongColumns(songs)

    def rows(artist: str) -> list[int]:
        return np.flatnonzero(columns.allowed(Filter(artist=artist))).tolist()

    assert rows("queen") == [0, 1, 5]
    assert rows("David Bowie") == [1, 2]
    assert rows("GUEST") == [2, 5]
    assert rows("Queen; David Bowie") == [1]
    assert rows("earth, wind & fire") == [4]
    assert rows("Earth") == []
    of_row = [set(columns.artists_of(row)) for row in range(len(CREDITS))]
    for first in range(len(CREDITS)):
        for second in (row for row in range(len(CREDITS)) if row != first):
            assert bool(of_row[first] & of_row[second]) == (frozenset((first, second)) in SHARED)
        assert np.flatnonzero(columns.credits_any(of_row[first])).tolist() == [
            row for row in range(len(CREDITS)) if of_row[row] & of_row[first]
        ]
    assert [len(artists) for artists in of_row] == [1, 2, 2, 0, 1, 2, 0]


SHARED = {frozenset(rows) for rows in ((0, 1), (0, 5), (1, 2), (1, 5), (2, 5))}


def test_a_narrow_filter_still_fills_the_results(service: SearchService):
    results = service.search_songs(["s001"], k=4, filter=Filter(artist="Artist 3"))
    assert len(results.hits) == 4
    assert all("artist 3" in song["artist"].lower().split("; ") for song in results.metadata)


@pytest.mark.parametrize(
    ("conditions", "said"),
    [
        ({"genres": ["rock"]}, "'genres' is not a column to filter by; did you mean 'genre'"),
        ({"year": {"from": 1990}}, "year\n.*expected a year, a list of 1 to 1000 years, or a range"),
        ({"year": {}}, "expected a year"),
        ({"year": "1990s"}, "expected a year"),
        ({"year": []}, "expected a year"),
        ({"year": 10**9}, "expected a year"),
        ({"genre": []}, "genre\n.*expected a text, or a list of 1 to 1000"),
        ({"genre": ["x"] * 1001}, "expected a text"),
        ({"genre": 7}, "expected a text"),
        ({"genre": ["a", None]}, "expected a text"),
        ({"artist": {"a": 1}}, "artist\n.*expected a text"),
    ],
)
def test_filters_that_cannot_be_used(conditions: dict, said: str):
    with pytest.raises(ValidationError, match=said):
        Filter.model_validate(conditions)


def test_negatives_push_away(service: SearchService):
    seeds, negatives = ["s001", "s002"], ["s050", "s051", "s052"]
    liked, disliked = service.index.vectors_of(seeds), service.index.vectors_of(negatives)
    query = [
        liked_half.mean(0) - 0.5 * away.mean(0)
        for liked_half, away in zip(halves(liked), halves(disliked), strict=True)
    ]
    expected = naive(service, (query[0], query[1]), 0.3, 20, exclude=[*seeds, *negatives])
    assert ids_of(service.search_songs(seeds, negatives, k=20, blend=0.3)) == expected
    assert ids_of(service.search_songs(seeds, [], k=20, blend=0.3)) != expected


def halves(vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    assert vectors.preference is not None
    return vectors.semantic.astype(np.float64), vectors.preference.astype(np.float64)


DAY = 86_400.0


def test_a_history_is_its_decayed_mean_and_is_left_out(service: SearchService):
    history = [
        Play("s001", 2.0, 1_700_000_000.0),
        Play("gone", 5.0, 1_700_000_000.0 + 90 * DAY),
        Play("s002", 1.0, 1_700_000_000.0 - 30 * DAY),
        Play("s003", -1.0, 1_700_000_000.0 - 60 * DAY),
        Play("s004"),
        Play("s001", 1.0, 1_700_000_000.0 - 15 * DAY),
    ]
    ids = ["s001", "s002", "s003", "s004", "s001"]
    weights = np.array([2.0, 0.5, -0.25, 1.0, 2 ** (-0.5)])
    own = halves(service.index.vectors_of(ids))
    expected = naive(service, (weights @ own[0], weights @ own[1]), 0.5, 15, exclude=ids)
    results = service.recommend(history, k=15)
    assert ids_of(results) == expected
    assert results.unknown_song_ids == ["gone"]
    assert ids_of(service.recommend(history, k=15, half_life_days=1)) != expected


def test_times_far_apart_do_not_overflow(service: SearchService):
    results = service.recommend([Play("s001", 1e6, -2e11), Play("s002", 1e-6, 2e11)], half_life_days=1e-6)
    assert ids_of(results) == ids_of(service.recommend([Play("s002"), Play("s001", 0.0)]))


def test_histories_that_say_nothing(service: SearchService):
    with pytest.raises(SongNotFoundError, match="none of the 2 songs of the history is in the index"):
        service.recommend([Play("x"), Play("y")])
    with pytest.raises(QueryError, match="no song of the history has weight"):
        service.recommend([Play("s001", 0.0), Play("x", 1.0)])
    with pytest.raises(QueryError, match="zero"):
        service.recommend([Play("s001", 1.0), Play("s001", -1.0)])


def test_tags_shared_with_the_query(service: SearchService):
    own = service.index.vectors_of(["s004"])
    results = service.search_encoded_text("A CALM piano piece, tag 4; not rocky", own, k=300, collapse_duplicates=False)
    for song, shared in zip(results.metadata, results.shared_tags, strict=True):
        words = [*(song["genre"] or []), *(song["mood"] or []), *(song["tags"] or [])]
        assert shared == [word for word in words if word in ("calm", "piano", "tag 4")]
    queried = {"rock", "jazz", "bright", "calm", "tag 2", "piano"}
    seed = next(
        song
        for song in CATALOGUE
        if {tag.lower() for name in ("genre", "mood", "tags") for tag in song[name] or ()} <= queried and song["tags"]
    )
    tags = {tag.lower() for name in ("genre", "mood", "tags") for tag in seed[name] or ()}
    results = service.search_songs([seed["song_id"]], k=300)
    assert any(results.shared_tags)
    for song, shared in zip(results.metadata, results.shared_tags, strict=True):
        words = [*(song["genre"] or []), *(song["mood"] or []), *(song["tags"] or [])]
        assert shared == [word for word in words if word.lower() in tags]
    assert service.search_vector([1.0] * 2 * DIM).shared_tags == [[]] * 10


def test_options_out_of_range(service: SearchService):
    with pytest.raises(QueryError, match="max_per_artist is 0; expected at least 1"):
        service.search_songs(["s001"], max_per_artist=0)


def test_what_is_filtered_follows_the_songs(service: SearchService):
    """A mask is remembered for one state of the index only."""
    index = service.index.snapshot()
    service = SearchService(index)
    only = Filter(artist="Newcomer")
    assert service.search_songs(["s001"], filter=only).hits == []
    index.upsert(["new"], index.vectors_of(["s001"]), metadata=pa.table({"artist": ["Newcomer"]}))
    assert ids_of(service.search_songs(["s001"], filter=only)) == ["new"]
    index.remove(["new"])
    assert service.search_songs(["s001"], filter=only).hits == []
