"""A plane on which songs that are alike lie near each other, for people to look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy.stats import rankdata

from htcl_ray.schemas import SONG_MAP

if TYPE_CHECKING:
    from htcl_ray.index.song_index import SongIndex

MOST_SONGS = 5_000
BACKGROUND_SONGS = 1_000
NEIGHBOURS = 12.0
"""Perplexity: about how many neighbours of each song the plane keeps near."""
ITERATIONS = 500
EVENNESS = 0.5
"""Share of a song's rank along an axis in its place there; the rest is where t-SNE puts it. Loosens tight groups, and
keeps the order."""
FEWEST_TO_SPREAD = 8
"""Fewer songs are placed by their principal components alone."""


def draw_map(index: SongIndex) -> pa.Table:
    """Places of at most `MOST_SONGS` songs of the index, evenly chosen, as `schemas.SONG_MAP`."""
    index = index.snapshot()
    present = songs_of(index)
    if not present:
        return SONG_MAP.empty_table()
    vectors = index.vectors_of(present)
    halves = [vectors.semantic] if vectors.preference is None else [vectors.semantic, vectors.preference]
    places = song_map(np.hstack(halves))
    return pa.table([present, places[:, 0], places[:, 1]], schema=SONG_MAP)


def songs_of(index: SongIndex, most: int = MOST_SONGS) -> list[str]:
    """At most `most` of a snapshot's songs, evenly chosen, without those that were removed."""
    ids = index.songs["song_id"]
    chosen = [(int(row), ids[int(row)].as_py()) for row in evenly_chosen(len(ids), most)]
    return [song_id for row, song_id in chosen if song_id in index and index.row_of(song_id) == row]


def score_quantiles(index: SongIndex) -> tuple[list[float], list[float] | None] | None:
    """Quantiles 0, 0.001, … 1 of the cosines of random pairs of songs, semantic and preference: what a score means in
    this index.

    Of all pairs of `BACKGROUND_SONGS` songs. None with fewer than two songs; no preference without stage 2.
    """
    index = index.snapshot()
    songs = songs_of(index, BACKGROUND_SONGS)
    if len(songs) < 2:
        return None
    vectors = index.vectors_of(songs)
    others = np.triu_indices(len(songs), k=1)

    def quantiles(half: NDArray[np.float32]) -> list[float]:
        cosines = (half @ half.T)[others]
        return np.quantile(cosines, np.linspace(0, 1, 1001)).round(4).tolist()

    return quantiles(vectors.semantic), None if vectors.preference is None else quantiles(vectors.preference)


def evenly_chosen(rows: int, most: int = MOST_SONGS) -> NDArray[np.int64]:
    """At most `most` of the rows 0 to `rows` - 1, in order and at even distances, so that no part of the catalogue is
    left out.
    """
    return np.unique(np.linspace(0, max(rows - 1, 0), min(rows, most)).round().astype(np.int64))


def song_map(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Places of songs, [n, 2], each coordinate from 0 to 1, for vectors [n, width] that are finite; the same ones give
    the same places.

    Begins with the two strongest principal components, which keep how groups lie to each other but heap most songs in
    the middle, and spreads them by t-SNE (van der Maaten and Hinton 2008,
    http://jmlr.org/papers/v9/vandermaaten08a.html). Seconds for thousands of songs.
    """
    count = len(vectors)
    if count >= FEWEST_TO_SPREAD and np.ptp(vectors, axis=0).any():
        spread = _into_square(_spread(vectors))
        ranks = _into_square(rankdata(spread, axis=0).astype(np.float32))
        return _into_square((1 - EVENNESS) * spread + EVENNESS * ranks)
    centred = vectors - vectors.mean(axis=0) if count else vectors
    places = np.zeros((count, 2), dtype=np.float32)
    if count > 1:
        left, strengths, _ = np.linalg.svd(centred, full_matrices=False)
        axes = min(2, len(strengths))
        places[:, :axes] = left[:, :axes] * strengths[:axes]
    return _into_square(places)


def _spread(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    from sklearn.manifold import TSNE  # slow to import, and only the map needs it
    from threadpoolctl import threadpool_limits

    perplexity = min(NEIGHBOURS, (len(vectors) - 1) / 3)
    with threadpool_limits(1):  # searches go on meanwhile
        return TSNE(init="pca", perplexity=perplexity, max_iter=ITERATIONS, random_state=0, n_jobs=1).fit_transform(
            vectors
        )


def _into_square(places: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each axis stretched to 0 … 1; one on which nothing differs is 0.5."""
    low = places.min(axis=0, initial=np.inf)
    extent = places.max(axis=0, initial=-np.inf) - low
    if not len(places):
        return places
    scaled = (places - low) / np.where(extent > 0, extent, 1)
    return np.where(extent > 0, scaled, 0.5).astype(np.float32)
