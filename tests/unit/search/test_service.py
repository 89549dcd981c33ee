"""Search service without HTTP and without Ray, on vectors with known results."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.errors import MismatchError, QueryError, SongNotFoundError
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors, unit_norm
from htcl_ray.search.service import SearchService

pytestmark = pytest.mark.unit

ANGLES = np.radians([0, 10, 25, 45, 70, 100])
IDS = ["a", "b", "c", "d", "e", "f"]
VERSIONS = {"semantic": "s1", "preference": "p1"}


def circle(angles: np.ndarray) -> np.ndarray:
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


class AngleEncoder:
    """Encoder of texts that are angles in degrees; the preference space is reversed."""

    dim = 2

    def __init__(self, preference: bool = True, versions: dict | None = None) -> None:
        self.preference = preference
        self.model_versions = versions or (VERSIONS if preference else {"semantic": "s1", "preference": None})
        self.encoded: list[str] = []

    def encode_texts(self, texts: list[str]) -> Vectors:
        self.encoded += texts
        angles = np.radians([float(text) for text in texts])
        return Vectors(circle(angles), circle(np.radians(100) - angles) if self.preference else None)


def service(preference: bool = True) -> SearchService:
    vectors = Vectors(circle(ANGLES), circle(ANGLES[::-1]) if preference else None)
    versions = VERSIONS if preference else {"semantic": "s1", "preference": None}
    return SearchService(SongIndex.build(IDS, vectors, model_versions=versions), AngleEncoder(preference))


def ids(results) -> list[str]:
    return [hit.song_id for hit in results.hits]


def test_search_by_text():
    results = service().search_text("0", k=3, blend=0)
    assert ids(results) == ["a", "b", "c"]
    assert [hit.score for hit in results.hits] == pytest.approx(np.cos(ANGLES[:3]), abs=1e-6)
    assert (results.k, results.blend, len(results.metadata)) == (3, 0, 3)


def test_defaults_are_ten_songs_and_blend_one_half():
    results = service().search_text("0")
    assert (results.k, results.blend, len(results.hits)) == (10, 0.5, 6)
    results = service(preference=False).search_text("0")
    assert (results.k, results.blend) == (10, 0)


def test_seed_is_not_returned():
    assert ids(service().search_songs(["c"], k=10, blend=0)) == ["b", "d", "a", "e", "f"]


def test_several_seeds_are_averaged():
    results = service().search_songs(["a", "e"], blend=0)
    assert ids(results) == ["c", "d", "b", "f"]
    middle = np.radians(35)
    assert [hit.score for hit in results.hits] == pytest.approx(np.cos(np.abs(ANGLES[[2, 3, 1, 5]] - middle)), abs=1e-6)


def test_vector_norm_does_not_change_results():
    vectors = circle(np.radians([20, 60]))
    expected = service().search(Vectors(vectors[:1], vectors[1:]), blend=0.3)
    for factors in ((1, 1), (5, 0.001)):
        actual = service().search_vector([*(vectors[0] * factors[0]), *(vectors[1] * factors[1])], blend=0.3)
        assert ids(actual) == ids(expected)
        assert [hit.score for hit in actual.hits] == pytest.approx([hit.score for hit in expected.hits], abs=1e-6)


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        ([1.0, 0.0], r"2 numbers; expected 4"),
        ([1.0] * 5, r"5 numbers; expected 4"),
        ([0.0, 0.0, 1.0, 0.0], "zero"),
        ([1.0, 0.0, float("nan"), 0.0], "not finite"),
        ([1e308, 1e308, 1.0, 0.0], "not finite"),
        ([[1.0, 0.0], [1.0, 0.0]], "expected 4"),
    ],
)
def test_invalid_vectors_are_rejected(vector: list, message: str):
    with pytest.raises(QueryError, match=message):
        service().search_vector(vector)


def test_vector_without_stage_2_has_one_half():
    assert ids(service(preference=False).search_vector([0.0, 1.0], k=1)) == ["f"]
    with pytest.raises(QueryError, match="expected 2"):
        service(preference=False).search_vector([0.0, 1.0, 0.0, 1.0])


@pytest.mark.parametrize("k", [0, -1, 1001])
def test_invalid_k_is_rejected_before_encoding(k: int):
    searcher = service()
    with pytest.raises(QueryError, match=f"k is {k}; expected 1 to 1000"):
        searcher.search_text("0", k=k)
    assert searcher.encoder.encoded == []


def test_blend_needs_stage_2():
    with pytest.raises(QueryError, match=r"blend is 0\.5"):
        service(preference=False).search_text("0", blend=0.5)
    assert ids(service(preference=False).search_text("0", blend=0.0, k=1)) == ["a"]


def test_unknown_songs_and_empty_queries_are_rejected():
    with pytest.raises(SongNotFoundError, match="'missing'"):
        service().search_songs(["a", "missing"])
    with pytest.raises(QueryError, match="at least one"):
        service().search_songs([])
    for text in ("", " \n"):
        with pytest.raises(QueryError, match="text is empty"):
            service().search_text(text)


def test_seeds_that_cancel_out_are_rejected():
    opposite = Vectors(circle(np.radians([0, 180, 90])))
    index = SongIndex.build(["x", "y", "z"], opposite)
    exact = Vectors(np.array([[1, 0], [-1, 0], [0, 1]], np.float32))
    with pytest.raises(QueryError, match="zero"):
        SearchService(SongIndex.build(["x", "y", "z"], exact)).search_songs(["x", "y"])
    assert len(index) == 3


def test_encoder_of_another_model_is_rejected():
    index = service().index
    with pytest.raises(MismatchError, match=r"semantic model s1.*s2"):
        SearchService(index, AngleEncoder(versions={"semantic": "s2", "preference": "p1"}))


def test_search_by_song_needs_no_encoder():
    searcher = SearchService(service().index)
    assert len(searcher.search_songs(["a"]).hits) == 5
    with pytest.raises(QueryError, match="need the models"):
        searcher.search_text("0")


def test_unit_norm():
    np.testing.assert_allclose(unit_norm(np.array([[3.0, 4.0]])), [[0.6, 0.8]])
