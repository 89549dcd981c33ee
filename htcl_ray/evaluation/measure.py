"""All figures of one evaluation: catalogue, vectors and log in, the figures of the report out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from htcl_ray.evaluation import baselines, recommendation, semantic
from htcl_ray.schemas import Split
from htcl_ray.settings import EvaluateSettings

BLEND = "blend_0.5"


@dataclass(frozen=True)
class Songs:
    """The catalogue, sorted by id; row i of each space is song i's unit-norm vector."""

    ids: list[str]
    texts: list[str]
    splits: np.ndarray
    metadata: pa.Table
    spaces: dict[str, np.ndarray]

    def labels(self, column: str) -> list[str | None]:
        """A metadata column as one label a song: of several values the first, null when there is none."""
        values = [value[0] if isinstance(value, list) and value else value for value in self.metadata[column].to_pylist()]
        return [str(value) if value not in (None, "", []) else None for value in values]


def with_blend(spaces: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds to semantic and preference vectors the space whose inner product is the mean of both cosines."""
    if "preference" not in spaces:
        return spaces
    return {**spaces, BLEND: np.concatenate([spaces["semantic"], spaces["preference"]], axis=1) / np.float32(np.sqrt(2))}


def held_out_texts(songs: Songs, split: str) -> list[str]:
    """The unique texts of the songs of a split, sorted."""
    return sorted({text for text, of in zip(songs.texts, songs.splits, strict=True) if of == split})


def measure(
    songs: Songs, texts: Sequence[str], queries: dict[str, np.ndarray], log: pd.DataFrame | None, settings: EvaluateSettings
) -> dict[str, Any]:
    """`data`, `spaces`, `semantic` and `recommendation` of the report (see report.py).

    `texts`: the unique texts of the held-out songs; `queries`: their vectors [texts, dim] in each space of `songs`; `log`: columns of
    schemas.EVENTS, or None.
    """
    held_out = np.flatnonzero(songs.splits == settings.split)
    training = np.flatnonzero(songs.splits == Split.TRAIN)
    place = {text: i for i, text in enumerate(texts)}
    text_of_song = np.array([place[songs.texts[row]] for row in held_out])
    artists = songs.labels("artist")
    here, there = ({artists[row] for row in rows} - {None} for rows in (held_out, training))
    labels = songs.labels(settings.probe_column)
    return {
        "data": {
            "split": settings.split,
            "songs": len(held_out),
            "unique_texts": len(texts),
            "artists": len(here),
            "artists_also_in_training": len(here & there),
            "training_songs": len(training),
        },
        "spaces": list(songs.spaces),
        "semantic": {
            space: {
                **semantic.retrieval(vectors[held_out], queries[space], text_of_song, settings.ks),
                "probe": _probe(settings.probe_column, labels, vectors, training, held_out),
            }
            for space, vectors in songs.spaces.items()
        },
        "recommendation": _recommendation(songs, log, settings) if log is not None else None,
    }


def _probe(column: str, labels: list[str | None], vectors: np.ndarray, training: np.ndarray, held_out: np.ndarray) -> dict[str, Any] | None:
    found = semantic.linear_probe(vectors[training], [labels[i] for i in training], vectors[held_out], [labels[i] for i in held_out])
    return {"column": column, **found} if found else None


def _recommendation(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings) -> dict[str, Any] | None:
    task = recommendation.cold_start_task(songs.ids, songs.splits.tolist(), log, settings.split, settings.min_history)
    if not task.users:
        return None
    scores = {space: recommendation.vector_scores(task, vectors) for space, vectors in songs.spaces.items() if space != BLEND}
    if "preference" in scores:
        scores[BLEND] = recommendation.blended_scores(scores["semantic"], scores["preference"], 0.5)
    popularity = baselines.genre_popularity(songs.ids, songs.splits.tolist(), songs.labels("genre"), log, settings.split)
    scores["random"] = baselines.random_scores(task)
    scores["popularity"] = baselines.shared_scores(task, popularity)
    metrics = {name: recommendation.evaluate_scores(task, score, settings.ks) for name, score in scores.items()}
    last = songs.spaces.get("preference", songs.spaces["semantic"])
    metrics["shuffled"] = baselines.shuffled_metrics(task, last, settings.ks, settings.seed)
    means = {name: recommendation.mean_over_users(values) for name, values in metrics.items()}
    finite = {name: {figure: value if np.isfinite(value) else None for figure, value in row.items()} for name, row in means.items()}
    return {"task": task.counts, "methods": finite}
