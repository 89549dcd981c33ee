"""What the plots of a report show, as plain numbers: recall curves, agreement of genres, a map of the songs, and
similarities.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.tasks.semantic import Encode, first_correct_rank

CURVE_TO = 50
NEIGHBORS = 10
MAP_SONGS = 1500
PAIRS_OF_SONGS = 20_000
BINS = np.linspace(-1, 1, 41)


def pictures(songs: Songs, encode: Encode, settings: EvaluateSettings) -> dict[str, Any]:
    """Keys of the report's `pictures`, over the held-out songs.

    recall_curves   by space: share of held-out texts whose song is among the first k, k = 1 … 50; and of a random order
    genre_agreement by space and genre: share of a song's 10 nearest songs by other artists that are of its genre; and of all songs
    map             x and y of up to 1,500 songs (t-SNE of the last space), with id and genre
    similarities    by space: histogram of the cosine of songs and their own text, and of songs and other texts
    """
    held_out = np.flatnonzero(songs.splits == settings.split)
    held = songs.without(songs.splits != settings.split)
    texts = sorted(set(held.texts))
    place = {text: row for row, text in enumerate(texts)}
    of_song = np.array([place[text] for text in held.texts])
    queries = encode(texts)
    last = "preference" if "preference" in held.spaces else "semantic"
    return {
        "recall_curves": _recall_curves(held, queries, of_song) if len(held_out) > 1 else {},
        "genre_agreement": _genre_agreement(held),
        "map": _map(held, last, settings.seed),
        "similarities": {
            space: _similarities(vectors, queries[space], of_song, settings.seed)
            for space, vectors in held.spaces.items()
        },
    }


def _recall_curves(held: Songs, queries: dict[str, np.ndarray], of_song: np.ndarray) -> dict[str, list[float]]:
    reach = np.arange(1, min(CURVE_TO, len(held.ids)) + 1)
    each = np.arange(of_song.max() + 1)
    curves = {}
    for space, vectors in held.spaces.items():
        ranks = first_correct_rank(queries[space], vectors, each, of_song)
        curves[space] = [float((ranks <= k).mean()) for k in reach]
    return {**curves, "random": [float(k / len(held.ids)) for k in reach]}


def _genre_agreement(held: Songs) -> dict[str, dict[str, float]]:
    genres = np.array([label or "" for label in held.labels("genre")])
    named = sorted(set(genres.tolist()) - {""})
    if len(named) < 2:
        return {}
    artists = np.unique(held.artists, return_inverse=True)[1]
    found: dict[str, dict[str, float]] = {}
    for space, vectors in held.spaces.items():
        same = np.empty(len(genres))
        for start in range(0, len(genres), 1024):
            rows = slice(start, start + 1024)
            scores = vectors[rows] @ vectors.T
            scores[artists[rows, None] == artists[None]] = -np.inf
            nearest = np.argpartition(-scores, min(NEIGHBORS, len(genres) - 1), axis=1)[:, :NEIGHBORS]
            there = np.isfinite(np.take_along_axis(scores, nearest, axis=1))
            same[rows] = ((genres[nearest] == genres[rows, None]) & there).sum(axis=1) / np.maximum(
                there.sum(axis=1), 1
            )
        found[space] = {genre: float(same[genres == genre].mean()) for genre in named}
    found["share of songs"] = {genre: float((genres == genre).mean()) for genre in named}
    return found


def _map(held: Songs, space: str, seed: int) -> list[dict[str, Any]]:
    rows = np.arange(len(held.ids))
    if len(rows) > MAP_SONGS:
        rows = np.sort(np.random.default_rng(seed).choice(rows, MAP_SONGS, replace=False))
    if len(rows) < 8:
        return []
    from sklearn.manifold import TSNE

    perplexity = min(30.0, (len(rows) - 1) / 3)
    # Unit vectors: squared Euclidean distance is 2 − 2·cosine.
    places = TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(
        held.spaces[space][rows]
    )
    places = (places - places.min(axis=0)) / np.maximum(np.ptp(places, axis=0), 1e-9)
    genres = held.labels("genre")
    return [
        {"song_id": held.ids[row], "genre": genres[row], "x": round(float(x), 4), "y": round(float(y), 4)}
        for row, (x, y) in zip(rows, places, strict=True)
    ]


def _similarities(vectors: np.ndarray, queries: np.ndarray, of_song: np.ndarray, seed: int) -> dict[str, list[float]]:
    own = (vectors * queries[of_song]).sum(axis=1)
    generator = np.random.default_rng(seed)
    song, text = (
        generator.integers(0, len(vectors), PAIRS_OF_SONGS),
        generator.integers(0, len(queries), PAIRS_OF_SONGS),
    )
    other = of_song[song] != text
    against = (vectors[song[other]] * queries[text[other]]).sum(axis=1)
    return {name: _shares(values) for name, values in (("own text", own), ("other texts", against))}


def _shares(values: np.ndarray) -> list[float]:
    counts = np.histogram(np.clip(values, -1, 1), BINS)[0]
    return (counts / max(counts.sum(), 1)).round(5).tolist()
