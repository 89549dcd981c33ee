"""Probes: simple classifiers on frozen vectors, tested on songs by artists that they were not trained on.

A linear probe (logistic regression on standardised vectors) and the nearest neighbours by cosine. Each is trained on
the songs that the model was trained on, and again (`_folds`) within the held-out songs alone, cross-validated with all
songs of an artist in one fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import default_rng

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.label_ranking import macro_metrics
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks.labels import Labels
from htcl_ray.evaluation.tasks.zero_shot import most_frequent_label
from htcl_ray.interactions.splits import normal_name

MAX_TRAINING_SONGS = 20_000
"""Limit of the training songs of a probe, sampled with the evaluation's seed: more do not improve a probe."""
SONGS_PER_LABEL = 20
"""Songs of each label that are sampled first, so that rare labels do not vanish from the sample."""
MAX_ITERATIONS = 2000

Probe = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(training vectors, their labels, test vectors) → predictions."""
Folds = list[tuple[np.ndarray, np.ndarray]]
"""Training and test positions of each fold."""
MethodMetrics = tuple[str, dict[str, dict[str, Estimate]], dict[str, int]]
"""Name of the control, metrics by method, counts."""


def probe_task(
    labels: Labels, methods: dict[str, np.ndarray], artists: list[str], draws: Draws, settings: EvaluateSettings
) -> TaskResult | None:
    """`accuracy`, or `roc_auc` and `map` (macro over labels) where songs may have several labels.

    `knn_` precedes the metrics of the nearest neighbours, `_folds` follows the cross-validated ones, which are left out
    when all songs are by one artist. `methods`: vectors of the whole catalogue [songs, dim]; `artists`: of each song of
    the catalogue; `draws` of the labelled held-out songs. Songs with a label that no training song has count as errors.
    None when fewer than two labels can be distinguished.
    """
    training = sample_training_songs(labels, MAX_TRAINING_SONGS, settings.seed)
    folds = artist_folds([normal_name(artists[row]) for row in labels.held_out], settings.folds)
    counts = {"train_songs": len(training), "test_songs": len(labels.held_out), "folds": len(folds)}
    if len(training) < len(labels.training):
        counts["train_songs_left_out"] = len(labels.training) - len(training)
    from threadpoolctl import threadpool_limits

    run = _probe_several if labels.several else _probe_single
    with threadpool_limits(1):  # hundreds of small fits: synchronising threads costs more than the computation
        result = run(labels, training, methods, folds, draws, settings.neighbors)
    if result is None:
        return None
    control, metrics, more = result
    name = f"probe_{labels.column}"
    return TaskResult(name, f"{labels.column} probe", "songs", "artists", control, metrics, {**more, **counts})


def sample_training_songs(labels: Labels, limit: int, seed: int) -> np.ndarray:
    """At most `limit` catalogue rows of the labelled training songs; a sample of them is sorted.

    In random order, the first SONGS_PER_LABEL songs of each label precede the others.
    """
    if len(labels.training) <= limit:
        return labels.training
    order = default_rng(seed).permutation(labels.training)
    seen: Counter[str] = Counter()
    first = []
    for row in order:
        first.append(any(seen[label] < SONGS_PER_LABEL for label in labels.values[row]))
        seen.update(labels.values[row])
    needed = np.array(first)
    return np.sort(np.concatenate([order[needed], order[~needed]])[:limit])


def artist_folds(artists: list[str], folds: int) -> Folds:
    """At most `folds` folds of nearly equal size, each artist in one of them; empty with a single artist."""
    from sklearn.model_selection import GroupKFold

    folds = min(folds, len(set(artists)))
    return list(GroupKFold(folds).split(artists, groups=artists)) if folds > 1 else []


def _probe_single(
    labels: Labels, training: np.ndarray, methods: dict[str, np.ndarray], folds: Folds, draws: Draws, neighbors: int
) -> MethodMetrics | None:
    known, truth = labels.single(training), labels.single(labels.held_out)
    classes = np.unique(known)
    if len(classes) < 2:
        return None
    probes = {"": linear_labels, "knn_": _neighbor_labels(neighbors)}
    metrics = {
        method: {
            f"{prefix}accuracy{suffix}": bootstrap.mean((predicted == truth).astype(np.float64), draws)
            for prefix, suffix, predicted in _predictions(
                probes, vectors, training, known, labels.held_out, truth, folds
            )
        }
        for method, vectors in methods.items()
    }
    metrics |= most_frequent_label(labels, tuple(next(iter(metrics.values()))), draws)
    return "commonest", metrics, {"classes": len(classes), "unseen_label_songs": int((~np.isin(truth, classes)).sum())}


def _probe_several(
    labels: Labels, training: np.ndarray, methods: dict[str, np.ndarray], folds: Folds, draws: Draws, neighbors: int
) -> MethodMetrics | None:
    rankable = labels.rankable()
    in_training = labels.indicator(training, rankable)
    seen = np.flatnonzero(in_training.any(axis=0) & ~in_training.all(axis=0))
    if not len(seen):
        return None
    known, truth = in_training[:, seen], labels.indicator(labels.held_out, [rankable[i] for i in seen])
    probes = {"": linear_scores, "knn_": _neighbor_shares(neighbors)}
    metrics = {
        method: {
            f"{prefix}{metric}{suffix}": estimate
            for prefix, suffix, scores in _predictions(probes, vectors, training, known, labels.held_out, truth, folds)
            for metric, estimate in macro_metrics(scores, truth, draws).items()
        }
        for method, vectors in methods.items()
    }
    tied = macro_metrics(np.zeros(truth.shape), truth, draws)
    suffixes = ("", "_folds") if folds else ("",)
    metrics["random"] = {
        f"{prefix}{metric}{suffix}": estimate
        for prefix in probes
        for suffix in suffixes
        for metric, estimate in tied.items()
    }
    return "random", metrics, {"labels": len(seen), "labels_left_out": len(labels.names(labels.held_out)) - len(seen)}


def _predictions(
    probes: dict[str, Probe],
    vectors: np.ndarray,
    training: np.ndarray,
    known: np.ndarray,
    held_out: np.ndarray,
    truth: np.ndarray,
    folds: Folds,
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Prefix of the probe, "" or `_folds`, and predictions: trained on the training songs, or out of fold."""
    tested = vectors[held_out]
    for name, probe in probes.items():
        yield name, "", probe(vectors[training], known, tested)
        if folds:
            parts = [probe(tested[train], truth[train], tested[test]) for train, test in folds]
            order = np.argsort(np.concatenate([test for _, test in folds]))
            yield name, "_folds", np.concatenate(parts)[order]


