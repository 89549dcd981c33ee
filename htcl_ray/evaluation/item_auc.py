"""Item AUC: for a cold song, whether users who liked it score higher for it than users who did not.

Popularity, the same for all users, orders no users: it scores exactly 0.5, however skewed a log is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from htcl_ray.evaluation.baselines import Scorer
from htcl_ray.evaluation.metrics import auc
from htcl_ray.evaluation.periods import periods_before
from htcl_ray.settings import EvaluateSettings

CELLS = 2**23


@dataclass(frozen=True)
class ItemQuestions:
    """One question for each song that enough users liked and enough did not."""

    songs: np.ndarray
    """int [songs], catalogue rows."""
    history: list[np.ndarray]
    """Of each user: int, catalogue rows."""
    positive: list[np.ndarray]
    """Of each song: int, numbers of users."""
    negative: list[np.ndarray]


def item_questions(
    songs: Sequence[str],
    candidates: np.ndarray,
    cold: np.ndarray,
    events: pd.DataFrame,
    settings: EvaluateSettings,
    *,
    known_users: bool = False,
) -> ItemQuestions:
    """The candidates with at least `evaluate.min_item_users` positive and as many negative users in the evaluated period.

    Users have a history of at least `evaluate.min_history` songs and have not met the song before the period. When the log has events that
    are not positive (feedback), negatives are users who were exposed to the song in the period and not positive; otherwise all others.
    """
    row_of = {song: row for row, song in enumerate(songs)}
    earlier = periods_before(events, settings.split)
    ours = events[events["held_out_user"].to_numpy(dtype=bool) != known_users]
    table = pd.DataFrame({"user": ours["user_id"], "row": ours["song_id"].map(row_of), "trigger": ours["trigger_song_id"].map(row_of)})
    table["positive"] = ours["value"] > 0
    before = ours["period"].isin(earlier) if earlier is not None else pd.Series(True, index=ours.index)
    during = ours["period"] == settings.split if earlier is not None else before
    past = table[before & table["positive"] & table["row"].notna()]
    past = past[~cold[past["row"].to_numpy(dtype=np.int64)]]
    history = past.groupby("user", sort=True)["row"].agg(lambda rows: np.unique(rows.to_numpy(dtype=np.int64)))
    history = history[history.map(len) >= settings.min_history]
    number = {user: place for place, user in enumerate(history.index)}
    met: set[tuple[int, int]] = set()
    if earlier is not None:
        heard = table[before & table["user"].isin(number)]
        for column in ("row", "trigger"):
            known = heard[heard[column].notna()]
            met |= set(zip(known["user"].map(number), known[column].astype(np.int64), strict=True))
    asked = table[during & table["row"].notna() & table["user"].isin(number)]
    asked = asked.assign(user=asked["user"].map(number), row=asked["row"].astype(np.int64))
    asked = asked[candidates[asked["row"].to_numpy(dtype=np.int64)]]
    feedback = bool((events["value"] <= 0).any())
    everyone = np.arange(len(history))
    rows: list[int] = []
    positives: list[np.ndarray] = []
    negatives: list[np.ndarray] = []
    for row, mine in asked.groupby("row", sort=True):
        liked = np.unique(mine.loc[mine["positive"], "user"].to_numpy(dtype=np.int64))
        others = np.setdiff1d(mine["user"].to_numpy(dtype=np.int64) if feedback else everyone, liked)
        positive, negative = ([user for user in users.tolist() if (user, row) not in met] for users in (liked, others))
        if min(len(positive), len(negative)) >= settings.min_item_users:
            rows.append(int(row))
            positives.append(np.array(positive))
            negatives.append(np.array(negative))
    return ItemQuestions(np.array(rows, dtype=np.int64), history.tolist(), positives, negatives)


def item_auc(asked: ItemQuestions, scorer: Scorer) -> np.ndarray:
    """Float64 [songs]: probability that a positive user scores higher for the song than a negative one, ties half."""
    found = []
    at_once = max(1, CELLS // max(1, len(asked.history)))
    for start in range(0, len(asked.songs), at_once):
        scores = scorer(asked.history, asked.songs[start : start + at_once])
        for place, column in enumerate(scores.T, start):
            positive, negative = asked.positive[place], asked.negative[place]
            relevant = np.r_[np.ones(len(positive), dtype=bool), np.zeros(len(negative), dtype=bool)]
            found.append(float(auc([column[np.r_[positive, negative]]], [relevant])[0]))
    return np.array(found)
