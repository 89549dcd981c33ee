"""Collaborative baselines, which know who listened to what and nothing of the sound: item-kNN and implicit ALS."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.tasks.scorers import Scorer

ITEM_NEIGHBORS = 100
ALS_REGULARIZATION, ALS_ITERATIONS, ALS_ALPHA = 10.0, 15, 10.0
ROWS = 128
"""Songs whose similarities to all others are held at once."""


def listening_matrix(songs: Songs, positives: pd.DataFrame) -> sparse.csr_matrix:
    """float32 [training users, catalogue]: 1 where the user has a training positive. `positives`: of
    `periods.training_positives`.
    """
    pairs = positives[["user_id", "song_id"]].drop_duplicates()
    number, users = pd.factorize(pairs["user_id"], sort=True)
    columns = pd.Index(songs.ids).get_indexer(pd.Index(pairs["song_id"]))
    return sparse.csr_matrix(
        (np.ones(len(pairs), dtype=np.float32), (number, columns)), shape=(len(users), len(songs.ids))
    )


def item_knn_scorer(listened: sparse.csr_matrix, neighbors: int = ITEM_NEIGHBORS) -> Scorer:
    """Sum over a user's songs of the cosine, over training users, to the candidate; of each song its nearest
    `neighbors` count.
    """
    norms = np.sqrt(listened.power(2).sum(axis=0).A1)
    scaled = (listened @ sparse.diags(1 / np.where(norms > 0, norms, 1))).astype(np.float32).tocsc()
    parts = [
        _nearest(scaled[:, start : start + ROWS].T.tocsr() @ scaled, start, neighbors)
        for start in range(0, scaled.shape[1], ROWS)
    ]
    similar = sparse.vstack(parts).tocsr()

    def score(history: sparse.csr_matrix, candidates: np.ndarray) -> np.ndarray:
        return (history.astype(np.float32) @ similar[:, candidates]).toarray()

    return score


def als_factors(users: int) -> int:
    """64, or one for every ten training users when they are few: more would memorise who heard what."""
    return min(64, max(4, users // 10))


def als_scorer(listened: sparse.csr_matrix, seed: int) -> Scorer | None:
    """Implicit ALS (Hu, Koren and Volinsky 2008); a user's factors are solved for from their history. None without
    `implicit`.
    """
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    with threadpool_limits(1, "blas"):  # it warns when BLAS has threads of its own
        model: Any = AlternatingLeastSquares(
            factors=als_factors(listened.shape[0]),
            regularization=ALS_REGULARIZATION,
            alpha=ALS_ALPHA,
            iterations=ALS_ITERATIONS,
            num_threads=1,
            random_state=seed,
        )
        model.fit(listened, show_progress=False)

    def score(history: sparse.csr_matrix, candidates: np.ndarray) -> np.ndarray:
        users = model.recalculate_user(np.arange(history.shape[0]), history.astype(np.float32))
        return users @ model.item_factors[candidates].T

    return score


def _nearest(cosines: sparse.csr_matrix, first: int, most: int) -> sparse.csr_matrix:
    """Of each row, song `first` + its number, the `most` highest cosines to other songs; of equal ones those of earlier
    songs.
    """
    found = cosines.tocoo()
    other = found.col != found.row + first
    rows, columns, values = found.row[other], found.col[other], found.data[other]
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    kept = np.arange(len(rows)) - np.searchsorted(rows, rows) < most
    return sparse.csr_matrix((values[kept], (rows[kept], columns[kept])), shape=found.shape)
