"""Several songs as one query: seeds with negatives, and what a listener heard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from htcl_ray.errors import QueryError
from htcl_ray.index.vectors import Vectors, concatenate, unit_norm

NEGATIVE_WEIGHT = 0.5
DAY_SECONDS = 86_400.0
HALF_LIFE_DAYS = 30.0


@dataclass(frozen=True)
class Heard:
    """A song of a listener's history. `weight`: how much it was liked, below 0 disliked; `timestamp`: epoch seconds."""

    song_id: str
    weight: float = 1.0
    timestamp: float | None = None


def rocchio(seeds: Vectors, negatives: Vectors | None) -> Vectors:
    """One row: the direction of mean of the seeds - 0.5 · mean of the negatives, in each space (Rocchio 1971)."""
    weights = np.full(len(seeds), 1 / len(seeds))
    if negatives is None or not len(negatives):
        return _direction(seeds, weights)
    away = np.full(len(negatives), -NEGATIVE_WEIGHT / len(negatives))
    return _direction(concatenate([seeds, negatives]), np.concatenate([weights, away]))


def decayed_weights(history: Sequence[Heard], half_life_days: float) -> NDArray[np.float64]:
    """Weight · 2^(-age / half life) for each song. Age counts from the newest timestamp of the history; a song without
    one does not age.
    """
    times = np.array([np.nan if heard.timestamp is None else heard.timestamp for heard in history], dtype=np.float64)
    newest = np.nanmax(times) if not np.isnan(times).all() else 0.0
    ages = np.nan_to_num((newest - times) / DAY_SECONDS, nan=0.0)
    with np.errstate(under="ignore"):
        return np.array([heard.weight for heard in history]) * np.exp2(-ages / half_life_days)


def profile(vectors: Vectors, weights: NDArray[np.float64]) -> Vectors:
    """One row: the direction of the weighted sum of the songs. Raises QueryError when nothing has weight."""
    largest = np.abs(weights).max(initial=0.0)
    if not largest > 0:
        raise QueryError("no song of the history has weight; expected one whose weight is not 0")
    return _direction(vectors, weights / largest)


def _direction(vectors: Vectors, weights: NDArray[np.float64]) -> Vectors:
    """One row of unit norm: that of the weighted sum, in each space. Raises QueryError when the songs cancel out."""
    semantic = weights @ vectors.semantic.astype(np.float64)
    preference = None if vectors.preference is None else weights @ vectors.preference.astype(np.float64)
    return Vectors(unit_norm(semantic[None]), None if preference is None else unit_norm(preference[None]))