def linear_labels(vectors: np.ndarray, known: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Labels that logistic regression predicts, str [tested]; the only label when there is one."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(known)) == 1:
        return np.full(len(tested), known[0])
    train, test = _standardise(vectors, tested)
    predicted: np.ndarray = LogisticRegression(max_iter=MAX_ITERATIONS).fit(train, known).predict(test)
    return predicted


def linear_scores(vectors: np.ndarray, known: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Log-odds of one logistic regression per label, float [tested, labels]; `known`: bool [songs, labels].

    0 for a label that all known songs have, or none.
    """
    from sklearn.linear_model import LogisticRegression

    train, test = _standardise(vectors, tested)
    scores = np.zeros((len(tested), known.shape[1]))
    for label in np.flatnonzero(known.any(axis=0) & ~known.all(axis=0)):
        scores[:, label] = (
            LogisticRegression(max_iter=MAX_ITERATIONS).fit(train, known[:, label]).decision_function(test)
        )
    return scores


def _standardise(train: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    return scaler.transform(train), scaler.transform(test)


def _neighbor_labels(neighbors: int) -> Probe:
    """The most frequent label of the nearest songs; of equals the first in alphabetical order."""
    from sklearn.neighbors import KNeighborsClassifier

    return lambda vectors, known, tested: (
        KNeighborsClassifier(min(neighbors, len(vectors)), metric="cosine").fit(vectors, known).predict(tested)
    )


def _neighbor_shares(neighbors: int) -> Probe:
    """The share of the nearest songs that have each label."""
    from sklearn.neighbors import KNeighborsRegressor

    return lambda vectors, known, tested: (
        KNeighborsRegressor(min(neighbors, len(vectors)), metric="cosine")
        .fit(vectors, known.astype(np.float64))
        .predict(tested)
    )
