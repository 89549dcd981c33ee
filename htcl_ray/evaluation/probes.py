"""What the vectors know of a catalogue column: a linear probe and a nearest-neighbour probe, for one label a song or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.bootstrap import Draws, Estimate
from htcl_ray.evaluation.figures import Task
from htcl_ray.evaluation.songs import Songs
from htcl_ray.evaluation.weighted import weighted_auc, weighted_average_precision
from htcl_ray.schemas import Split
from htcl_ray.settings import EvaluateSettings

MAX_TRAINING_SONGS = 20_000
"""Songs that a probe learns from; of more, these are drawn."""

Fit = Callable[[np.ndarray, np.ndarray], Callable[[np.ndarray], np.ndarray]]
"""Vectors [songs, dim] and targets → a function of vectors: the labels named, or (several labels a song) a score for each label."""


def probe_task(songs: Songs, column: str, held_out: np.ndarray, draws: Draws, settings: EvaluateSettings) -> Task | None:
    """The probes of one column, or None when there is nothing to tell apart.

    `held_out`: int rows that are asked; `draws`: of these rows. A column whose songs have one value at most is classified (accuracy;
    a label that training never had counts as an error); otherwise every label is a yes or no of its own (`roc_auc`, `map`: means over
    the labels that some held-out songs have and others have not).
    """
    values = songs.values(column)
    training = _drawn(np.flatnonzero((songs.splits == Split.TRAIN) & np.array([bool(v) for v in values])), settings.seed)
    asked = np.array([place for place, row in enumerate(held_out) if values[row]], dtype=np.int64)
    if not len(asked) or len({value for row in training for value in values[row]}) < 2:
        return None
    several = any(len(value) > 1 for value in values)
    measure = _several_labels if several else _one_label
    return measure(songs, column, values, training, held_out[asked], draws.of(asked), settings)


def _drawn(rows: np.ndarray, seed: int) -> np.ndarray:
    if len(rows) <= MAX_TRAINING_SONGS:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, MAX_TRAINING_SONGS, replace=False))


def _one_label(
    songs: Songs, column: str, values: list[list[str]], training: np.ndarray, asked: np.ndarray, draws: Draws, settings: EvaluateSettings
) -> Task:
    known = np.array([values[row][0] for row in training])
    truth = np.array([values[row][0] for row in asked])
    folds = _folds([songs.artists[row] for row in asked], settings.folds) if len(set(truth)) > 1 else []
    fits = {"accuracy": _linear, "knn_accuracy": _nearest(settings.neighbors)}

    def figures(vectors: np.ndarray) -> dict[str, Estimate]:
        found = {}
        for name, fit in fits.items():
            right = fit(vectors[training], known)(vectors[asked]) == truth
            found[name] = bootstrap.mean(right.astype(np.float64), draws)
            if folds:
                found[f"{name}_folds"] = bootstrap.mean(_out_of_fold(fit, vectors[asked], truth, folds), draws)
        return found

    classes, counts = np.unique(known, return_counts=True)
    always = bootstrap.mean((truth == classes[counts.argmax()]).astype(np.float64), draws)
    methods = {name: figures(vectors) for name, vectors in _methods(songs, settings.seed).items()}
    methods["commonest"] = {name: always for name in next(iter(methods.values()))}
    sizes = {
        "classes": len(classes),
        "train_songs": len(training),
        "test_songs": len(asked),
        "unseen_label_songs": int((~np.isin(truth, classes)).sum()),
        "folds": len(folds),
    }
    return Task(f"probe_{column}", f"probe: {column}", "songs", "artists", "commonest", methods, sizes)


def _several_labels(
    songs: Songs, column: str, values: list[list[str]], training: np.ndarray, asked: np.ndarray, draws: Draws, settings: EvaluateSettings
) -> Task | None:
    labels = sorted({value for row in training for value in values[row]})
    place = {label: number for number, label in enumerate(labels)}
    known, truth = (_indicator(values, rows, place) for rows in (training, asked))
    kept = truth.any(axis=0) & ~truth.all(axis=0) & known.any(axis=0) & ~known.all(axis=0)
    if not kept.any():
        return None
    known, truth = known[:, kept], truth[:, kept]
    methods = {}
    for name, vectors in _methods(songs, settings.seed).items():
        linear = _linear_scores(vectors[training], known)(vectors[asked])
        nearest = _neighbor_shares(settings.neighbors)(vectors[training], known)(vectors[asked])
        found = label_figures(linear, truth, draws)
        methods[name] = {**found, **{f"knn_{figure}": item for figure, item in label_figures(nearest, truth, draws).items()}}
    chance = label_figures(np.zeros(truth.shape), truth, draws)
    methods["random"] = {**chance, **{f"knn_{figure}": item for figure, item in chance.items()}}
    sizes = {"labels": int(kept.sum()), "train_songs": len(training), "test_songs": len(asked), "labels_left_out": int((~kept).sum())}
    return Task(f"probe_{column}", f"probe: {column}", "songs", "artists", "random", methods, sizes)


def label_figures(scores: np.ndarray, truth: np.ndarray, draws: Draws) -> dict[str, Estimate]:
    """`roc_auc` and `map`: means over labels of ROC-AUC and average precision; `scores` float and `truth` bool, both [songs, labels].

    Equal scores give chance: 0.5, and the label's share of songs. A resample leaves out a label of which it has no example.
    """
    found = {}
    for name, statistic in (("roc_auc", weighted_auc), ("map", weighted_average_precision)):
        every = np.concatenate([np.ones((1, len(scores)), dtype=np.float32), draws.weights])
        rows = np.stack([statistic(scores[:, label], truth[:, label], every) for label in range(truth.shape[1])])
        there = ~np.isnan(rows)
        means = np.where(there, rows, 0).sum(axis=0) / np.maximum(there.sum(axis=0), 1)
        found[name] = Estimate(float(means[0]), len(scores), means[1:].astype(np.float32), draws.population)
    return found


def _methods(songs: Songs, seed: int) -> dict[str, np.ndarray]:
    """The spaces, raw log-mel statistics, and the vectors of the last stage dealt out to the wrong songs."""
    last = songs.spaces.get("preference", songs.spaces["semantic"])
    return {**songs.spaces, "log_mel": songs.log_mel, "shuffled": last[np.random.default_rng(seed).permutation(len(last))]}


def _folds(artists: Sequence[str], folds: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows to learn from and rows to ask, no artist in both; fewer folds when there are fewer artists, none for a single one."""
    from sklearn.model_selection import GroupKFold

    folds = min(folds, len(set(artists)))
    return list(GroupKFold(folds).split(np.zeros(len(artists)), groups=np.asarray(artists))) if folds > 1 else []


