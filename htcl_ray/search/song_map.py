"""Two-dimensional map of the songs by t-SNE, and quantiles of the scores of random pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.schemas import SONG_MAP

if TYPE_CHECKING:
    from htcl_ray.index.song_index import SongIndex

MOST_SONGS = 5_000
BACKGROUND_SONGS = 1_000
NEIGHBOURS = 12.0
"""Perplexity: approximate number of neighbours of each song that the map keeps close."""
ITERATIONS = 500
EVENNESS = 0.5
"""Weight of a song's rank along each axis in its coordinate; the rest is the t-SNE coordinate. Spreads dense clusters
and preserves the order."""
MIN_TSNE_SONGS = 8
"""Fewer songs are placed by their principal components."""


def draw_map(index: SongIndex) -> pa.Table:
    """Coordinates of at most `MOST_SONGS` evenly chosen songs of the index, as `schemas.SONG_MAP`."""
    index = index.snapshot()
    present = songs_of(index)
    if not present:
        return SONG_MAP.empty_table()
    vectors = index.vectors_of(present)
    halves = [vectors.semantic] if vectors.preference is None else [vectors.semantic, vectors.preference]
    coordinates = song_map(np.hstack(halves))
    return pa.table([present, coordinates[:, 0], coordinates[:, 1]], schema=SONG_MAP)


def songs_of(index: SongIndex, most: int = MOST_SONGS) -> list[str]:
    """At most `most` evenly chosen songs of a snapshot, without tombstones."""
    ids = index.songs["song_id"]
    chosen = [(int(row), ids[int(row)].as_py()) for row in evenly_chosen(len(ids), most)]
    return [song_id for row, song_id in chosen if song_id in index and index.row_of(song_id) == row]


def score_quantiles(index: SongIndex) -> tuple[list[float], list[float] | None] | None:
    """Quantiles 0, 0.001, … 1 of the semantic and the preference cosines of random pairs of songs.

    They show how exceptional a score is in this index. Computed over all pairs of `BACKGROUND_SONGS` songs. None with
    fewer than two songs; preference quantiles are None without stage 2.
    """
    index = index.snapshot()
    songs = songs_of(index, BACKGROUND_SONGS)
    if len(songs) < 2:
        return None
    vectors = index.vectors_of(songs)
    others = np.triu_indices(len(songs), k=1)

    def quantiles(half: NDArray[np.float32]) -> list[float]:
        cosines = (half @ half.T)[others]
        rounded: list[float] = np.quantile(cosines, np.linspace(0, 1, 1001)).round(4).tolist()
        return rounded

    return quantiles(vectors.semantic), None if vectors.preference is None else quantiles(vectors.preference)


def evenly_chosen(rows: int, most: int = MOST_SONGS) -> NDArray[np.int64]:
    """At most `most` evenly spaced rows of 0 to `rows` - 1, in ascending order."""
    return np.unique(np.linspace(0, max(rows - 1, 0), min(rows, most)).round().astype(np.int64))


def song_map(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coordinates [n, 2] in [0, 1] for finite vectors [n, width]; deterministic.

    t-SNE (van der Maaten and Hinton 2008, http://jmlr.org/papers/v9/vandermaaten08a.html), initialised with the two
    largest principal components, which preserve the arrangement of clusters. Takes seconds for thousands of songs.
    """
    count = len(vectors)
    if count >= MIN_TSNE_SONGS and np.ptp(vectors, axis=0).any():
        from scipy.stats import rankdata  # its import takes longer than that of the service

        spread = _scaled_to_square(tsne(vectors, NEIGHBOURS, ITERATIONS, seed=0))
        ranks = _scaled_to_square(rankdata(spread, axis=0).astype(np.float32))
        return _scaled_to_square((1 - EVENNESS) * spread + EVENNESS * ranks)
    centred = vectors - vectors.mean(axis=0) if count else vectors
    coordinates = np.zeros((count, 2), dtype=np.float32)
    if count > 1:
        left, singular_values, _ = np.linalg.svd(centred, full_matrices=False)
        axes = min(2, len(singular_values))
        coordinates[:, :axes] = left[:, :axes] * singular_values[:axes]
    return _scaled_to_square(coordinates)


def tsne(vectors: NDArray[np.float32], perplexity: float, iterations: int, seed: int) -> NDArray[np.float32]:
    """Project vectors [n, width] to a plane by t-SNE, starting from their principal components; float32 [n, 2].

    `perplexity` is reduced for few vectors. The result is the same for the same arguments.
    """
    from sklearn.manifold import TSNE  # slow to import, and only the maps need it
    from threadpoolctl import threadpool_limits

    perplexity = min(perplexity, (len(vectors) - 1) / 3)
    with threadpool_limits(1):  # searches run at the same time
        projection = TSNE(init="pca", perplexity=perplexity, max_iter=iterations, random_state=seed, n_jobs=1)
        return np.asarray(projection.fit_transform(vectors))


def _scaled_to_square(coordinates: NDArray[np.float32]) -> NDArray[np.float32]:
    """Coordinates scaled to [0, 1] on each axis; 0.5 on an axis without variation."""
    low = coordinates.min(axis=0, initial=np.inf)
    extent = coordinates.max(axis=0, initial=-np.inf) - low
    if not len(coordinates):
        return coordinates
    scaled = (coordinates - low) / np.where(extent > 0, extent, 1)
    return np.where(extent > 0, scaled, 0.5).astype(np.float32)
