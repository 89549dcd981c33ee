"""What stands beside the model so that a recommendation figure can be believed: controls, and methods that need no encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from threadpoolctl import threadpool_limits

from htcl_ray.evaluation.periods import training_positives
from htcl_ray.evaluation.songs import Songs
from htcl_ray.schemas import Split
from htcl_ray.settings import EvaluateSettings

SHUFFLES = 3
"""Permutations that the shuffled control is averaged over."""
ITEM_NEIGHBORS = 100
ALS_REGULARIZATION, ALS_ITERATIONS, ALS_ALPHA = 0.05, 15, 10.0

Scorer = Callable[[Sequence[np.ndarray], np.ndarray], np.ndarray]
"""Histories of some users and candidate songs, as catalogue rows → float [users, candidates]; higher is better."""


def vector_scorer(vectors: np.ndarray) -> Scorer:
    """Inner product of a user's unit-norm mean vector with a song's; `vectors`: [catalogue, dim]."""
    return lambda histories, candidates: user_vectors(vectors, histories) @ vectors[candidates].T


def blended_scorer(first: Scorer, second: Scorer, blend: float) -> Scorer:
    """(1 − blend) · first + blend · second, as the index blends."""
    return lambda histories, candidates: (1 - blend) * first(histories, candidates) + blend * second(histories, candidates)


def user_vectors(vectors: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
    """[users, dim]: the mean of the vectors of a user's songs, scaled to unit norm (zero stays zero)."""
    means = np.stack([vectors[rows].mean(axis=0) for rows in history])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(norms > 0, norms, 1)


def shared_scorer(of_song: np.ndarray) -> Scorer:
    """The same scores for every user; `of_song`: [catalogue]."""
    return lambda histories, candidates: np.broadcast_to(of_song[candidates], (len(histories), len(candidates)))


def shuffled_scorers(vectors: np.ndarray, seed: int) -> list[Scorer]:
    """`vectors` [catalogue, dim] dealt out to the wrong songs: the same geometry, without its meaning."""
    generator = np.random.default_rng(seed)
    return [vector_scorer(vectors[generator.permutation(len(vectors))]) for _ in range(SHUFFLES)]


def baselines(
    songs: Songs, events: pd.DataFrame, settings: EvaluateSettings, *, hot: bool
) -> tuple[dict[str, list[Scorer]], dict[str, int]]:
    """Scorers of the controls and baselines by name, and what could not be had, for the task's counts.

    random      all tied, so that the metrics are their exact expectation over random orders
    popularity  training positives of the song; of a cold song, which has none, those of its genre per training song
    log_mel     raw log-mel statistics as vectors;  genre  genre labels as vectors
    item_knn, als (hot songs)  collaborative: they see training users and no sound
    """
    positives = training_positives(songs, events, settings.split)
    plays = positives["song_id"].value_counts().reindex(songs.ids, fill_value=0).to_numpy(dtype=np.float64)
    popular = plays if hot else genre_popularity(songs, plays)
    scorers = {
        "random": shared_scorer(np.zeros(len(songs.ids))),
        "popularity": shared_scorer(popular),
        "log_mel": vector_scorer(songs.log_mel),
        "genre": vector_scorer(genre_vectors(songs)),
    }
    missing = {}
    if hot:
        listened = listening_matrix(songs, positives)
        scorers["item_knn"] = item_knn_scorer(listened)
        als = als_scorer(listened, settings.seed)
        if als is None:
            missing["als_not_installed"] = 1
        else:
            scorers["als"] = als
    return {name: [scorer] for name, scorer in scorers.items()}, missing


def genre_popularity(songs: Songs, plays: np.ndarray) -> np.ndarray:
    """Float64 [catalogue]: mean of `plays` over the training songs of the song's (first) genre.

    Songs without a genre form a class of their own; a genre without training songs has 0.
    """
    frame = pd.DataFrame({"genre": [genre or "" for genre in songs.labels("genre")], "plays": plays})
    rate = frame[songs.splits == Split.TRAIN].groupby("genre")["plays"].mean()
    return frame["genre"].map(rate).fillna(0.0).to_numpy(dtype=np.float64)


