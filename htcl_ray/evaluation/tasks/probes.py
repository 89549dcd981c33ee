"""Probes: what simple classifiers read from frozen vectors, about songs by artists that they were not trained on.

A linear probe (logistic regression on standardised vectors) and the nearest neighbours by cosine. Each is asked twice:
trained on the songs that the model trained on, and (`_folds`) within the held-out songs alone, out of fold, all songs
of an artist in one fold.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
from numpy.random import default_rng

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.label_ranking import macro_figures
from htcl_ray.evaluation.task_result import Task
from htcl_ray.evaluation.tasks.labels import Labels
from htcl_ray.evaluation.tasks.zero_shot import commonest
from htcl_ray.interactions.splits import normal_name

MAX_TRAINING_SONGS = 20_000
"""A probe learns from at most this many songs, drawn with the evaluation's seed: more do not change what it can
read."""
SONGS_OF_LABEL = 20
"""Songs of each label that are drawn first, where there are as many: rare labels would vanish from a sample of the
songs alone."""
MAX_ITERATIONS = 2000

Probe = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(vectors to learn from, their labels, vectors that are asked about) → answers."""
Folds = list[tuple[np.ndarray, np.ndarray]]
"""Positions to learn from and positions to ask about, of each fold."""


def probe_task(
    labels: Labels, methods: dict[str, np.ndarray], artists: list[str], draws: Draws, settings: EvaluateSettings
) -> Task | None:
    """`accuracy`, or `roc_auc` and `map` (macro over labels) where a song may have several; also with `knn_` before and
    `_folds` behind.

    `methods`: vectors of the whole catalogue [songs, dim]; `artists`: of each song of the catalogue; `draws` of the
    labelled held-out songs. Songs whose label training never saw count as errors. `_folds` figures are left out when
    the songs are by one artist. None when fewer than two labels can be told apart.
    """
    training = labels.training
    if len(training) > MAX_TRAINING_SONGS:
        training = _sample(labels, settings.seed)
    folds = artist_folds([normal_name(artists[row]) for row in labels.held_out], settings.folds)
    counts = {"train_songs": len(training), "test_songs": len(labels.held_out), "folds": len(folds)}
    if len(training) < len(labels.training):
        counts["train_songs_left_out"] = len(labels.training) - len(training)
    from threadpoolctl import threadpool_limits

    ask = _ask_several if labels.several else _ask_one
    with threadpool_limits(1):  # hundreds of small fits: threads that wait for each other cost more than they compute
        found = ask(labels, training, methods, folds, draws, settings.neighbors)
    if found is None:
        return None
    control, figures, more = found
    name = f"probe_{labels.column}"
    return Task(name, f"{labels.column} probe", "songs", "artists", control, figures, {**more, **counts})


def _sample(labels: Labels, seed: int) -> np.ndarray:
    """MAX_TRAINING_SONGS training rows, sorted: of each label the first of a random order, and then the rest of that
    order.
    """
    order = default_rng(seed).permutation(labels.training)
    seen: Counter[str] = Counter()
    first = []
    for row in order:
        first.append(any(seen[label] < SONGS_OF_LABEL for label in labels.values[row]))
        seen.update(labels.values[row])
    needed = np.array(first)
    return np.sort(np.concatenate([order[needed], order[~needed]])[:MAX_TRAINING_SONGS])


def artist_folds(artists: list[str], folds: int) -> Folds:
    """At most `folds` folds of nearly equal size, an artist in one of them; none when there is one artist."""
    from sklearn.model_selection import GroupKFold

    folds = min(folds, len(set(artists)))
    return list(GroupKFold(folds).split(artists, groups=artists)) if folds > 1 else []


Found = tuple[str, dict[str, dict[str, Estimate]], dict[str, int]]
"""Name of the control, figures by method, counts."""


def _ask_one(
    labels: Labels, training: np.ndarray, methods: dict[str, np.ndarray], folds: Folds, draws: Draws, neighbors: int
) -> Found | None:
    known, truth = labels.one_each(training), labels.one_each(labels.held_out)
    classes = np.unique(known)
    if len(classes) < 2:
        return None
    probes = {"": linear_labels, "knn_": _neighbor_labels(neighbors)}
    figures = {
        method: {
            f"{prefix}accuracy{suffix}": bootstrap.mean((answers == truth).astype(np.float64), draws)
            for prefix, suffix, answers in _all_answers(probes, vectors, training, known, labels.held_out, truth, folds)
        }
        for method, vectors in methods.items()
    }
    figures |= commonest(labels, tuple(next(iter(figures.values()))), draws)
    return "commonest", figures, {"classes": len(classes), "unseen_label_songs": int((~np.isin(truth, classes)).sum())}


