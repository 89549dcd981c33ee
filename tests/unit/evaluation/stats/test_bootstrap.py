"""Intervals against scipy's bootstrap, closed forms and resamples written out; paired differences; the table they are
saved in."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.task_result import TaskResult, estimates, from_table, to_table
from htcl_ray.evaluation.tasks.item_auc import ItemQueries, item_auc

pytestmark = pytest.mark.unit


def test_resampled_mean_and_median_match_repeated_values():
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


def test_interval_of_single_unit_clusters_matches_scipy():
    values = np.random.default_rng(0).exponential(size=300)
    actual = bootstrap.mean(values, bootstrap.draw([str(i) for i in range(300)], 10_000, seed=0)).interval
    expected = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=0).confidence_interval
    assert actual == pytest.approx((expected.low, expected.high), abs=0.01)


def test_clusters_widen_the_interval_by_the_square_root_of_their_size():
    """Ten copies of each value are no more evidence than one."""
    values = np.random.default_rng(0).normal(size=200)
    alone = bootstrap.mean(values, bootstrap.draw([str(i) for i in range(200)], 4000, seed=0)).interval
    copies = bootstrap.mean(
        np.repeat(values, 10), bootstrap.draw([str(i) for i in np.repeat(range(200), 10)], 4000, seed=0)
    ).interval
    naive = bootstrap.mean(np.repeat(values, 10), bootstrap.draw([str(i) for i in range(2000)], 4000, seed=0)).interval
    assert copies == pytest.approx(alone, abs=1e-6)
    assert (alone[1] - alone[0]) / (naive[1] - naive[0]) == pytest.approx(np.sqrt(10), rel=0.1)


def test_interval_has_its_nominal_coverage():
    generator = np.random.default_rng(0)
    draws = bootstrap.draw([str(i) for i in range(100)], 400, seed=0)
    inside = 0
    for _ in range(400):
        low, high = bootstrap.mean(generator.normal(size=100), draws).interval
        inside += low <= 0 <= high
    assert 0.91 < inside / 400 < 0.98


class Crossed:
    """A recommendation metric with known truth: hits of users × their songs, with effects of the user, the artist, the
    song and of both."""

    def __init__(self, seed: int, users: int = 150, artists: int = 30, per_artist: int = 4, targets: int = 5) -> None:
        generator = np.random.default_rng(seed)
        self.artist = np.repeat(np.arange(artists), per_artist)
        songs = len(self.artist)
        effect = 0.1 * generator.normal(size=artists)[self.artist] + 0.06 * generator.normal(size=songs)
        self.song = np.stack([generator.choice(songs, targets, replace=False) for _ in range(users)])
        noise = 0.15 * generator.normal(size=self.song.shape)
        self.hits = 0.5 + 0.05 * generator.normal(size=(users, 1)) + effect[self.song] + noise
        self.draws = bootstrap.draw_two_way([str(i) for i in range(users)], [str(i) for i in self.artist], 300, seed)

    def estimates(self) -> tuple[Estimate, Estimate]:
        """Resampled over users and artists, and over users alone."""
        parts, songs = self.hits / self.hits.shape[1], len(self.artist)
        gain = np.bincount(self.song.ravel(), weights=parts.ravel(), minlength=songs)
        mass = np.bincount(self.song.ravel(), minlength=songs) / self.hits.shape[1]
        values = parts.sum(axis=1)
        return bootstrap.two_way_mean(values, gain, mass, self.draws), bootstrap.mean(values, self.draws.users)


def test_two_way_interval_covers_the_truth_and_user_interval_does_not():
    """The true mean of new users and new songs is 0.5. Of 200 worlds, the interval of users alone holds it in far less
    than 95 %."""
    inside = np.zeros(2)
    widths = np.zeros(2)
    means = []
    for seed in range(200):
        estimates = Crossed(seed).estimates()
        means.append(estimates[0].value)
        for which, estimate in enumerate(estimates):
            low, high = estimate.interval
            inside[which] += low <= 0.5 <= high
            widths[which] += high - low
    both, users = inside / 200
    assert 0.92 <= both <= 0.99, both
    assert users < 0.75, users
    assert (widths / 200 / (2 * 1.96 * np.std(means)))[0] == pytest.approx(1, abs=0.15)


def test_paired_difference_of_two_models_covers_the_truth():
    """The second model is better by 0.1 on songs of some artists: which artists are held out decides how much is
    seen."""
    inside = np.zeros(2)
    for seed in range(200):
        world = Crossed(seed)
        better = np.random.default_rng((seed, 1)).random(world.artist.max() + 1) < 0.3
        first = world.estimates()
        world.hits = world.hits + 0.1 * better[world.artist[world.song]]
        gains = [bootstrap.difference(after, before) for after, before in zip(world.estimates(), first, strict=True)]
        inside += [low <= 0.03 + 1e-6 and high >= 0.03 - 1e-6 for low, high in (gain.interval for gain in gains)]
    both, users = inside / 200
    assert both >= 0.9, both
    assert users < 0.7, users


def test_two_way_resamples_match_repeated_units():
    world = Crossed(0, users=20, artists=6)
    both, of_users = world.estimates()
    hits, song = world.hits, world.song
    for row in range(50):
        of_song = world.draws.artists.weights[row][world.artist][song]
        by_song = (of_song * hits).sum() / of_song.sum()
        expected = np.clip(
            of_users.resampled[row] + by_song - hits.mean(), hits.mean(axis=1).min(), hits.mean(axis=1).max()
        )
        assert both.resampled[row] == pytest.approx(expected, abs=1e-6)
    assert both.value == of_users.value == pytest.approx(hits.mean())
    correlation = np.corrcoef(world.draws.users.weights[:, :6].ravel(), world.draws.artists.weights[:, :6].ravel())[
        0, 1
    ]
    assert abs(correlation) < 0.1, "users and artists are drawn independently"


def test_item_auc_is_resampled_over_users_and_artists():
    """With one song, only the users vary: the interval is as wide as that of an explicit bootstrap of users."""
    generator = np.random.default_rng(0)
    positive = np.arange(40) < 15
    scores = generator.normal(size=40) + positive
    marks = [sparse.csr_matrix(which[:, None]) for which in (positive, np.zeros(40, dtype=bool))]
    queries = ItemQueries(np.array([0]), sparse.csr_matrix((40, 1), dtype=bool), *marks, None)
    aucs, influence = item_auc(queries, lambda history, songs: scores[:, None])
    assert influence.sum() == pytest.approx(0)
    draws = bootstrap.draw_two_way([str(i) for i in range(40)], ["one"], 4000, 0)
    estimate = bootstrap.two_way_mean_of_songs(aucs, influence, draws)
    assert estimate.value == pytest.approx(roc_auc_score(positive, scores))
    naive = [
        roc_auc_score(positive, scores, sample_weight=weights)
        for weights in draws.users.weights[:400]
        if weights[positive].sum()
    ]
    assert estimate.resampled.std() == pytest.approx(np.std(naive), rel=0.15)


def test_a_difference_is_paired():
    """Two correlated metrics: each has a wide interval, their difference has not."""
    values = np.random.default_rng(0).normal(size=50)
    draws = bootstrap.draw([str(i) for i in range(50)], 500, seed=0)
    first, second = bootstrap.mean(values + 0.01, draws), bootstrap.mean(values, draws)
    assert first.interval[0] < second.interval[1]
    gain = bootstrap.difference(first, second)
    assert gain.interval == pytest.approx((0.01, 0.01), abs=1e-5)
    assert bootstrap.is_significant(gain)
    assert bootstrap.is_significant(bootstrap.difference(second, second)) is False
    other = bootstrap.mean(values, bootstrap.draw([f"u{i}" for i in range(50)], 500, seed=0))
    unpaired = bootstrap.difference(first, other)
    assert unpaired.interval is None
    assert bootstrap.is_significant(unpaired) is None


def test_draws_do_not_depend_on_the_order_of_units():
    names = [f"a{i}" for i in range(9)]
    values = np.arange(9.0)
    order = np.random.default_rng(0).permutation(9)
    straight = bootstrap.mean(values, bootstrap.draw(names, 100, seed=3))
    shuffled = bootstrap.mean(values[order], bootstrap.draw([names[i] for i in order], 100, seed=3))
    np.testing.assert_allclose(straight.resampled, shuffled.resampled)
    assert straight.population == shuffled.population
    assert straight.population != bootstrap.draw(names, 100, seed=4).population


def test_weight_of_a_group_is_the_mean_of_its_units():
    draws = Draws(np.array([[1, 3, 0], [0, 0, 2]], dtype=np.float32), "p").merge(np.array([0, 0, 1]), 2)
    assert draws.weights.tolist() == [[2, 0], [0, 2]]


def test_estimates_without_values_are_nan():
    draws = bootstrap.draw(["a", "b"], 100, seed=0)
    for empty in (bootstrap.mean(np.full(2, np.nan), draws), bootstrap.median(np.full(2, np.nan), draws)):
        assert np.isnan(empty.value)
        assert empty.interval is None
        assert empty.n == 0


def test_table_round_trip_preserves_metrics():
    draws = bootstrap.draw(["a", "b", "c"], 100, seed=0)
    methods = {
        "semantic": {"ndcg@10": bootstrap.mean(np.array([0.0, 0.5, 1.0]), draws)},
        "random": {"worst": Estimate(0.25, 3)},
    }
    estimate = estimates([TaskResult("cold", "cold songs", "users", "users", "random", methods)])
    again = from_table(to_table(estimate))
    assert again.keys() == estimate.keys()
    for key, item in estimate.items():
        assert (again[key].value, again[key].n, again[key].population) == (item.value, item.n, item.population)
        np.testing.assert_array_equal(again[key].resampled, item.resampled)
    assert from_table(to_table({})) == {}
