"""Ranking metrics against hand-computed cases, a naive reference and scikit-learn."""

from __future__ import annotations

import math
from typing import get_args

import numpy as np
import pytest
from sklearn.metrics import ndcg_score, roc_auc_score

from htcl_ray.config.sections.training import BestMetric
from htcl_ray.evaluation import metrics

pytestmark = pytest.mark.unit

RANKED = [["a", "b", "c", "d"], ["a", "b", "c", "d"], ["d", "c"], ["a", "b"], []]
RELEVANT = [{"b", "d"}, {"x"}, {"d", "c", "y"}, set(), {"a"}]


def naive(ranked: list, relevant: set, k: int) -> dict[str, float]:
    """The definitions, word by word."""
    if not relevant:
        return dict.fromkeys(("recall", "hit", "ndcg", "mrr"), math.nan)
    hits = [position for position, item in enumerate(ranked, 1) if item in relevant]
    ideal = sum(1 / math.log2(position + 1) for position in range(1, min(k, len(relevant)) + 1))
    return {
        "recall": sum(position <= k for position in hits) / len(relevant),
        "hit": float(any(position <= k for position in hits)),
        "ndcg": sum(1 / math.log2(position + 1) for position in hits if position <= k) / ideal,
        "mrr": 1 / hits[0] if hits else 0.0,
    }


def test_metrics_equal_hand_computed_values():
    nan = math.nan
    np.testing.assert_allclose(metrics.recall_at_k(RANKED, RELEVANT, 2), [1 / 2, 0, 2 / 3, nan, 0])
    np.testing.assert_allclose(metrics.recall_at_k(RANKED, RELEVANT, 100), [1, 0, 2 / 3, nan, 0])
    np.testing.assert_allclose(metrics.hit_rate_at_k(RANKED, RELEVANT, 1), [0, 0, 1, nan, 0])
    np.testing.assert_allclose(metrics.mrr(RANKED, RELEVANT), [1 / 2, 0, 1, nan, 0])
    np.testing.assert_allclose(metrics.first_rank(RANKED, RELEVANT), [2, math.inf, 1, nan, math.inf])
    # b at position 2 and d at position 4 of the ideal positions 1 and 2
    first = (1 / math.log2(3) + 1 / math.log2(5)) / (1 + 1 / math.log2(3))
    # the third relevant id is not listed, but the best list would have it
    third = (1 + 1 / math.log2(3)) / (1 + 1 / math.log2(3) + 1 / 2)
    np.testing.assert_allclose(metrics.ndcg_at_k(RANKED, RELEVANT, 4), [first, 0, third, nan, 0])
    np.testing.assert_allclose(
        metrics.ndcg_at_k(RANKED, RELEVANT, 2), [1 / math.log2(3) / (1 + 1 / math.log2(3)), 0, 1, nan, 0]
    )
    assert metrics.median_rank(RANKED[:4], RELEVANT[:4]) == 2
    assert math.isnan(metrics.median_rank([["a"]], [set()]))


def test_metrics_equal_a_naive_reference_and_scikit_learn():
    generator = np.random.default_rng(0)
    ranked, relevant, truth, scores = [], [], [], []
    for _ in range(200):
        order = generator.permutation(30)
        wanted = set(generator.choice(30, generator.integers(0, 12), replace=False).tolist())
        ranked.append(order)
        relevant.append(wanted)
        truth.append([item in wanted for item in range(30)])
        scores.append(-np.argsort(order).astype(float))
    for k in (1, 3, 10, 30, 99):
        expected = [naive(row.tolist(), wanted, k) for row, wanted in zip(ranked, relevant, strict=True)]
        for name, function in (
            ("recall", metrics.recall_at_k),
            ("hit", metrics.hit_rate_at_k),
            ("ndcg", metrics.ndcg_at_k),
        ):
            np.testing.assert_allclose(function(ranked, relevant, k), [row[name] for row in expected])
        np.testing.assert_allclose(metrics.mrr(ranked, relevant), [row["mrr"] for row in expected])
        actual = metrics.ndcg_at_k(ranked, relevant, k)
        peers = [
            ndcg_score([row], [score], k=k) if any(row) else np.nan for row, score in zip(truth, scores, strict=True)
        ]
        np.testing.assert_allclose(actual, peers)


def test_auc_equals_scikit_learn_with_ties():
    generator = np.random.default_rng(1)
    scores = generator.integers(0, 5, (50, 20)).astype(float)
    relevant = generator.random((50, 20)) < 0.3
    relevant[0], relevant[1] = False, True
    actual = metrics.auc(scores, relevant)
    assert np.isnan(actual[:2]).all()
    np.testing.assert_allclose(actual[2:], [roc_auc_score(r, s) for s, r in zip(scores[2:], relevant[2:], strict=True)])
    assert metrics.auc([[0.9, 0.1], [0.5, 0.5]], [[True, False], [True, False]]).tolist() == [1.0, 0.5]


def test_result_is_one_float_per_query():
    for result in (
        metrics.recall_at_k(RANKED, RELEVANT, 1),
        metrics.ndcg_at_k(RANKED, RELEVANT, 1),
        metrics.mrr(RANKED, RELEVANT),
    ):
        assert result.shape == (5,)
        assert result.dtype == np.float64
    assert metrics.ndcg_at_k([], [], 3).shape == (0,)


def test_a_repeated_id_counts_once():
    assert metrics.recall_at_k([["a", "a", "b"]], [{"a", "b"}], 2).tolist() == [0.5]
    assert metrics.ndcg_at_k([["a", "a"]], [{"a", "b"}], 2) < 1


def test_wrong_use_is_refused():
    with pytest.raises(ValueError, match="k is 0"):
        metrics.recall_at_k(RANKED, RELEVANT, 0)
    with pytest.raises(ValueError, match="5 rankings and 1 relevant sets"):
        metrics.ndcg_at_k(RANKED, [{"a"}], 3)
    with pytest.raises(ValueError, match="shape"):
        metrics.auc([[0.1, 0.2]], [[True]])


def test_every_metric_of_training_has_a_record_with_its_direction():
    lower = {name for name in get_args(BestMetric) if metrics.lower_is_better(name)}
    assert lower == {"loss", "validation_median_rank", "validation_pair_median_rank"}
    for name in get_args(BestMetric):
        assert name.partition("@")[0].removeprefix("validation_").removeprefix("pair_") in metrics.METRICS


def test_labels_name_the_metric_the_probe_and_k():
    names = ["ndcg@10", "knn_accuracy", "map_folds", "knn_roc_auc_folds", "popularity_lift@5", "unknown_name"]
    assert [metrics.metric_label(name) for name in names] == [
        "NDCG@10",
        "kNN accuracy",
        "mAP, folds",
        "kNN ROC-AUC, folds",
        "popularity lift@5",
        "unknown name",
    ]


def test_primary_metrics_are_headlines_for_which_higher_is_better():
    judging = [metric for metric in metrics.METRICS.values() if metric.judges is not None]
    assert all(metric.headline and not metric.lower_is_better for metric in judging)
    assert len({metric.judges for metric in judging}) == len(judging)