def _ask_several(
    labels: Labels, training: np.ndarray, methods: dict[str, np.ndarray], folds: Folds, draws: Draws, neighbors: int
) -> Found | None:
    rankable = labels.rankable()
    in_training = labels.indicator(training, rankable)
    seen = np.flatnonzero(in_training.any(axis=0) & ~in_training.all(axis=0))
    if not len(seen):
        return None
    known, truth = in_training[:, seen], labels.indicator(labels.held_out, [rankable[i] for i in seen])
    probes = {"": linear_scores, "knn_": _neighbor_shares(neighbors)}
    figures = {
        method: {
            f"{prefix}{figure}{suffix}": estimate
            for prefix, suffix, scores in _all_answers(probes, vectors, training, known, labels.held_out, truth, folds)
            for figure, estimate in macro_figures(scores, truth, draws).items()
        }
        for method, vectors in methods.items()
    }
    tied = macro_figures(np.zeros(truth.shape), truth, draws)
    suffixes = ("", "_folds") if folds else ("",)
    figures["random"] = {
        f"{prefix}{figure}{suffix}": estimate
        for prefix in probes
        for suffix in suffixes
        for figure, estimate in tied.items()
    }
    return "random", figures, {"labels": len(seen), "labels_left_out": len(labels.names(labels.held_out)) - len(seen)}


def _all_answers(
    probes: dict[str, Probe],
    vectors: np.ndarray,
    training: np.ndarray,
    known: np.ndarray,
    held_out: np.ndarray,
    truth: np.ndarray,
    folds: Folds,
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Name of the probe, "" or `_folds`, and its answers: trained on the training songs, or out of fold."""
    asked = vectors[held_out]
    for name, probe in probes.items():
        yield name, "", probe(vectors[training], known, asked)
        if folds:
            parts = [probe(asked[learn], truth[learn], asked[ask]) for learn, ask in folds]
            order = np.argsort(np.concatenate([ask for _, ask in folds]))
            yield name, "_folds", np.concatenate(parts)[order]


def linear_labels(vectors: np.ndarray, known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """What logistic regression answers, str [asked]; the only label there is, when there is one."""
    from sklearn.linear_model import LogisticRegression

    if len(np.unique(known)) == 1:
        return np.full(len(asked), known[0])
    learn, ask = _standardised(vectors, asked)
    return LogisticRegression(max_iter=MAX_ITERATIONS).fit(learn, known).predict(ask)


def linear_scores(vectors: np.ndarray, known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Log-odds, float [asked, labels], of one logistic regression a label; 0 for a label that all known songs have, or
    none.

    `known`: bool [songs, labels].
    """
    from sklearn.linear_model import LogisticRegression

    learn, ask = _standardised(vectors, asked)
    scores = np.zeros((len(asked), known.shape[1]))
    for label in np.flatnonzero(known.any(axis=0) & ~known.all(axis=0)):
        scores[:, label] = (
            LogisticRegression(max_iter=MAX_ITERATIONS).fit(learn, known[:, label]).decision_function(ask)
        )
    return scores


def _standardised(learn: np.ndarray, ask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(learn)
    return scaler.transform(learn), scaler.transform(ask)


def _neighbor_labels(neighbors: int) -> Probe:
    """The commonest label of the nearest songs; of equals the first in the alphabet."""
    from sklearn.neighbors import KNeighborsClassifier

    return lambda vectors, known, asked: (
        KNeighborsClassifier(min(neighbors, len(vectors)), metric="cosine").fit(vectors, known).predict(asked)
    )


def _neighbor_shares(neighbors: int) -> Probe:
    """The share of the nearest songs that have each label."""
    from sklearn.neighbors import KNeighborsRegressor

    return lambda vectors, known, asked: (
        KNeighborsRegressor(min(neighbors, len(vectors)), metric="cosine")
        .fit(vectors, known.astype(np.float64))
        .predict(asked)
    )
