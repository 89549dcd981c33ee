"""Data of the plots of a report: recall curves, genre agreement, a map of the songs, and similarities."""

from __future__ import annotations

from typing import Any

import numpy as np

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.tasks.semantic import Encode, first_correct_rank
from htcl_ray.search.song_map import tsne

CURVE_TO = 50
NEIGHBORS = 10
MAP_SONGS = 1500
MAP_PERPLEXITY, MAP_ITERATIONS = 30.0, 1000
PAIRS_OF_SONGS = 20_000
BINS = np.linspace(-1, 1, 41)


def plot_data(songs: EvaluatedSongs, encode: Encode, settings: EvaluateSettings) -> dict[str, Any]:
    """Values of `pictures` in the report, over the held-out songs.

    recall_curves   by space: share of held-out texts with their song among the first k = 1 … 50; and of a random order
    genre_agreement by space and genre: share of a song's 10 nearest songs by other artists that have its genre; and the
                    share of all songs
    map             x and y of up to 1,500 songs (t-SNE of the last space), with id and genre
    similarities    by space: histogram of the cosine of songs with their own text, and with other texts
    """
    num_held_out = int((songs.splits == settings.split).sum())
    held_out = songs.without(songs.splits != settings.split)
    texts = sorted(set(held_out.texts))
    place = {text: row for row, text in enumerate(texts)}
    text_of_song = np.array([place[text] for text in held_out.texts])
    queries = encode(texts)
    last = "preference" if "preference" in held_out.spaces else "semantic"
    return {
        "recall_curves": _recall_curves(held_out, queries, text_of_song) if num_held_out > 1 else {},
        "genre_agreement": _genre_agreement(held_out),
        "map": _song_map(held_out, last, settings.seed),
        "similarities": {
            space: _similarities(vectors, queries[space], text_of_song, settings.seed)
            for space, vectors in held_out.spaces.items()
        },
    }


def _recall_curves(
    held_out: EvaluatedSongs, queries: dict[str, np.ndarray], text_of_song: np.ndarray
) -> dict[str, list[float]]:
    ks = np.arange(1, min(CURVE_TO, len(held_out.ids)) + 1)
    each = np.arange(text_of_song.max() + 1)
    curves = {}
    for space, vectors in held_out.spaces.items():
        ranks = first_correct_rank(queries[space], vectors, each, text_of_song)
        curves[space] = [float((ranks <= k).mean()) for k in ks]
    return {**curves, "random": [float(k / len(held_out.ids)) for k in ks]}


def _genre_agreement(held_out: EvaluatedSongs) -> dict[str, dict[str, float]]:
    genres = np.array([label or "" for label in held_out.labels("genre")])
    names = sorted(set(genres.tolist()) - {""})
    if len(names) < 2:
        return {}
    artists = np.unique(held_out.artists, return_inverse=True)[1]
    agreement: dict[str, dict[str, float]] = {}
    for space, vectors in held_out.spaces.items():
        same = np.empty(len(genres))
        for start in range(0, len(genres), 1024):
            rows = slice(start, start + 1024)
            scores = vectors[rows] @ vectors.T
            scores[artists[rows, None] == artists[None]] = -np.inf
            nearest = np.argpartition(-scores, min(NEIGHBORS, len(genres) - 1), axis=1)[:, :NEIGHBORS]
            other = np.isfinite(np.take_along_axis(scores, nearest, axis=1))
            matches = ((genres[nearest] == genres[rows, None]) & other).sum(axis=1)
            same[rows] = matches / np.maximum(other.sum(axis=1), 1)
        agreement[space] = {genre: float(same[genres == genre].mean()) for genre in names}
    agreement["share of songs"] = {genre: float((genres == genre).mean()) for genre in names}
    return agreement


def _song_map(held_out: EvaluatedSongs, space: str, seed: int) -> list[dict[str, Any]]:
    rows = np.arange(len(held_out.ids))
    if len(rows) > MAP_SONGS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAP_SONGS, replace=False))
    if len(rows) < 8:
        return []
    # Squared Euclidean distance of unit vectors is 2 − 2·cosine.
    places = tsne(held_out.spaces[space][rows], MAP_PERPLEXITY, MAP_ITERATIONS, seed)
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-9)
    genres = held_out.labels("genre")
    return [
        {"song_id": held_out.ids[row], "genre": genres[row], "x": round(float(x), 4), "y": round(float(y), 4)}
        for row, (x, y) in zip(rows, places, strict=True)
    ]


def _similarities(
    vectors: np.ndarray, queries: np.ndarray, text_of_song: np.ndarray, seed: int
) -> dict[str, list[float]]:
    own = (vectors * queries[text_of_song]).sum(axis=1)
    generator = np.random.default_rng(seed)
    song = generator.integers(0, len(vectors), PAIRS_OF_SONGS)
    text = generator.integers(0, len(queries), PAIRS_OF_SONGS)
    other = text_of_song[song] != text
    others = (vectors[song[other]] * queries[text[other]]).sum(axis=1)
    return {name: _histogram(values) for name, values in (("own text", own), ("other texts", others))}


def _histogram(values: np.ndarray) -> list[float]:
    """Share of the values in each bin."""
    counts = np.histogram(np.clip(values, -1, 1), BINS)[0]
    shares: list[float] = (counts / max(counts.sum(), 1)).round(5).tolist()
    return shares
