"""ROC-AUC and average precision of label scores, with their resamples.

Definitions are those of scikit-learn's `roc_auc_score` and `average_precision_score` with the draws as sample weights;
all resamples are computed at once. Tied songs enter a ranking together: for the AUC each such pair counts half.
"""

from __future__ import annotations

import numpy as np

from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate

CELLS = 2**22
"""Weights that are sorted and summed at once: 16 MiB of fp32."""


def auc_and_precision(scores: np.ndarray, truth: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ROC-AUC and average precision, both float64 [resamples], in [0, 1].

    `scores`: float [songs], higher is likelier; `truth`: bool [songs]; `weights`: float32 [songs, resamples], at least
    0. The AUC of a resample without a positive or without a negative song is nan, and so is the average precision of
    one without a positive song.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    positives = np.flatnonzero(truth[order])
    tie_of_positive = np.searchsorted(starts, positives, side="right") - 1
    ties, first_positive = np.unique(tie_of_positive, return_index=True)  # tied groups with a positive song
    ends = np.r_[starts[1:], len(ordered)][ties] - 1
    auc, precision = np.full((2, weights.shape[1]), np.nan)
    step = max(1, CELLS // max(1, len(scores)))
    for start in range(0, weights.shape[1] if len(positives) else 0, step):
        columns = slice(start, start + step)
        drawn = weights[order, columns]
        hits = np.add.reduceat(drawn[positives], first_positive, axis=0).astype(np.float64)
        passed = np.cumsum(drawn, axis=0, out=drawn)[ends].astype(np.float64)
        passed_before = np.where(starts[ties, None] > 0, drawn[starts[ties] - 1], 0)
        true_positives = np.cumsum(hits, axis=0)
        misses_above = passed_before - (true_positives - hits)
        misses = passed - true_positives
        all_misses = drawn[-1] - true_positives[-1]
        pairs = true_positives[-1] * all_misses
        won = (hits * (all_misses - (misses_above + misses) / 2)).sum(axis=0)
        np.divide(won, pairs, out=auc[columns], where=pairs > 0)
        summed = np.divide(hits * true_positives, passed, out=np.zeros_like(hits), where=passed > 0).sum(axis=0)
        np.divide(summed, true_positives[-1], out=precision[columns], where=true_positives[-1] > 0)
    return auc, precision


def macro_metrics(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> dict[str, Estimate]:
    """`roc_auc` and `map` (mean average precision), averaged over labels.

    In a resample, labels without a value are left out of the mean. `scores`: float [songs, labels]; `truth`: bool
    [songs, labels], each label with a positive and a negative song; `draws` of the songs.
    """
    once = np.ones((len(scores), 1), dtype=np.float32)
    both = np.concatenate([once, draws.weights.T], axis=1)
    per_label = np.array(
        [auc_and_precision(scores[:, label], truth[:, label], both) for label in range(truth.shape[1])]
    )
    known = ~np.isnan(per_label)
    count = known.sum(axis=0)
    means = np.divide(
        np.where(known, per_label, 0).sum(axis=0), count, out=np.full(count.shape, np.nan), where=count > 0
    )
    return {
        name: Estimate(float(row[0]), len(scores), row[1:].astype(np.float32), draws.population)
        for name, row in zip(("roc_auc", "map"), means, strict=True)
    }
