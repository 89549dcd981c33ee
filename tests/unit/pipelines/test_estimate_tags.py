"""Estimated tags as an artifact: what determines it, and where it is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config import resolve
from htcl_ray.errors import WorkspaceError
from htcl_ray.pipelines.estimate_tags import estimates_version, find_estimates, song_scores, with_estimates
from htcl_ray.schemas import TAG_COLUMNS
from htcl_ray.workspace.storage import Workspace

pytestmark = pytest.mark.unit


def config(**settings: object):
    return resolve("demo").with_overrides({"audio.extractor": "pretrained", "catalog.auto_tags": True, **settings})


def test_features_and_the_minimum_score_determine_the_estimates():
    version = estimates_version(config(), "features-1")
    assert version == estimates_version(config(**{"pretrain.epochs": 3, "index.kind": "hnsw"}), "features-1")
    assert version != estimates_version(config(), "features-2")
    assert version != estimates_version(config(**{"catalog.auto_tags_min_score": 0.3}), "features-1")


def test_missing_estimates_are_refused_and_unwanted_ones_not_read(tmp_path: Path):
    workspace = Workspace(str(tmp_path))
    with pytest.raises(
        WorkspaceError, match=r"no estimated tags \(catalog\.auto_tags\) for the features f; run 'htcl p"
    ):
        find_estimates(workspace, config(), "f")
    assert find_estimates(workspace, config(**{"catalog.auto_tags": False}), "f") is None
    songs = pa.table({"song_id": ["a"], **{name: pa.nulls(1, pa.list_(pa.string())) for name in TAG_COLUMNS}})
    assert with_estimates(workspace, songs, None) is songs


def test_scores_are_means_over_the_windows_of_a_song_without_its_padding():
    class Tagger:
        def tag_scores(self, vectors: np.ndarray) -> np.ndarray:
            return vectors[:, :2] / 10

    windows = np.arange(12, dtype=np.float16).reshape(2, 3, 2)
    features = pa.FixedShapeTensorArray.from_numpy_ndarray(windows)
    table = pa.table({"features": features, "valid_frames": [3, 1]})
    np.testing.assert_allclose(song_scores(table, Tagger()), [[0.2, 0.3], [0.6, 0.7]], rtol=1e-6)
