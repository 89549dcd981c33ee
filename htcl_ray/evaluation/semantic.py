"""Semantic tasks on held-out artists: retrieval between text and sound, exact over the gallery, then the labels of catalogue columns.

Songs with identical text cannot be told apart by text, so they are one correct set: each unique text is asked once, and its rank is
that of the best of its songs. Sound → text ranks the unique texts for each song.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.bootstrap import Draws, Estimate
from htcl_ray.evaluation.figures import Task
from htcl_ray.evaluation.probes import probe_task
from htcl_ray.evaluation.songs import Songs
from htcl_ray.evaluation.ties import first_hit_distribution
from htcl_ray.evaluation.zero_shot import zero_shot_task
from htcl_ray.settings import EvaluateSettings

CELLS = 2**24
"""Similarities held at once: 64 MiB of fp32."""
SHUFFLES = 10
"""Permutations that the shuffled control is averaged over."""


def semantic_tasks(songs: Songs, encode: Callable[[Sequence[str]], dict[str, np.ndarray]], settings: EvaluateSettings) -> list[Task]:
    """`text_to_audio`, `audio_to_text`, and for each of `evaluate.probe_columns` that has labels `zero_shot_COLUMN` and `probe_COLUMN`.

    `encode`: texts → their unit-norm vectors [texts, dim] in each space of `songs`. Intervals resample artists.
    """
    held_out = np.flatnonzero(songs.splits == settings.split)
    artists = songs.artists
    draws = bootstrap.draw([artists[row] for row in held_out], settings.resamples, settings.seed)
    tasks = _retrieval_tasks(songs, held_out, draws, encode, settings)
    for column in settings.probe_columns:
        found = (zero_shot_task(songs, column, held_out, draws, encode, settings), probe_task(songs, column, held_out, draws, settings))
        tasks += [task for task in found if task is not None]
    return tasks


def _retrieval_tasks(
    songs: Songs, held_out: np.ndarray, draws: Draws, encode: Callable[[Sequence[str]], dict[str, np.ndarray]], settings: EvaluateSettings
) -> list[Task]:
    texts = sorted({songs.texts[row] for row in held_out})
    place = {text: number for number, text in enumerate(texts)}
    of_song = np.array([place[songs.texts[row]] for row in held_out])
    each = np.arange(len(texts))
    queries = encode(texts)
    text_draws = draws.merged(of_song, len(texts))
    ks = settings.ks
    to_audio, to_text = {}, {}
    for space, vectors in songs.spaces.items():
        sounds = vectors[held_out]
        to_audio[space] = rank_figures(first_correct_rank(queries[space], sounds, each, of_song), ks, text_draws)
        to_text[space] = rank_figures(first_correct_rank(sounds, queries[space], of_song, each), ks, draws)
    songs_of_text = np.bincount(of_song, minlength=len(texts))
    to_audio["random"] = chance_figures(len(held_out), songs_of_text, ks, text_draws)
    to_text["random"] = chance_figures(len(texts), np.ones(len(held_out), dtype=np.int64), ks, draws)
    last = "preference" if "preference" in songs.spaces else "semantic"
    generator = np.random.default_rng(settings.seed)
    wrong = [songs.spaces[last][held_out][generator.permutation(len(held_out))] for _ in range(SHUFFLES)]
    audio_ranks = [first_correct_rank(queries[last], sounds, each, of_song) for sounds in wrong]
    text_ranks = [first_correct_rank(sounds, queries[last], of_song, each) for sounds in wrong]
    to_audio["shuffled"] = rank_figures(np.array(audio_ranks), ks, text_draws)
    to_text["shuffled"] = rank_figures(np.array(text_ranks), ks, draws)
    sizes = {"unique_texts": len(texts), "songs": len(held_out)}
    return [
        Task("text_to_audio", "text → audio", "texts", "artists", "random", to_audio, sizes),
        Task("audio_to_text", "audio → text", "songs", "artists", "random", to_text, sizes),
    ]


def rank_figures(ranks: np.ndarray, ks: Sequence[int], draws: Draws) -> dict[str, Estimate]:
    """`recall@k` (share of queries with a correct item among the first k), `mrr` and `median_rank` of first correct ranks.

    `ranks`: float [queries], or [draws, queries] of a control that is averaged over draws.
    """
    ranks = np.atleast_2d(ranks)
    found = {f"recall@{k}": bootstrap.mean((ranks <= k).mean(axis=0), draws) for k in ks}
    return {
        **found,
        "mrr": bootstrap.mean((1 / ranks).mean(axis=0), draws),
        "median_rank": bootstrap.median(np.median(ranks, axis=0), draws),
    }


def rank_summary(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`recall@k`, `mrr` and `median_rank` of first correct ranks, float [queries], without uncertainty."""
    recall = {f"recall@{k}": float((ranks <= k).mean()) for k in ks}
    return {**recall, "mrr": float((1 / ranks).mean()), "median_rank": float(np.median(ranks))}


def chance_figures(gallery: int, correct: np.ndarray, ks: Sequence[int], draws: Draws) -> dict[str, Estimate]:
    """The expected figures of a random order of `gallery` items; `correct`: int [queries], how many of them answer each query."""
    values, which = np.unique(correct, return_inverse=True)
    distributions = np.stack([first_hit_distribution(gallery, int(value)) for value in values])
    reached = np.cumsum(distributions, axis=1)
    found = {f"recall@{k}": bootstrap.mean(np.minimum(reached[:, min(k, gallery) - 1], 1)[which], draws) for k in ks}
    reciprocal = (distributions / np.arange(1, gallery + 1)).sum(axis=1)
    shares = np.bincount(which, minlength=len(values)) / len(correct)
    middle = float(1 + np.searchsorted(np.cumsum(shares @ distributions), 0.5 - 1e-9))
    # A random order of everything has one median; which songs are drawn hardly moves it.
    median = Estimate(middle, len(correct), np.full(len(draws.weights), middle, dtype=np.float32), draws.population)
    return {**found, "mrr": bootstrap.mean(reciprocal[which], draws), "median_rank": median}


def first_correct_rank(
    queries: np.ndarray, gallery: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, cells: int = CELLS
) -> np.ndarray:
    """Rank, from 1, of the first gallery item of each query's own group; float64 [queries].

    `queries`: [queries, dim], `gallery`: [items, dim], compared by inner product; groups: int. Every query needs an item of its group.
    Tied items stand in random order: the rank is its expectation, so that a collapsed model, to which all items are equal, does not
    look perfect. At most `cells` similarities are held at once.
    """
    ranks = np.empty(len(queries), dtype=np.float64)
    chunk = max(1, cells // max(1, len(gallery)))
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ gallery.T
        correct = query_group[rows, None] == gallery_group[None]
        best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
        above = (scores > best).sum(axis=1)
        tied = scores == best
        # a random order of r correct and m other items has m / (r + 1) others before the first correct one, on average
        ranks[rows] = 1 + above + (tied & ~correct).sum(axis=1) / ((tied & correct).sum(axis=1) + 1)
    return ranks
