"""Recommendation tasks: which songs a user will like next, for new and known users, and for cold and hot songs.

A song is cold when it is in the held-out split: no training pair contains it, and no method is told of events on it before the evaluated
period. A song is hot when it is in the train split and training users received it positively before that period. New users are those
whose events made no training pair (held out); known users are the others.

A user's history is what they received positively before the evaluated period, outside the held-out split; their targets are the candidates
that they received positively in that period. A candidate that they have met before it, as song or as trigger, is left out of theirs. Logs
without times (affinity) have no period: history and targets are then all positives outside and inside the held-out split, and hot songs
have no task. A song is positive for a user when any of their events on it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from htcl_ray.evaluation import bootstrap
from htcl_ray.evaluation.baselines import Scorer, baselines, blended_scorer, shuffled_scorers, vector_scorer
from htcl_ray.evaluation.bootstrap import Draws, Estimate
from htcl_ray.evaluation.breadth import Lists, breadth, pick
from htcl_ray.evaluation.figures import Task
from htcl_ray.evaluation.item_auc import ItemQuestions, item_auc, item_questions
from htcl_ray.evaluation.periods import hot_songs, periods_before
from htcl_ray.evaluation.songs import BLEND, Songs
from htcl_ray.evaluation.ties import expected_metrics
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.settings import EvaluateSettings

CELLS = 2**23
"""Scores held at once: 32 MiB of fp32."""
BLENDS = tuple(round(0.1 * step, 1) for step in range(11))
TASKS = (("cold", "cold songs, new users"), ("cold_known_users", "cold songs, known users"))
HOT_TASKS = (("hot", "hot songs, new users"), ("hot_known_users", "hot songs, known users"))


@dataclass(frozen=True)
class Questions:
    """One question for each user, in order of user id. Lists are a user's; `candidates` and `history` are catalogue rows."""

    users: list[str]
    candidates: np.ndarray
    """int [candidates], sorted."""
    history: list[np.ndarray]
    """int, sorted, unique."""
    targets: list[np.ndarray]
    """int, positions in `candidates`."""
    met: list[np.ndarray]
    """int, positions in `candidates`, which are none of theirs."""
    counts: dict[str, int]
    """What the task is made of, and who is left out."""


def recommendation_tasks(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings) -> list[Task]:
    """`cold`, `cold_known_users`, `hot` and `hot_known_users`, without those in which nobody can be asked. `log`: schemas.EVENTS."""
    cold = songs.splits == settings.split
    hot = hot_songs(songs, log, settings.split)
    tasks = []
    for names, candidates in ((TASKS, cold), (HOT_TASKS, hot)):
        for (name, title), known_users in zip(names, (False, True), strict=True):
            asked = questions(songs.ids, candidates, cold, log, settings, known_users=known_users)
            if asked.users:
                items = item_questions(songs.ids, candidates, cold, log, settings, known_users=known_users) if candidates is cold else None
                tasks.append(_task(name, title, songs, log, asked, items, settings))
    return tasks


def blend_curve(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings) -> list[dict]:
    """NDCG@k, recall@k (the largest k) and user AUC of cold songs and new users at blend 0, 0.1 … 1; empty without stage 2.

    Each entry: `blend`, and `cold` with value, low and high of each figure.
    """
    cold = songs.splits == settings.split
    asked = questions(songs.ids, cold, cold, log, settings)
    if "preference" not in songs.spaces or not asked.users:
        return []
    draws = bootstrap.draw(asked.users, settings.resamples, settings.seed)
    ends = vector_scorer(songs.spaces["semantic"]), vector_scorer(songs.spaces["preference"])
    k, curve = max(settings.ks), []
    for blend in BLENDS:
        figures = user_figures(asked, [blended_scorer(*ends, blend)], (k,), draws)
        points = {}
        for name in (f"ndcg@{k}", f"recall@{k}", "user_auc"):
            low, high = figures[name].interval or (None, None)
            points[name] = {"value": figures[name].value, "low": low, "high": high}
        curve.append({"blend": blend, "cold": points})
    return curve


def questions(
    songs: Sequence[str],
    candidates: np.ndarray,
    cold: np.ndarray,
    events: pd.DataFrame,
    settings: EvaluateSettings,
    *,
    known_users: bool = False,
) -> Questions:
    """What a log asks on a catalogue.

    `songs`: ids of the catalogue rows; `candidates` and `cold`: bool [catalogue]; `events`: columns of schemas.EVENTS. Users with fewer
    than `evaluate.min_history` history songs or without a target are left out and counted; of more than `evaluate.max_users` the rest.
    """
    row_of = {song: row for row, song in enumerate(songs)}
    rows = np.flatnonzero(candidates)
    position = np.full(len(row_of), -1)
    position[rows] = np.arange(len(rows))
    earlier = periods_before(events, settings.split)
    table = pd.DataFrame({"user": events["user_id"], "row": events["song_id"].map(row_of), "positive": events["value"] > 0})
    table["trigger"] = events["trigger_song_id"].map(row_of)
    table["before"] = events["period"].isin(earlier) if earlier is not None else True
    table["during"] = events["period"] == settings.split if earlier is not None else True
    table["known"] = table["row"].notna()
    ours = table[events["held_out_user"].to_numpy(dtype=bool) != known_users]
    users, history, targets, met = [], [], [], []
    short_history = no_target = 0
    for user, mine in ours.groupby("user", sort=True):
        liked = mine[mine["positive"] & mine["known"]]
        past = np.unique(liked.loc[liked["before"], "row"].to_numpy(dtype=np.int64))
        past = past[~cold[past]]
        heard = mine[mine["before"]] if earlier is not None else mine.iloc[:0]
        seen = np.unique(pd.concat([heard["row"], heard["trigger"]]).dropna().to_numpy(dtype=np.int64))
        new = np.unique(liked.loc[liked["during"], "row"].to_numpy(dtype=np.int64))
        new = np.setdiff1d(new[candidates[new]], seen)
        if len(past) < settings.min_history:
            short_history += 1
        elif not len(new):
            no_target += 1
        else:
            users.append(str(user))
            history.append(past)
            targets.append(position[new])
            met.append(position[seen[candidates[seen]]])
    kept = chosen_users(users, settings.max_users)
    history, targets, met = ([part[row] for row in kept] for part in (history, targets, met))
    counts = {
        "users": len(kept),
        "candidates": len(rows),
        "targets": sum(map(len, targets)),
        "history_songs": sum(map(len, history)),
        "users_with_short_history": short_history,
        "users_without_target": no_target,
        "users_not_drawn": len(users) - len(kept),
        "events_of_unknown_songs": int((~table["known"]).sum()),
    }
    return Questions([users[row] for row in kept], rows, history, targets, met, counts)


