"""Drift of queries against the index, by closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.search.drift import RECENT, QueryDrift, mean_of

pytestmark = pytest.mark.unit


def test_the_mean_is_that_of_the_songs_that_are_left():
    vectors = Vectors(np.eye(4, dtype=np.float32))
    index = SongIndex.build(["a", "b", "c", "d"], vectors)
    np.testing.assert_allclose(mean_of(index), [0.25] * 4)
    index.remove(["d"])
    np.testing.assert_allclose(mean_of(index), [1 / 3, 1 / 3, 1 / 3, 0])


def test_an_index_without_songs_has_no_direction():
    index = SongIndex.build([], Vectors(np.zeros((0, 3), dtype=np.float32)))
    assert QueryDrift().add(np.array([1.0, 0, 0]), mean_of(index)) == 0


def test_queries_like_the_index_do_not_drift_and_opposite_ones_do():
    centre = np.array([0.6, 0.8])
    assert QueryDrift().add(np.array([0.6, 0.8]), centre) == pytest.approx(0)
    assert QueryDrift().add(np.array([0.8, -0.6]), centre) == pytest.approx(1)
    assert QueryDrift().add(np.array([-0.6, -0.8]), centre) == pytest.approx(2)


def test_old_queries_count_less_by_the_exponential():
    """After many queries along x and n along y, the weights of the two are exp(-n / RECENT) and 1 - exp(-n /
    RECENT)."""
    drift, x, y = QueryDrift(), np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for _ in range(20 * RECENT):
        drift.add(x, x)
    for _ in range(RECENT):
        value = drift.add(y, x)
    along = np.array([np.exp(-1), 1 - np.exp(-1)])
    assert value == pytest.approx(1 - along[0] / np.linalg.norm(along), abs=1e-6)