def _out_of_fold(fit: Fit, vectors: np.ndarray, truth: np.ndarray, folds: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    right = np.zeros(len(truth))
    for learned, asked in folds:
        names = np.unique(truth[learned])
        named = fit(vectors[learned], truth[learned])(vectors[asked]) if len(names) > 1 else np.repeat(names, len(asked))
        right[asked] = named == truth[asked]
    return right


def _linear(vectors: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000)).fit(vectors, targets).predict


def _nearest(neighbors: int) -> Fit:
    from sklearn.neighbors import KNeighborsClassifier

    def fit(vectors: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        return KNeighborsClassifier(min(neighbors, len(vectors)), metric="cosine").fit(vectors, targets).predict

    return fit


def _linear_scores(vectors: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """One logistic regression a label."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(vectors)
    scaled = scaler.transform(vectors)
    fitted = [LogisticRegression(max_iter=2000).fit(scaled, targets[:, label]) for label in range(targets.shape[1])]
    return lambda asked: np.stack([one.decision_function(scaler.transform(asked)) for one in fitted], axis=1)


def _neighbor_shares(neighbors: int) -> Fit:
    """The share of the nearest training songs that have each label."""
    from sklearn.neighbors import NearestNeighbors

    def fit(vectors: np.ndarray, targets: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        index = NearestNeighbors(n_neighbors=min(neighbors, len(vectors)), metric="cosine").fit(vectors)
        return lambda asked: targets[index.kneighbors(asked, return_distance=False)].mean(axis=1)

    return fit


def _indicator(values: list[list[str]], rows: np.ndarray, place: dict[str, int]) -> np.ndarray:
    """Bool [rows, labels]; labels that `place` does not know are left out."""
    found = np.zeros((len(rows), len(place)), dtype=bool)
    for number, row in enumerate(rows):
        found[number, [place[value] for value in values[row] if value in place]] = True
    return found
