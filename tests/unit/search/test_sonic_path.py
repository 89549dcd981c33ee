"""Paths between two songs, against a naive search over all songs and against closed forms."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.service import MAX_PATH, SearchService
from htcl_ray.search.sonic_path import arc

pytestmark = pytest.mark.unit

SONGS, DIM = 300, 8


def directions(rng: np.random.Generator, rows: int, dim: int = DIM) -> np.ndarray:
    values = rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def catalogue(
    seed: int, songs: int = SONGS, *, preference: bool = True, groups: list[str | None] | None = None
) -> SearchService:
    rng = np.random.default_rng(seed)
    vectors = Vectors(directions(rng, songs), directions(rng, songs) if preference else None)
    metadata = pa.table({"duplicate_group": pa.array(groups or [None] * songs, pa.string())})
    return SearchService(SongIndex.build([f"s{i:03d}" for i in range(songs)], vectors, metadata=metadata))


def ids(service: SearchService, start: str, end: str, count: int, **options: float) -> list[str]:
    return [hit.song_id for hit in service.path(start, end, count, **options).hits]


def naive_slerp(a: np.ndarray, b: np.ndarray, share: float) -> np.ndarray:
    """Rotation of `a` towards `b` in their plane."""
    a, b = a.astype(float), b.astype(float)
    angle = np.arccos(np.clip(a @ b, -1, 1))
    across = b - (a @ b) * a
    across /= np.linalg.norm(across)
    return np.cos(share * angle) * a + np.sin(share * angle) * across


def naive_path(service: SearchService, start: str, end: str, count: int, blend: float) -> list[str]:
    index = service.index
    names = [f"s{i:03d}" for i in range(len(index))]
    vectors = index.vectors_of(names)
    halves = [vectors.semantic.astype(float), vectors.preference.astype(float)]
    first, last = names.index(start), names.index(end)

    def scores(queries: list[np.ndarray]) -> np.ndarray:
        return (1 - blend) * halves[0] @ queries[0] + blend * halves[1] @ queries[1]

    selected: list[int] = []
    for step in range(1, count - 1):
        values = scores([naive_slerp(half[first], half[last], step / (count - 1)) for half in halves])
        values[[first, last, *selected]] = -np.inf
        selected.append(int(values.argmax()))
    progress = scores([half[last] for half in halves]) - scores([half[first] for half in halves])
    return [start, *(names[i] for i in sorted(selected, key=lambda i: progress[i])), end]


@pytest.mark.parametrize("blend", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_path_equals_a_naive_search(seed: int, blend: float):
    service = catalogue(seed)
    start, end = "s007", "s123"
    assert ids(service, start, end, 12, blend=blend) == naive_path(service, start, end, 12, blend)


@pytest.mark.parametrize("count", [2, 3, 5, 25, MAX_PATH])
def test_path_has_distinct_songs_and_both_ends(count: int):
    path = ids(catalogue(1), "s010", "s020", count)
    assert (path[0], path[-1], len(path)) == ("s010", "s020", count)
    assert len(set(path)) == count


def test_path_moves_from_start_to_end():
    service = catalogue(2)
    path = ids(service, "s010", "s020", 20)
    vectors = service.index.vectors_of(path)
    joined = np.concatenate([vectors.semantic, vectors.preference], axis=1) / np.sqrt(2)
    progress = joined @ joined[-1] - joined @ joined[0]
    assert (np.diff(progress) >= -1e-6).all()


def test_path_neighbours_are_closer_than_random_songs():
    near, far = [], []
    for seed in range(5):
        service = catalogue(seed)
        path = ids(service, "s001", "s002", 15)
        vectors = service.index.vectors_of(path)
        joined = np.concatenate([vectors.semantic, vectors.preference], axis=1) / np.sqrt(2)
        near.append((joined[1:] * joined[:-1]).sum(axis=1).mean())
        rng = np.random.default_rng(seed)
        random_songs = service.index.vectors_of([f"s{i:03d}" for i in rng.choice(SONGS, 15, replace=False)])
        other = np.concatenate([random_songs.semantic, random_songs.preference], axis=1) / np.sqrt(2)
        far.append((other[1:] * other[:-1]).sum(axis=1).mean())
    assert min(near) > max(far) + 0.1


def test_scores_are_relative_to_the_start():
    service = catalogue(3)
    results = service.path("s005", "s050", 6, blend=0.25)
    expected = {hit.song_id: hit for hit in service.search_songs(["s005"], k=SONGS, blend=0.25).hits}
    assert results.hits[0].score == pytest.approx(1)
    for hit in results.hits[1:]:
        assert (hit.score, hit.semantic_score) == pytest.approx(
            (expected[hit.song_id].score, expected[hit.song_id].semantic_score)
        )
    assert [song["song_id"] for song in results.metadata] == [hit.song_id for hit in results.hits]


def test_small_catalogue_returns_all_songs():
    assert sorted(ids(catalogue(4, songs=5), "s000", "s003", 25)) == [f"s{i:03d}" for i in range(5)]


def test_equal_ends_return_one_song():
    assert ids(catalogue(4), "s001", "s001", 10) == ["s001"]


def test_both_ends_are_returned_for_any_count():
    assert ids(catalogue(4), "s001", "s002", 1) == ["s001", "s002"]


def test_path_has_no_duplicate_recordings():
    groups = [f"recording {i // 2}" for i in range(20)]
    path = ids(catalogue(5, songs=20, groups=groups), "s000", "s019", 25)
    assert len(path) == 10
    assert len({int(song[1:]) // 2 for song in path}) == 10


def test_path_without_stage_2():
    hits = catalogue(6, preference=False).path("s001", "s002", 8).hits
    assert len(hits) == 8
    assert all(hit.preference_score is None for hit in hits)


@pytest.mark.parametrize(("start", "end"), [("missing", "s001"), ("s001", "missing")])
def test_unknown_song_raises(start: str, end: str):
    with pytest.raises(SongNotFoundError, match="missing"):
        catalogue(0).path(start, end, 5)


@pytest.mark.parametrize("count", [0, -1, MAX_PATH + 1])
def test_count_out_of_range_raises(count: int):
    with pytest.raises(QueryError, match="count"):
        catalogue(0).path("s001", "s002", count)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 2.0, np.pi - 1e-9, np.pi])
def test_arc_points_have_unit_norm_and_equal_angles(angle: float):
    a = np.zeros(DIM)
    a[0] = 1
    b = np.zeros(DIM)
    b[:2] = np.cos(angle), np.sin(angle)
    points = arc(Vectors(np.stack([a, b]).astype(np.float32)), 4).semantic.astype(float)
    assert np.linalg.norm(points, axis=1) == pytest.approx(1, abs=1e-6)
    whole = np.stack([a, *points, b])
    turned = np.arccos(np.clip((whole[1:] * whole[:-1]).sum(axis=1), -1, 1))
    assert turned == pytest.approx(angle / 5, abs=1e-3)
