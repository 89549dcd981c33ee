"""What stands beside the model so that a recommendation figure can be believed: controls, and methods that need no
encoder.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.tasks.collaborative import als_scorer, item_knn_scorer, listening_matrix
from htcl_ray.evaluation.tasks.periods import training_positives
from htcl_ray.evaluation.tasks.scorers import Scorer, shared_scorer, shuffled_scorers, vector_scorer
from htcl_ray.schemas import Split

SHUFFLES = 3
"""Permutations that the shuffled control is averaged over."""


def baselines(
    songs: Songs, events: pd.DataFrame, settings: EvaluateSettings, *, hot: bool
) -> tuple[dict[str, list[Scorer]], dict[str, int]]:
    """Scorers of the controls and baselines by name, and what could not be had, for the task's counts.

    random      all tied, so that the metrics are their exact expectation over random orders
    popularity  training positives of the song; of a cold song, which has none, those of its genre per training song
    shuffled    the model's last vectors dealt out to the wrong songs
    log_mel     raw log-mel statistics as vectors;  genre  genre labels as vectors
    item_knn, als (hot songs)  collaborative: they see training users and no sound
    """
    positives = training_positives(songs, events, settings.split)
    plays = positives["song_id"].value_counts().reindex(songs.ids, fill_value=0).to_numpy(dtype=np.float64)
    last = songs.spaces.get("preference", songs.spaces["semantic"])
    scorers = {
        "random": [shared_scorer(np.zeros(len(songs.ids)))],
        "popularity": [shared_scorer(plays if hot else genre_popularity(songs, plays))],
        "shuffled": shuffled_scorers(last, SHUFFLES, settings.seed),
        "log_mel": [vector_scorer(songs.log_mel)],
        "genre": [vector_scorer(genre_vectors(songs))],
    }
    missing = {}
    if hot:
        listened = listening_matrix(songs, positives)
        scorers["item_knn"] = [item_knn_scorer(listened)]
        als = als_scorer(listened, settings.seed)
        if als is None:
            missing["als_missing"] = 1
        else:
            scorers["als"] = [als]
    return scorers, missing


def genre_popularity(songs: Songs, plays: np.ndarray) -> np.ndarray:
    """Float64 [catalogue]: mean of `plays` over the training songs of the song's (first) genre.

    Songs without a genre form a class of their own; a genre without training songs has 0.
    """
    frame = pd.DataFrame({"genre": [genre or "" for genre in songs.labels("genre")], "plays": plays})
    rate = frame[songs.splits == Split.TRAIN].groupby("genre")["plays"].mean()
    return frame["genre"].map(rate).fillna(0.0).to_numpy(dtype=np.float64)


def genre_vectors(songs: Songs) -> np.ndarray:
    """float32 [catalogue, genres], unit norm: which genres a song has; zero for none."""
    values = songs.values("genre")
    place = {genre: number for number, genre in enumerate(sorted({genre for genres in values for genre in genres}))}
    found = np.zeros((len(values), max(1, len(place))), dtype=np.float32)
    for row, genres in enumerate(values):
        found[row, [place[genre] for genre in genres]] = 1
    norms = np.linalg.norm(found, axis=1, keepdims=True)
    return found / np.where(norms > 0, norms, 1)