def chosen_users(users: Sequence[str], most: int | None) -> list[int]:
    """Rows of at most `most` users, by a hash of their ids, in the order given."""
    if most is None or len(users) <= most:
        return list(range(len(users)))
    place = np.argsort([hash_fraction(user, "evaluated user") for user in users], kind="stable")
    return sorted(place[:most].tolist())


def user_figures(asked: Questions, scorers: Sequence[Scorer], ks: Sequence[int], draws: Draws) -> dict[str, Estimate]:
    """Means over users of `hit_rate@k`, `recall@k`, `ndcg@k`, `mrr` and `user_auc`; of several scorers (shuffles) the mean."""
    every = np.mean([_per_user(asked, scorer, ks) for scorer in scorers], axis=0)
    names = [f"{figure}@{k}" for k in ks for figure in ("hit_rate", "recall", "ndcg")] + ["mrr", "user_auc"]
    return {name: bootstrap.mean(every[:, column], draws) for column, name in enumerate(names)}


def _per_user(asked: Questions, scorer: Scorer, ks: Sequence[int]) -> np.ndarray:
    """float64 [users, figures], in the order of `user_figures`."""
    found = []
    for user, row, candidate in _rows(asked, scorer):
        relevant = np.zeros(len(asked.candidates), dtype=bool)
        relevant[asked.targets[user]] = True
        found.append(list(expected_metrics(row[candidate], relevant[candidate], ks).values()))
    return np.array(found, dtype=np.float64)


def _rows(asked: Questions, scorer: Scorer):  # type: ignore[no-untyped-def]
    """Each user's number, scores of all candidates, and which of them are theirs."""
    at_once = max(1, CELLS // max(1, len(asked.candidates)))
    for start in range(0, len(asked.users), at_once):
        block = scorer(asked.history[start : start + at_once], asked.candidates)
        for user, row in enumerate(block, start):
            candidate = np.ones(len(asked.candidates), dtype=bool)
            candidate[asked.met[user]] = False
            yield user, row, candidate


def _task(
    name: str, title: str, songs: Songs, log: pd.DataFrame, asked: Questions, items: ItemQuestions | None, settings: EvaluateSettings
) -> Task:
    draws = bootstrap.draw(asked.users, settings.resamples, settings.seed)
    scorers: dict[str, list[Scorer]] = {space: [vector_scorer(vectors)] for space, vectors in songs.spaces.items() if space != BLEND}
    if BLEND in songs.spaces:
        scorers[BLEND] = [blended_scorer(scorers["semantic"][0], scorers["preference"][0], 0.5)]
    found, missing = baselines(songs, log, settings, hot=items is None)
    scorers |= found
    scorers["shuffled"] = shuffled_scorers(songs.spaces.get("preference", songs.spaces["semantic"]), settings.seed)
    methods = {method: user_figures(asked, of, settings.ks, draws) for method, of in scorers.items()}
    popularity = _popularity(songs, log, asked, settings)
    artists = np.asarray(songs.artists)[asked.candidates]
    k = max(settings.ks)
    for method, of in scorers.items():
        lists = Lists([pick(row, candidate, k, user, settings.seed) for user, row, candidate in _rows(asked, of[0])], artists, popularity)
        methods[method] |= breadth(lists, k, draws)
    counts = asked.counts | missing
    if items is not None and len(items.songs):
        drawn = bootstrap.draw([songs.artists[row] for row in items.songs], settings.resamples, settings.seed)
        counts = counts | {"item_auc_songs": len(items.songs), "item_auc_users": len(items.history)}
        for method, of in scorers.items():
            methods[method]["item_auc"] = bootstrap.mean(np.nanmean([item_auc(items, scorer) for scorer in of], axis=0), drawn)
    return Task(name, title, "users", "users", "random", methods, counts)


def _popularity(songs: Songs, log: pd.DataFrame, asked: Questions, settings: EvaluateSettings) -> np.ndarray:
    """Positive events of each candidate, of all users: before the evaluated period, or for cold songs, which have no past, within it."""
    earlier = periods_before(log, settings.split)
    is_cold = (songs.splits[asked.candidates] == settings.split).all()
    counted = log["value"] > 0
    if earlier is not None:
        counted &= (log["period"] == settings.split) if is_cold else log["period"].isin(earlier)
    plays = log.loc[counted, "song_id"].value_counts()
    return np.array([plays.get(songs.ids[row], 0) for row in asked.candidates], dtype=np.float64)
