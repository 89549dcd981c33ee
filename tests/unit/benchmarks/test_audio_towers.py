"""The summary of benchmarks/audio_towers.py, and its probes on vectors whose classes are known."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.audio_towers import ROWS, probes, summary
from htcl_ray.config import resolve

pytestmark = pytest.mark.unit


def test_folds_count_by_their_clips():
    def line(fold: int, seed: int, clips: int, accuracy: float) -> dict[str, object]:
        curve = [{"epoch": 10, "loss": 1.0, "linear": accuracy / 2}, {"epoch": 20, "loss": 0.5, "linear": accuracy}]
        measured = {"linear": accuracy, "test_clips": clips, "curve": curve}
        cost = {"training_cpu_seconds": 10.0 * fold, "tower_parameters": 5}
        return {"row": "cnn", "fold": fold, "seed": seed, "epochs": 20, **measured, **cost}

    entry = summary([line(1, 0, 10, 0.5), line(2, 0, 30, 0.9), line(1, 1, 10, 0.7)])["cnn"]
    assert entry["by_seed"] == {"0": {"linear": 0.8}, "1": {"linear": 0.7}}
    assert entry["linear"] == pytest.approx((5 + 27 + 7) / 50)
    assert [point["linear"] for point in entry["curve"]] == [pytest.approx(0.39), pytest.approx(0.78)]
    assert entry["folds_and_seeds"] == [[1, 0], [1, 1], [2, 0]]
    assert entry["training_cpu_seconds_per_fold"] == pytest.approx(40 / 3, abs=0.1)


def test_probes_find_classes_that_lie_apart_and_none_in_noise():
    random = np.random.default_rng(0)
    of_name = np.arange(300) % 3
    known, held_out = np.arange(200), np.arange(200, 300)
    apart = np.eye(3)[of_name] * 5 + random.normal(0, 0.1, (300, 3))
    assert probes(apart, of_name, known, held_out) == {"linear": 1.0, "knn": 1.0}
    assert max(probes(random.normal(size=(300, 3)), of_name, known, held_out).values()) < 0.6


def test_every_row_is_a_configuration():
    for settings in ROWS.values():
        resolve("demo").with_overrides(settings)
