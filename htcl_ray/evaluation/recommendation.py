"""Recommendation of cold songs to held-out users: which of the songs that no training pair contains a user will like.

Who and what: users whose events made no training pair, and songs of the held-out split. A user's history is what they received
positively before the evaluated period, among songs outside the held-out split; their targets are the cold songs that they received
positively in that period. Every cold song that they have not met before it (as song or as trigger) is a candidate. Logs without times
(affinity) have no period: history and targets are then all positives outside and inside the held-out split, and nothing is left out.
A song is positive for a user when any of their events on it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from htcl_ray.evaluation.ties import expected_metrics
from htcl_ray.schemas import Split

USERS_AT_ONCE = 256

Scores = Callable[[slice], np.ndarray]
"""A range of the task's users → float [users, cold songs]; higher is better."""


@dataclass(frozen=True)
class ColdStartTask:
    """The questions: one for each user, in order of user id. Lists are a user's; integers in `history` and `cold` are catalogue rows."""

    users: list[str]
    cold: np.ndarray
    """int [cold songs]."""
    history: list[np.ndarray]
    """int, sorted, unique."""
    targets: list[np.ndarray]
    """int, positions in `cold`."""
    met: list[np.ndarray]
    """int, positions in `cold`: no candidates."""
    counts: dict[str, int]
    """What the task is made of, and who is left out."""


def cold_start_task(
    songs: Sequence[str], splits: Sequence[str], events: pd.DataFrame, split: str = "test", min_history: int = 1
) -> ColdStartTask:
    """The task that a log poses on a catalogue.

    `songs` and `splits`: id and split of each catalogue row; `events`: columns of schemas.EVENTS; `split`: test or validation, the held-out
    songs and the evaluated period. Users with fewer than `min_history` history songs or without a target are left out and counted.
    """
    row_of = {song: row for row, song in enumerate(songs)}
    is_cold = np.asarray(splits) == split
    cold = np.flatnonzero(is_cold)
    position = np.full(len(row_of), -1)
    position[cold] = np.arange(len(cold))
    row = events["song_id"].map(row_of)
    trigger = events["trigger_song_id"].map(row_of)
    earlier = periods_before(events, split)
    before = during = pd.Series(True, index=events.index)
    if earlier is not None:
        before, during = events["period"].isin(earlier), events["period"] == split
    table = pd.DataFrame({"user": events["user_id"], "row": row, "trigger": trigger, "positive": events["value"] > 0})
    table["before"], table["during"], table["known"] = before, during, row.notna()
    users, history, targets, met = [], [], [], []
    short_history = no_target = 0
    for user, mine in table[events["held_out_user"].to_numpy(dtype=bool)].groupby("user", sort=True):
        liked = mine[mine["positive"] & mine["known"]]
        past = np.unique(liked.loc[liked["before"], "row"].to_numpy(dtype=np.int64))
        past = past[~is_cold[past]]
        heard = mine[mine["before"]] if earlier is not None else mine.iloc[:0]
        seen = np.unique(pd.concat([heard["row"], heard["trigger"]]).dropna().to_numpy(dtype=np.int64))
        new = np.unique(liked.loc[liked["during"], "row"].to_numpy(dtype=np.int64))
        new = np.setdiff1d(new[is_cold[new]], seen)
        if len(past) < min_history:
            short_history += 1
        elif not len(new):
            no_target += 1
        else:
            users.append(str(user))
            history.append(past)
            targets.append(position[new])
            met.append(position[seen[is_cold[seen]]])
    counts = {
        "users": len(users),
        "cold_songs": len(cold),
        "targets": sum(map(len, targets)),
        "history_songs": sum(map(len, history)),
        "users_with_short_history": short_history,
        "users_without_target": no_target,
        "events_of_unknown_songs": int((~table["known"]).sum()),
    }
    return ColdStartTask(users, cold, history, targets, met, counts)


def evaluate_scores(task: ColdStartTask, scores: Scores, ks: Sequence[int]) -> dict[str, np.ndarray]:
    """Each metric of `ties.expected_metrics` as float64 [users]."""
    rows = []
    for start in range(0, len(task.users), USERS_AT_ONCE):
        block = scores(slice(start, start + USERS_AT_ONCE))
        for user, row in enumerate(block, start):
            relevant = np.zeros(len(task.cold), dtype=bool)
            relevant[task.targets[user]] = True
            candidate = np.ones(len(task.cold), dtype=bool)
            candidate[task.met[user]] = False
            rows.append(expected_metrics(row[candidate], relevant[candidate], ks))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def mean_over_users(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean of each metric. A user all of whose candidates are targets has no AUC and is left out of it."""
    return {name: float(np.nanmean(values)) if not np.isnan(values).all() else float("nan") for name, values in metrics.items()}


def vector_scores(task: ColdStartTask, vectors: np.ndarray) -> Scores:
    """Inner product of a user's vector with every cold song; `vectors`: [catalogue, dim], unit norm."""
    users = user_vectors(vectors, task.history)
    cold = vectors[task.cold]
    return lambda rows: users[rows] @ cold.T


def blended_scores(first: Scores, second: Scores, blend: float) -> Scores:
    """(1 − blend) · first + blend · second, as the index blends."""
    return lambda rows: (1 - blend) * first(rows) + blend * second(rows)


def user_vectors(vectors: np.ndarray, history: Sequence[np.ndarray]) -> np.ndarray:
    """[users, dim]: the mean of the vectors of a user's songs, scaled to unit norm (zero stays zero)."""
    means = np.stack([vectors[rows].mean(axis=0) for rows in history])
    norms = np.linalg.norm(means, axis=1, keepdims=True)
    return means / np.where(norms > 0, norms, 1)


def periods_before(events: pd.DataFrame, split: str) -> list[str] | None:
    """Periods that end before the evaluated one begins; None when the log has no times."""
    if events["timestamp"].isna().all():
        return None
    order = [Split.TRAIN, Split.VALIDATION, Split.TEST]
    return [str(period) for period in order[: order.index(Split(split))]]
