"""Measures of collapsed vectors: their mean cosine, and their effective rank."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def mean_cosine(vectors: NDArray[np.floating]) -> float:
    """Mean cosine between different rows of [n, d], n at least 2; 1 when all have the same direction."""
    unit = _unit(vectors)
    count = len(unit)
    return float((np.square(unit.sum(axis=0)).sum() - np.square(unit).sum()) / (count * (count - 1)))


def effective_rank(vectors: NDArray[np.floating]) -> float:
    """Exponential of the entropy of the singular values of the centred unit vectors, from 1 to min(n − 1, d).

    `vectors`: [n, d]. Roy and Vetterli, "The effective rank", 2007. Vectors that are all equal have rank 1.
    """
    unit = _unit(vectors)
    values = np.linalg.svd(unit - unit.mean(axis=0), compute_uv=False)
    if values.sum() <= 1e-9 * len(unit):
        return 1.0
    share = values[values > 0] / values.sum()
    return float(np.exp(-(share * np.log(share)).sum()))


def _unit(vectors: NDArray[np.floating]) -> NDArray[np.float64]:
    """Scale rows to unit norm in double precision; a row of zeros stays zero."""
    wide = np.asarray(vectors, dtype=np.float64)
    scaled: NDArray[np.float64] = wide / np.maximum(np.linalg.norm(wide, axis=1, keepdims=True), 1e-12)
    return scaled
