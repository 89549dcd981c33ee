"""How vectors or song scores answer a recommendation question: a user's history in, a score of each candidate out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import sparse

Scorer = Callable[[sparse.csr_matrix, np.ndarray], np.ndarray]
"""Histories of some users, bool [users, catalogue], and candidates, catalogue rows → float [users, candidates]; higher
is better."""


def vector_scorer(vectors: np.ndarray) -> Scorer:
    """Inner product of a user's unit-norm mean vector with a song's; `vectors`: [catalogue, dim]."""
    return lambda history, candidates: user_vectors(vectors, history) @ vectors[candidates].T


def blended_scorer(first: Scorer, second: Scorer, blend: float) -> Scorer:
    """(1 − blend) · first + blend · second, as the index blends."""
    return lambda history, candidates: (1 - blend) * first(history, candidates) + blend * second(history, candidates)


def user_vectors(vectors: np.ndarray, history: sparse.csr_matrix) -> np.ndarray:
    """[users, dim]: the mean of the vectors of a user's songs, scaled to unit norm (zero stays zero)."""
    sums = history @ vectors
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    return sums / np.where(norms > 0, norms, 1)


def shared_scorer(of_song: np.ndarray) -> Scorer:
    """The same scores for every user; `of_song`: [catalogue]."""
    return lambda history, candidates: np.broadcast_to(of_song[candidates], (history.shape[0], len(candidates)))


def shuffled_scorers(vectors: np.ndarray, times: int, seed: int) -> list[Scorer]:
    """`vectors` [catalogue, dim] dealt out to the wrong songs, so many times: the same geometry, without its
    meaning.
    """
    generator = np.random.default_rng(seed)
    return [vector_scorer(vectors[generator.permutation(len(vectors))]) for _ in range(times)]
