"""What stands beside a recommendation figure so that it can be believed: controls that know nothing of the sound."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from htcl_ray.evaluation.recommendation import ColdStartTask, Scores, evaluate_scores, periods_before, vector_scores
from htcl_ray.schemas import Split

SHUFFLES = 10
"""Permutations that the shuffled control is averaged over; one alone is as noisy as a single random ranking."""


def random_scores(task: ColdStartTask) -> Scores:
    """All candidates tied, so that the metrics are their exact expectation over random orders."""
    return lambda rows: np.zeros((len(task.users[rows]), len(task.cold)))


def genre_popularity(
    songs: Sequence[str], splits: Sequence[str], genres: Sequence[str | None], events: pd.DataFrame, split: str
) -> np.ndarray:
    """float64 [catalogue]: positive training events per training song of the song's genre.

    A cold song has no popularity of its own. `genres`: first genre of each catalogue row; songs without one form a class of their own,
    and a genre without training songs has 0. Training events are those of users who are not held out, on songs of the train split, in
    the periods before that of `split`.
    """
    frame = pd.DataFrame({"genre": [genre or "" for genre in genres], "train": np.asarray(splits) == Split.TRAIN}, index=list(songs))
    counted = (events["value"] > 0) & ~events["held_out_user"].astype(bool)
    earlier = periods_before(events, split)
    if earlier is not None:
        counted &= events["period"].isin(earlier)
    plays = events.loc[counted, "song_id"].value_counts().reindex(frame.index, fill_value=0)
    rate = plays[frame["train"]].groupby(frame.loc[frame["train"], "genre"]).mean()
    return frame["genre"].map(rate).fillna(0.0).to_numpy(dtype=np.float64)


def shared_scores(task: ColdStartTask, of_song: np.ndarray) -> Scores:
    """The same scores for every user; `of_song`: [catalogue]."""
    row = of_song[task.cold]
    return lambda rows: np.broadcast_to(row, (len(task.users[rows]), len(row)))


def shuffled_metrics(task: ColdStartTask, vectors: np.ndarray, ks: Sequence[int], seed: int) -> dict[str, np.ndarray]:
    """The metrics of `vectors` [catalogue, dim] dealt out to the wrong songs: the same geometry, without its meaning.

    Float64 [users] each, the mean over `SHUFFLES` permutations of the whole catalogue.
    """
    generator = np.random.default_rng(seed)
    draws = [evaluate_scores(task, vector_scores(task, vectors[generator.permutation(len(vectors))]), ks) for _ in range(SHUFFLES)]
    return {name: np.mean([draw[name] for draw in draws], axis=0) for name in draws[0]}
