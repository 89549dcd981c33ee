"""The true traits as vectors: every trait with a taste, and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from htcl_ray.demo_world.listeners import make_tastes
from htcl_ray.demo_world.truth import true_vectors, write_true_vectors
from htcl_ray.demo_world.world import make_world

pytestmark = pytest.mark.unit


def test_true_vectors_hold_all_that_tastes_depend_on() -> None:
    """Utilities are linear in them, and brightness and presence are not in them."""
    world = make_world(songs=300, artists=60, seed=0)
    vectors = true_vectors(world)
    assert vectors.shape == (300, 3 + 8 + 5 + 8)
    utility = make_tastes(world, 10).utility(world)
    design = np.hstack([vectors, np.ones((300, 1))])
    residual = utility.T - design @ np.linalg.lstsq(design, utility.T, rcond=None)[0]
    assert np.abs(residual).max() < 1e-4
    nuisance = np.array([song.nuisance for song in world.songs])
    explained = np.linalg.lstsq(design, nuisance, rcond=None)[0]
    assert 1 - (nuisance - design @ explained).var() / nuisance.var() < 0.2


def test_the_table_names_every_song(tmp_path: Path) -> None:
    world = make_world(songs=20, artists=5, seed=0)
    write_true_vectors(world, tmp_path / "truth" / "traits.parquet")
    table = pq.read_table(tmp_path / "truth" / "traits.parquet")
    assert table["song_id"].to_pylist() == [song.song_id for song in world.songs]
    assert np.allclose(table["vector"].to_pylist(), true_vectors(world))