def genre_vectors(songs: Songs) -> np.ndarray:
    """float32 [catalogue, genres], unit norm: which genres a song has; zero for none."""
    values = songs.values("genre")
    place = {genre: number for number, genre in enumerate(sorted({genre for genres in values for genre in genres}))}
    found = np.zeros((len(values), max(1, len(place))), dtype=np.float32)
    for row, genres in enumerate(values):
        found[row, [place[genre] for genre in genres]] = 1
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(norms > 0, norms, 1)


def listening_matrix(songs: Songs, positives: pd.DataFrame) -> sparse.csr_matrix:
    """float32 [training users, catalogue]: 1 where the user has a training positive."""
    row_of = {song: row for row, song in enumerate(songs.ids)}
    pairs = positives[["user_id", "song_id"]].drop_duplicates()
    users = np.unique(pairs["user_id"].to_numpy(dtype=str), return_inverse=True)[1]
    columns = pairs["song_id"].map(row_of).to_numpy(dtype=np.int64)
    shape = (int(users.max()) + 1 if len(users) else 0, len(songs.ids))
    return sparse.csr_matrix((np.ones(len(pairs), dtype=np.float32), (users, columns)), shape=shape)


def item_knn_scorer(listened: sparse.csr_matrix, neighbors: int = ITEM_NEIGHBORS) -> Scorer:
    """Sum over a user's songs of the cosine, over training users, to the candidate; of each song its nearest `neighbors` count."""
    norms = np.sqrt(np.asarray(listened.power(2).sum(axis=0))).ravel()
    scaled = (listened @ sparse.diags(1 / np.where(norms > 0, norms, 1))).tocsc()
    rows = []
    for start in range(0, scaled.shape[1], 1024):
        block = (scaled[:, start : start + 1024].T @ scaled).tolil()
        block.setdiag(0, k=start)
        block = block.tocsr()
        block.eliminate_zeros()
        rows.append(sparse.vstack([_largest(block[row], neighbors) for row in range(block.shape[0])]))
    similar = sparse.vstack(rows).tocsr()

    def score(histories: Sequence[np.ndarray], candidates: np.ndarray) -> np.ndarray:
        return (_multi_hot(histories, similar.shape[0]) @ similar[:, candidates]).toarray()

    return score


def als_factors(users: int) -> int:
    """64, or one for every ten training users when they are few: more would memorise who heard what."""
    return min(64, max(4, users // 10))


def als_scorer(listened: sparse.csr_matrix, seed: int) -> Scorer | None:
    """Implicit ALS (Hu, Koren and Volinsky 2008); a user's factors are solved for from their history. None without `implicit`."""
    try:
        from implicit.cpu.als import AlternatingLeastSquares
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

    def score(histories: Sequence[np.ndarray], candidates: np.ndarray) -> np.ndarray:
        users = model.recalculate_user(np.arange(len(histories)), _multi_hot(histories, listened.shape[1]))
        return users @ model.item_factors[candidates].T

    return score


def _multi_hot(histories: Sequence[np.ndarray], songs: int) -> sparse.csr_matrix:
    starts = np.cumsum([0, *map(len, histories)])
    columns = np.concatenate(histories) if len(histories) else np.empty(0, dtype=np.int64)
    return sparse.csr_matrix((np.ones(len(columns), dtype=np.float32), columns, starts), shape=(len(histories), songs))


def _largest(row: sparse.csr_matrix, most: int) -> sparse.csr_matrix:
    if row.nnz <= most:
        return row
    kept = np.argpartition(row.data, -most)[-most:]
    return sparse.csr_matrix((row.data[kept], (np.zeros(most, dtype=np.int64), row.indices[kept])), shape=row.shape)
