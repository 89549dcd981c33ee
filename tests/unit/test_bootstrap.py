"""Intervals against scipy's bootstrap, closed forms and resamples written out; paired differences; the table they are saved in."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.bootstrap import Draws, Estimate
from htcl_ray.evaluation.figures import Task
from htcl_ray.evaluation.saved import estimates, from_table, to_table

pytestmark = pytest.mark.unit


def test_the_mean_and_median_of_each_resample_are_those_of_the_repeated_values():
    generator = np.random.default_rng(0)
    clusters = [f"a{i % 7}" for i in range(40)]
    values = generator.normal(size=40)
    values[[3, 11]] = np.nan
    draws = bootstrap.draw(clusters, 200, seed=1)
    assert (draws.weights.sum(axis=1) > 0).all()
    of_mean, of_median = bootstrap.mean(values, draws), bootstrap.median(values, draws)
    for row, weights in enumerate(draws.weights.astype(int)):
        repeated = np.repeat(values, weights)
        repeated = repeated[~np.isnan(repeated)]
        assert of_mean.resampled[row] == pytest.approx(repeated.mean(), abs=1e-6)
        assert of_median.resampled[row] == pytest.approx(np.sort(repeated)[(len(repeated) - 1) // 2], abs=1e-6)
    assert of_mean.value == pytest.approx(np.nanmean(values))
    assert of_median.value == np.nanmedian(values)
    assert of_mean.n == of_median.n == 38


def test_with_one_unit_a_cluster_the_interval_is_scipys():
    values = np.random.default_rng(0).exponential(size=300)
    ours = bootstrap.mean(values, bootstrap.draw([str(i) for i in range(300)], 10_000, seed=0)).interval
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.01)


def test_clusters_widen_the_interval_by_the_square_root_of_their_size():
    """Ten copies of each value are no more evidence than one."""
    values = np.random.default_rng(0).normal(size=200)
    alone = bootstrap.mean(values, bootstrap.draw([str(i) for i in range(200)], 4000, seed=0)).interval
    copies = bootstrap.mean(np.repeat(values, 10), bootstrap.draw([str(i) for i in np.repeat(range(200), 10)], 4000, seed=0)).interval
    naive = bootstrap.mean(np.repeat(values, 10), bootstrap.draw([str(i) for i in range(2000)], 4000, seed=0)).interval
    assert copies == pytest.approx(alone, abs=1e-6)
    assert (alone[1] - alone[0]) / (naive[1] - naive[0]) == pytest.approx(np.sqrt(10), rel=0.1)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    draws = bootstrap.draw([str(i) for i in range(100)], 400, seed=0)
    inside = 0
    for _ in range(400):
        low, high = bootstrap.mean(generator.normal(size=100), draws).interval
        inside += low <= 0 <= high
    assert 0.91 < inside / 400 < 0.98


def test_a_difference_is_paired():
    """Two figures that move together: each is uncertain, their difference is not."""
    values = np.random.default_rng(0).normal(size=50)
    draws = bootstrap.draw([str(i) for i in range(50)], 500, seed=0)
    first, second = bootstrap.mean(values + 0.01, draws), bootstrap.mean(values, draws)
    assert first.interval[0] < second.interval[1]
    gain = bootstrap.difference(first, second)
    assert gain.interval == pytest.approx((0.01, 0.01), abs=1e-5)
    assert bootstrap.is_shown(gain)
    assert bootstrap.is_shown(bootstrap.difference(second, second)) is False
    other = bootstrap.mean(values, bootstrap.draw([f"u{i}" for i in range(50)], 500, seed=0))
    unpaired = bootstrap.difference(first, other)
    assert unpaired.interval is None
    assert bootstrap.is_shown(unpaired) is None


def test_the_order_of_units_does_not_change_the_draws():
    names = [f"a{i}" for i in range(9)]
    values = np.arange(9.0)
    order = np.random.default_rng(0).permutation(9)
    straight = bootstrap.mean(values, bootstrap.draw(names, 100, seed=3))
    shuffled = bootstrap.mean(values[order], bootstrap.draw([names[i] for i in order], 100, seed=3))
    np.testing.assert_allclose(straight.resampled, shuffled.resampled)
    assert straight.population == shuffled.population
    assert straight.population != bootstrap.draw(names, 100, seed=4).population


def test_a_group_weighs_the_mean_of_its_units():
    draws = Draws(np.array([[1, 3, 0], [0, 0, 2]], dtype=np.float32), "p").merged(np.array([0, 0, 1]), 2)
    assert draws.weights.tolist() == [[2, 0], [0, 2]]


def test_without_values_there_is_no_figure():
    draws = bootstrap.draw(["a", "b"], 100, seed=0)
    for empty in (bootstrap.mean(np.full(2, np.nan), draws), bootstrap.median(np.full(2, np.nan), draws)):
        assert np.isnan(empty.value)
        assert empty.interval is None
        assert empty.n == 0


def test_figures_survive_the_table():
    draws = bootstrap.draw(["a", "b", "c"], 100, seed=0)
    methods = {"semantic": {"ndcg@10": bootstrap.mean(np.array([0.0, 0.5, 1.0]), draws)}, "random": {"worst": Estimate(0.25, 3)}}
    found = estimates([Task("cold", "cold songs", "users", "users", "random", methods)])
    again = from_table(to_table(found))
    assert again.keys() == found.keys()
    for key, item in found.items():
        assert (again[key].value, again[key].n, again[key].population) == (item.value, item.n, item.population)
        np.testing.assert_array_equal(again[key].resampled, item.resampled)
    assert from_table(to_table({})) == {}
