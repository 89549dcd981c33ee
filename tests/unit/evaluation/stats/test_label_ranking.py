"""ROC-AUC and average precision against scikit-learn's, with ties, on the whole and on each resample."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from htcl_ray.evaluation.stats import bootstrap, label_ranking

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_weighted_metrics_match_scikit_learn(decimals: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(label_ranking, "CELLS", 150)  # several chunks of resamples
    generator = np.random.default_rng(decimals)
    scores, truth = generator.normal(size=60).round(decimals), generator.random(60) < 0.3
    weights = generator.integers(0, 4, size=(60, 20)).astype(np.float32)
    weights[:, 1] = generator.random(60)
    auc, precision = label_ranking.auc_and_precision(scores, truth, weights)
    for column in range(20):
        drawn = weights[:, column]
        assert auc[column] == pytest.approx(roc_auc_score(truth, scores, sample_weight=drawn), abs=1e-6)
        assert precision[column] == pytest.approx(average_precision_score(truth, scores, sample_weight=drawn), abs=1e-6)


def test_resamples_without_positives_or_negatives_have_no_auc():
    weights = np.array([[1, 0, 1], [1, 0, 0], [1, 1, 0]], dtype=np.float32)
    auc, precision = label_ranking.auc_and_precision(np.array([3.0, 2.0, 1.0]), np.array([True, True, False]), weights)
    np.testing.assert_array_equal(auc, [1, np.nan, np.nan])
    np.testing.assert_array_equal(precision, [1, np.nan, 1])


def test_macro_metrics_are_means_over_labels_and_resamples_repeat_songs():
    generator = np.random.default_rng(0)
    artists = [f"a{i % 12}" for i in range(80)]
    scores = generator.normal(size=(80, 4))
    truth = scores + 2 * generator.normal(size=(80, 4)) > 0.5
    draws = bootstrap.draw(artists, 100, seed=1)
    metrics = label_ranking.macro_metrics(scores, truth, draws)
    assert metrics["roc_auc"].value == pytest.approx(roc_auc_score(truth, scores, average="macro"))
    assert metrics["map"].value == pytest.approx(average_precision_score(truth, scores, average="macro"))
    assert metrics["map"].n == 80
    for row in (0, 50):
        drawn = np.repeat(np.arange(80), draws.weights[row].astype(int))
        assert metrics["roc_auc"].resampled[row] == pytest.approx(
            roc_auc_score(truth[drawn], scores[drawn], average="macro"), abs=1e-6
        )
        assert metrics["map"].resampled[row] == pytest.approx(
            average_precision_score(truth[drawn], scores[drawn], average="macro"), abs=1e-6
        )


def test_constant_scores_have_chance_auc_and_precision():
    truth = np.array([[True], [False], [False], [False]])
    metrics = label_ranking.macro_metrics(np.zeros((4, 1)), truth, bootstrap.draw(list("abcd"), 100, seed=0))
    assert (metrics["roc_auc"].value, metrics["map"].value) == (0.5, 0.25)
    assert metrics["roc_auc"].interval == (0.5, 0.5)
