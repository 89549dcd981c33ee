"""Metrics of recommended lists against closed forms and hand-computed values."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.tasks.list_coverage import gini, list_metrics, top_k
from tests.worlds.recommendation_logs import columns_of_rows, histories

pytestmark = pytest.mark.unit


def test_gini_in_closed_form():
    assert gini(np.full(7, 3)) == pytest.approx(0)
    assert gini(np.array([0, 0, 0, 10])) == pytest.approx(3 / 4)
    assert gini(np.array([1, 2, 3, 4])) == pytest.approx(0.25)
    assert gini(np.zeros(3)) == 0


def test_list_metrics_match_hand_computed_values():
    lists, met = histories([0, 1], [0, 2], [0], songs=4), histories([], [3], [], songs=4)
    popularity = np.array([4.0, 3.0, 2.0, 1.0])
    draws = bootstrap.draw_two_way(list("abc"), ["x", "x", "y", "z"], 100, 0)
    actual = {
        name: item.value
        for name, item in list_metrics([lists], met, np.array(["x", "x", "y", "z"]), popularity, 2, draws).items()
    }
    assert actual["coverage@2"] == 3 / 4
    assert actual["gini@2"] == pytest.approx(gini(np.array([3, 1, 1, 0])))
    assert actual["artist_diversity@2"] == pytest.approx((0.5 + 1 + 1) / 3)
    percentiles = np.array([0.875, 0.625, 0.375, 0.125])
    lifts = [
        percentiles[[0, 1]].mean() / 0.5,
        percentiles[[0, 2]].mean() / percentiles[:3].mean(),
        percentiles[0] / 0.5,
    ]
    assert actual["popularity_lift@2"] == pytest.approx(np.mean(lifts))
    twice = list_metrics(
        [lists, histories([0, 1], [0, 1], [0, 1], songs=4)], met, np.array(["x", "x", "y", "z"]), popularity, 2, draws
    )
    assert twice["coverage@2"].value == pytest.approx((3 / 4 + 2 / 4) / 2)


def test_top_k_lists_the_best_and_draws_among_ties():
    scores, candidate = np.array([[5.0, 1.0, 1.0, 1.0, 9.0]] * 60), np.array([[True, True, True, True, False]] * 60)
    listed = columns_of_rows(top_k(scores, candidate, 2, seed=0))
    assert {tuple(row) for row in listed} == {(0, 1), (0, 2), (0, 3)}, "the best candidate, and one of three tied ones"
    assert columns_of_rows(top_k(scores[:5], candidate[:5], 2, seed=0, first_user=30)) == listed[30:35], (
        "whatever block a user is in"
    )
    assert columns_of_rows(top_k(scores, candidate, 9, seed=0))[0] == [0, 1, 2, 3]
    generator = np.random.default_rng(0)
    drawn = generator.normal(size=(20, 50))
    expected = [sorted(np.argsort(-row)[:7].tolist()) for row in drawn]
    assert columns_of_rows(top_k(drawn, np.ones(drawn.shape, dtype=bool), 7, seed=0)) == expected
