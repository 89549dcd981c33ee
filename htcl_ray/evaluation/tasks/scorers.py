"""Scorers of recommendation tasks: the model's vectors, controls, and baselines that need no model.

A scorer takes the history of each user and returns a score for each candidate. The collaborative baselines, item-kNN
and implicit ALS, see the events of training users and no audio.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.task_result import ORACLE
from htcl_ray.evaluation.tasks.recommendation_queries import training_positives
from htcl_ray.schemas import Split

PERMUTATIONS = 3
"""Permutations that the shuffled control is averaged over."""
ITEM_NEIGHBORS = 100
ALS_REGULARIZATION, ALS_ITERATIONS, ALS_ALPHA = 10.0, 15, 10.0
ROWS = 128
"""Songs whose similarities to all others are held at once."""

Scorer = Callable[[sparse.csr_matrix, np.ndarray], np.ndarray]
"""(histories, bool [users, catalogue]; candidates, catalogue rows) → float [users, candidates]; higher is better."""


def vector_scorer(vectors: np.ndarray) -> Scorer:
    """Inner product of the user vector (see `user_vectors`) with the song's; `vectors`: [catalogue, dim]."""
    return lambda history, candidates: user_vectors(vectors, history) @ vectors[candidates].T


def user_vectors(vectors: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
    """Mean of the vectors of each user's history, scaled to unit norm (zero stays zero); [users, dim]."""
    sums = history @ vectors
    return _unit_norm(sums)


def artist_mean_scorer(songs: EvaluatedSongs, vectors: np.ndarray) -> Scorer:
    """Inner product of the user vector of `vectors` [catalogue, dim] with the `artist_means` of the song."""
    means = artist_means(songs, vectors)
    return lambda history, candidates: user_vectors(vectors, history) @ means[candidates].T


def blended_scorer(first: Scorer, second: Scorer, blend: float) -> Scorer:
    """(1 − blend) · first + blend · second, as the index blends."""
    return lambda history, candidates: (1 - blend) * first(history, candidates) + blend * second(history, candidates)


def shared_scorer(song_scores: np.ndarray) -> Scorer:
    """The same scores for every user; `song_scores`: [catalogue]."""
    return lambda history, candidates: np.broadcast_to(song_scores[candidates], (history.shape[0], len(candidates)))


def shuffled_scorers(vectors: np.ndarray, times: int, seed: int) -> list[Scorer]:
    """Scorers of `vectors` [catalogue, dim] randomly permuted across songs, `times` of them."""
    generator = np.random.default_rng(seed)
    return [vector_scorer(vectors[generator.permutation(len(vectors))]) for _ in range(times)]


def baseline_scorers(
    songs: EvaluatedSongs, events: pd.DataFrame, settings: EvaluateSettings, *, hot: bool
) -> tuple[dict[str, list[Scorer]], dict[str, int]]:
    """Scorers of the controls and baselines by name, and counts of what they lack.

    random      all candidates tied, so that metrics are exact expectations over random orders
    popularity  training positives of the song; for cold-start songs, which have none, those of its genre per song
    shuffled    the vectors of the model's last stage, randomly permuted across songs
    log_mel     raw log-mel statistics as vectors;  genre  genre labels as vectors
    artist_mean for cold-start songs: the mean vector of the last stage over the artist's training songs, or else over
                those of the genre, in place of the song's own
    oracle      the true traits as vectors, where they are known: an upper bound, no baseline
    item_knn, als  collaborative filtering, for hot songs
    """
    positives = training_positives(songs, events, settings.split)
    plays = positives["song_id"].value_counts().reindex(songs.ids, fill_value=0).to_numpy(dtype=np.float64)
    last = songs.spaces.get("preference", songs.spaces["semantic"])
    scorers = {
        "random": [shared_scorer(np.zeros(len(songs.ids)))],
        "popularity": [shared_scorer(plays if hot else genre_popularity(songs, plays))],
        "shuffled": shuffled_scorers(last, PERMUTATIONS, settings.seed),
        "log_mel": [vector_scorer(songs.log_mel)],
        "genre": [vector_scorer(genre_vectors(songs))],
    }
    counts = {}
    if not hot:
        scorers["artist_mean"] = [artist_mean_scorer(songs, last)]
        counts["songs_of_known_artists"] = int((of_known_artists(songs) & (songs.splits == settings.split)).sum())
    if songs.oracle is not None:
        scorers[ORACLE] = [vector_scorer(songs.oracle)]
    if hot:
        interactions = interaction_matrix(songs, positives)
        scorers["item_knn"] = [item_knn_scorer(interactions)]
        als = als_scorer(interactions, settings.seed)
        if als is None:
            counts["als_missing"] = 1
        else:
            scorers["als"] = [als]
    return scorers, counts


def genre_popularity(songs: EvaluatedSongs, plays: np.ndarray) -> np.ndarray:
    """Mean of `plays` over the training songs of each song's (first) genre; float64 [catalogue].

    Songs without a genre form a class of their own; a genre without training songs has 0.
    """
    frame = pd.DataFrame({"genre": [genre or "" for genre in songs.labels("genre")], "plays": plays})
    rate = frame[songs.splits == Split.TRAIN].groupby("genre")["plays"].mean()
    return frame["genre"].map(rate).fillna(0.0).to_numpy(dtype=np.float64)


def artist_means(songs: EvaluatedSongs, vectors: np.ndarray) -> np.ndarray:
    """Mean of `vectors` [catalogue, dim] over the training songs of each song's artist group, of unit norm.

    Without such songs, as always in a split by artist: over the training songs of its (first) genre; without these
    either, zero. float32 [catalogue, dim].
    """
    train = songs.splits == Split.TRAIN
    known = of_known_artists(songs)
    means = _means_by_label([genre or "" for genre in songs.labels("genre")], train, vectors)
    means[known] = _means_by_label(songs.artists, train, vectors)[known]
    return _unit_norm(means)


def of_known_artists(songs: EvaluatedSongs) -> np.ndarray:
    """Whether the artist group of each song has training songs; bool [catalogue]."""
    artists = np.array(songs.artists)
    known: np.ndarray = np.isin(artists, artists[songs.splits == Split.TRAIN])
    return known


def _means_by_label(labels: list[str], counted: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Mean of `vectors` over the rows of `counted` (a mask) with each row's label; zero for a label without any."""
    number, names = pd.factorize(np.array(labels))
    membership = sparse.csr_matrix(
        (counted.astype(np.float32), (number, np.arange(len(number)))), shape=(len(names), len(number))
    )
    counts = np.maximum(np.bincount(number[counted], minlength=len(names)), 1)
    means: np.ndarray = (membership @ vectors / counts[:, None])[number].astype(np.float32)
    return means


def genre_vectors(songs: EvaluatedSongs) -> np.ndarray:
    """Genre indicators of each song, of unit norm, zero without a genre; float32 [catalogue, genres]."""
    values = songs.values("genre")
    place = {genre: number for number, genre in enumerate(sorted({genre for genres in values for genre in genres}))}
    indicators = np.zeros((len(values), max(1, len(place))), dtype=np.float32)
    for row, genres in enumerate(values):
        indicators[row, [place[genre] for genre in genres]] = 1
    return _unit_norm(indicators)


def interaction_matrix(songs: EvaluatedSongs, positives: pd.DataFrame) -> sparse.csr_matrix:
    """1 where a training user has a training positive; float32 [training users, catalogue].

    `positives`: see `training_positives`.
    """
    pairs = positives[["user_id", "song_id"]].drop_duplicates()
    number, users = pd.factorize(pairs["user_id"], sort=True)
    columns = pd.Index(songs.ids).get_indexer(pd.Index(pairs["song_id"]))
    return sparse.csr_matrix(
        (np.ones(len(pairs), dtype=np.float32), (number, columns)), shape=(len(users), len(songs.ids))
    )


def item_knn_scorer(interactions: sparse.csr_matrix, neighbors: int = ITEM_NEIGHBORS) -> Scorer:
    """Sum of the cosines, over training users, between the candidate and each song of the history.

    Only the `neighbors` nearest songs of each song count, of equally near ones the first of the catalogue.
    `implicit.nearest_neighbours.CosineRecommender` computes the same cosines but resolves these ties in no defined
    order, so its metrics are not those of the same catalogue in another order.
    """
    norms = np.sqrt(interactions.power(2).sum(axis=0).A1)
    scaled = (interactions @ sparse.diags(1 / np.where(norms > 0, norms, 1))).astype(np.float32).tocsc()
    parts = [
        _nearest(scaled[:, start : start + ROWS].T.tocsr() @ scaled, start, neighbors)
        for start in range(0, scaled.shape[1], ROWS)
    ]
    similar = sparse.vstack(parts).tocsr()

    def score(history: sparse.csr_matrix, candidates: np.ndarray) -> np.ndarray:
        scores: np.ndarray = (history.astype(np.float32) @ similar[:, candidates]).toarray()
        return scores

    return score


def _nearest(cosines: sparse.csr_matrix, first: int, count: int) -> sparse.csr_matrix:
    """The `count` highest cosines of each row to other songs; row i is song `first` + i."""
    entries = cosines.tocoo()
    other = entries.col != entries.row + first
    rows, columns, values = entries.row[other], entries.col[other], entries.data[other]
    order = np.lexsort((columns, -values, rows))
    rows, columns, values = rows[order], columns[order], values[order]
    kept = np.arange(len(rows)) - np.searchsorted(rows, rows) < count
    return sparse.csr_matrix((values[kept], (rows[kept], columns[kept])), shape=entries.shape)


def als_factors(users: int) -> int:
    """64, or one for every ten training users when they are few: more would memorise single users."""
    return min(64, max(4, users // 10))


def als_scorer(interactions: sparse.csr_matrix, seed: int) -> Scorer | None:
    """Implicit ALS (Hu, Koren and Volinsky 2008), with user factors solved from the history.

    None without the library `implicit`.
    """
    try:
        from implicit.cpu.als import AlternatingLeastSquares
        from threadpoolctl import threadpool_limits
    except ImportError:
        return None
    with threadpool_limits(1, "blas"):  # implicit warns when BLAS has threads of its own
        model: Any = AlternatingLeastSquares(
            factors=als_factors(interactions.shape[0]),
            regularization=ALS_REGULARIZATION,
            alpha=ALS_ALPHA,
            iterations=ALS_ITERATIONS,
            num_threads=1,
            random_state=seed,
        )
        model.fit(interactions, show_progress=False)

    def score(history: sparse.csr_matrix, candidates: np.ndarray) -> np.ndarray:
        users = model.recalculate_user(np.arange(history.shape[0]), history.astype(np.float32))
        scores: np.ndarray = users @ model.item_factors[candidates].T
        return scores

    return score


def _unit_norm(rows: np.ndarray) -> np.ndarray:
    """Scale each row of [n, dim] to unit norm; a zero row stays zero."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    scaled: np.ndarray = rows / np.where(norms > 0, norms, 1)
    return scaled
