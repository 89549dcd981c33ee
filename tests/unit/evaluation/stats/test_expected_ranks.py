"""Expectations over the orders of tied candidates, against all orders written out and against scikit-learn's tie
averaging."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import ndcg_score

from htcl_ray.evaluation import metrics
from htcl_ray.evaluation.metrics import expected_metrics, query_metrics
from htcl_ray.evaluation.stats.expected_ranks import first_hit_distribution

pytestmark = pytest.mark.unit

KS = (1, 2, 3, 5, 9)


def one_query(scores: np.ndarray, relevant: np.ndarray, ks: tuple[int, ...]) -> dict[str, float]:
    return {name: float(values[0]) for name, values in expected_metrics(scores[None], relevant[None], ks).items()}


def all_orders(scores: np.ndarray) -> list[list[int]]:
    """Every order that sorts the scores."""
    groups = [np.flatnonzero(scores == value).tolist() for value in sorted(set(scores.tolist()), reverse=True)]
    return [
        list(itertools.chain(*parts))
        for parts in itertools.product(*(itertools.permutations(group) for group in groups))
    ]


@pytest.mark.parametrize("seed", range(12))
def test_metrics_equal_the_mean_over_all_orders(seed: int):
    generator = np.random.default_rng(seed)
    scores = generator.integers(0, 3, 7).astype(float)
    relevant = np.zeros(7, dtype=bool)
    relevant[generator.choice(7, generator.integers(1, 6), replace=False)] = True
    orders = all_orders(scores)
    wanted = [set(np.flatnonzero(relevant).tolist())] * len(orders)
    actual = one_query(scores, relevant, KS)
    for k in KS:
        assert actual[f"recall@{k}"] == pytest.approx(metrics.recall_at_k(orders, wanted, k).mean())
        assert actual[f"hit_rate@{k}"] == pytest.approx(metrics.hit_rate_at_k(orders, wanted, k).mean())
        assert actual[f"ndcg@{k}"] == pytest.approx(metrics.ndcg_at_k(orders, wanted, k).mean())
        assert actual[f"ndcg@{k}"] == pytest.approx(ndcg_score([relevant], [scores], k=k))
    assert actual["mrr"] == pytest.approx(metrics.mrr(orders, wanted).mean())
    assert actual["user_auc"] == pytest.approx(metrics.auc([scores], [relevant])[0])


def test_metrics_without_ties_equal_those_of_the_sorted_list():
    generator = np.random.default_rng(0)
    scores, relevant = generator.permutation(40).astype(float), generator.random(40) < 0.2
    order, wanted = [np.argsort(-scores)], [set(np.flatnonzero(relevant).tolist())]
    actual = one_query(scores, relevant, KS)
    for k in KS:
        assert actual[f"ndcg@{k}"] == pytest.approx(metrics.ndcg_at_k(order, wanted, k)[0])
        assert actual[f"hit_rate@{k}"] == metrics.hit_rate_at_k(order, wanted, k)[0]
    assert actual["mrr"] == pytest.approx(metrics.mrr(order, wanted)[0])


def test_equal_scores_are_a_random_order():
    relevant = np.arange(200) < 6
    actual = one_query(np.zeros(200), relevant, (10,))
    assert actual["user_auc"] == 0.5
    assert actual["recall@10"] == pytest.approx(10 / 200)
    assert actual["hit_rate@10"] == pytest.approx(1 - np.prod([(194 - i) / (200 - i) for i in range(10)]))


def test_queries_without_relevant_candidate_are_nan_and_nan_scores_are_refused():
    assert all(np.isnan(value) for value in one_query(np.arange(3.0), np.zeros(3, dtype=bool), (1, 5)).values())
    assert all(np.isnan(value) for value in one_query(np.empty(0), np.empty(0, dtype=bool), (1,)).values())
    with pytest.raises(ValueError, match="not finite"):
        one_query(np.array([0.1, np.nan]), np.array([True, False]), (1,))


@pytest.mark.parametrize(("size", "hits"), [(1, 1), (5, 1), (5, 5), (6, 2), (40, 7)])
def test_first_hit_distribution(size: int, hits: int):
    distribution = first_hit_distribution(size, hits)
    assert distribution.sum() == pytest.approx(1)
    assert (distribution * np.arange(1, size + 1)).sum() == pytest.approx(
        (size + 1) / (hits + 1)
    )  # mean of the first order statistic
    assert (distribution >= 0).all()


def test_queries_of_a_batch_are_independent():
    generator = np.random.default_rng(0)
    scores = generator.integers(0, 6, (40, 25)).astype(np.float32)
    candidate, relevant = generator.random((40, 25)) < 0.7, generator.random((40, 25)) < 0.15
    relevant[3], candidate[4] = False, relevant[4]
    scores[~candidate] = np.nan  # ignored
    together = expected_metrics(scores, relevant & candidate, KS, candidate)
    for query in range(40):
        own = candidate[query]
        alone = one_query(scores[query, own], relevant[query, own], KS)
        assert {name: values[query] for name, values in together.items()} == pytest.approx(alone, nan_ok=True)
    assert np.isnan(together["ndcg@5"][3])
    assert together["ndcg@5"][4] == pytest.approx(1)
    assert np.isnan(together["user_auc"][4])


def test_attribution_to_items_sums_to_the_values():
    """An item's gain, written out from the order of a list: without ties, and in sum with ties too."""
    generator = np.random.default_rng(0)
    scores = np.stack([generator.permutation(30) for _ in range(20)]).astype(float)
    relevant = generator.random((20, 30)) < 0.15
    attributed = query_metrics(scores, relevant, (5,))
    ranks = 1 + (scores[:, None, :] > scores[:, :, None]).sum(axis=2)
    gain = {name: np.zeros(30) for name in ("recall@5", "ndcg@5", "user_auc", "hit_rate@5")}
    mass = np.zeros(30)
    for query in np.flatnonzero(relevant.any(axis=1)):
        own, others = np.flatnonzero(relevant[query]), np.flatnonzero(~relevant[query])
        hits = (ranks[query, own] <= 5).sum()
        ideal = sum(1 / np.log2(1 + place) for place in range(1, min(5, len(own)) + 1))
        for item in own:
            rank = ranks[query, item]
            mass[item] += 1 / len(own)
            gain["recall@5"][item] += (rank <= 5) / len(own)
            gain["ndcg@5"][item] += (rank <= 5) / np.log2(1 + rank) / ideal
            gain["user_auc"][item] += (scores[query, others] < scores[query, item]).mean() / len(own)
            gain["hit_rate@5"][item] += (rank <= 5) / max(hits, 1)
    for name, expected in gain.items():
        np.testing.assert_allclose(attributed[name].gain, expected, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(attributed[name].mass, mass, err_msg=name)
    tied = query_metrics(generator.integers(0, 4, (20, 30)).astype(float), relevant, (1, 5, 30))
    for name, metric in tied.items():
        assert metric.gain.sum() == pytest.approx(np.nansum(metric.values)), name
        assert metric.gain.min() >= 0, name
        assert not metric.gain[~relevant.any(axis=0)].any(), name
