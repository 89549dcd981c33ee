"""Semantic tasks: retrieval between text and sound, exact over the held-out gallery, and a linear probe of a catalogue column.

Songs with identical text cannot be told apart by text, so they are one correct set: each unique text is asked once, and its rank is
that of the best of its songs. Sound → text ranks the unique texts for each song; with label captions this is zero-shot classification,
and recall@1 its accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from htcl_ray.evaluation.ties import first_hit_distribution

CELLS = 2**24
"""Similarities held at once: 64 MiB of fp32."""


def retrieval(songs: np.ndarray, texts: np.ndarray, text_of_song: np.ndarray, ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Both directions of retrieval.

    `songs`: [songs, dim] and `texts`: [unique texts, dim], unit norm; `text_of_song`: int [songs], the row of a song's text. Returns
    `text_to_audio` and `audio_to_text`, each as `rank_summary` with `queries`, `gallery` and, under `chance`, what a random order would
    give.
    """
    each = np.arange(len(texts))
    songs_of_text = np.bincount(text_of_song, minlength=len(texts))
    result = {}
    for name, ranks, gallery, correct in (
        ("text_to_audio", first_correct_rank(texts, songs, each, text_of_song), len(songs), songs_of_text),
        ("audio_to_text", first_correct_rank(songs, texts, text_of_song, each), len(texts), np.ones(len(songs), dtype=np.int64)),
    ):
        result[name] = {"queries": len(ranks), "gallery": gallery, **rank_summary(ranks, ks), "chance": chance(gallery, correct, ks)}
    return result


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


def rank_summary(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`recall@k` (share of queries with a correct item among the first k), `mrr` and `median_rank` of `first_correct_rank`."""
    recall = {f"recall@{k}": float((ranks <= k).mean()) for k in ks}
    return {**recall, "mrr": float((1 / ranks).mean()), "median_rank": float(np.median(ranks))}


def chance(gallery: int, correct: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """The summary of a random order of `gallery` items; `correct`: int [queries], how many of them answer each query."""
    values, counts = np.unique(correct, return_counts=True)
    distribution = np.zeros(gallery)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        distribution += first_hit_distribution(gallery, value) * count / len(correct)
    recall = {f"recall@{k}": float(min(distribution[:k].sum(), 1.0)) for k in ks}
    return {
        **recall,
        "mrr": float((distribution / np.arange(1, gallery + 1)).sum()),
        "median_rank": float(1 + np.searchsorted(np.cumsum(distribution), 0.5 - 1e-9)),
    }


def linear_probe(
    train: np.ndarray, train_labels: Sequence[str | None], test: np.ndarray, test_labels: Sequence[str | None]
) -> dict[str, float] | None:
    """Accuracy in [0, 1] with which logistic regression, trained on `train` [songs, dim], names the label of `test` [songs, dim].

    `chance` is the accuracy of always naming the commonest training label. Songs without a label (None) take no part; a test label
    that training never saw counts as an error. None when fewer than two labels are in training, or none in test.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known, asked = _labelled(train_labels), _labelled(test_labels)
    targets = np.array([train_labels[i] for i in known], dtype=str)
    truth = np.array([test_labels[i] for i in asked], dtype=str)
    classes, counts = np.unique(targets, return_counts=True)
    if len(classes) < 2 or not len(truth):
        return None
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(train[known], targets)
    return {
        "accuracy": float((probe.predict(test[asked]) == truth).mean()),
        "chance": float((truth == classes[counts.argmax()]).mean()),
        "classes": len(classes),
        "train_songs": len(targets),
        "test_songs": len(truth),
        "unseen_label_songs": int((~np.isin(truth, classes)).sum()),
    }


def _labelled(labels: Sequence[str | None]) -> np.ndarray:
    return np.array([i for i, label in enumerate(labels) if label is not None], dtype=np.int64)
