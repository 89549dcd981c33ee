"""ROC-AUC and average precision with weights: one ranking, and what it is worth under each resample of its songs."""

from __future__ import annotations

import numpy as np


def weighted_auc(scores: np.ndarray, relevant: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Probability that a relevant item scores above another, ties half, items drawn by weight; float64 [resamples].

    `scores`: float [items]; `relevant`: bool [items]; `weights`: float [resamples, items]. nan where either kind weighs nothing.
    """
    positives, negatives, starts = _by_falling_score(scores, relevant, weights)
    above = np.cumsum(positives, axis=1)
    tied = np.add.reduceat(positives, starts, axis=1)
    # A negative loses to the positives before its tie, and to half of those within.
    before = above[:, np.r_[starts[1:] - 1, len(scores) - 1]] - tied
    won = ((before + tied / 2) * np.add.reduceat(negatives, starts, axis=1)).sum(axis=1)
    return _ratio(won, positives.sum(axis=1) * negatives.sum(axis=1))


def weighted_average_precision(scores: np.ndarray, relevant: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Σ (recall gained at a score) · (precision down to it), as scikit-learn defines it; float64 [resamples]. Arguments as above."""
    positives, negatives, starts = _by_falling_score(scores, relevant, weights)
    gained = np.add.reduceat(positives, starts, axis=1)
    found = np.cumsum(gained, axis=1)
    listed = found + np.cumsum(np.add.reduceat(negatives, starts, axis=1), axis=1)
    precision = np.divide(found, listed, out=np.zeros_like(found), where=listed > 0)
    return _ratio((gained * precision).sum(axis=1), positives.sum(axis=1))


def _by_falling_score(scores: np.ndarray, relevant: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Weights of relevant and other items in order of falling score, and where each tie begins."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    sorted_weights = weights[:, order].astype(np.float64)
    return sorted_weights * relevant[order], sorted_weights * ~relevant[order], starts


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)
