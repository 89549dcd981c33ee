"""Recommendation tasks: which songs a user will like next, for new and known users, and for cold and hot songs.

A song is cold when it is in the held-out split: no training pair contains it, and no method is told of events on it
before the evaluated period. A song is hot when it is in the train split and training users received it positively
before that period. New users are those whose events made no training pair (held out); known users are the others.

A user's history is what they received positively before the evaluated period, outside the held-out split; their targets
are the candidates that they received positively in that period. A candidate that they have met before it, as song or as
trigger, is left out of theirs. Logs without times (affinity) have no period: history and targets are then all positives
outside and inside the held-out split, and hot songs have no task.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import BLEND, Songs
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate, TwoWayDraws
from htcl_ray.evaluation.stats.ties import Credited, credited_metrics
from htcl_ray.evaluation.task_result import Task
from htcl_ray.evaluation.tasks.baselines import baselines
from htcl_ray.evaluation.tasks.item_auc import ItemQuestions, item_auc, item_questions
from htcl_ray.evaluation.tasks.list_coverage import breadth, top
from htcl_ray.evaluation.tasks.periods import hot_songs, periods_before
from htcl_ray.evaluation.tasks.recommendation_queries import Questions, listening, questions
from htcl_ray.evaluation.tasks.scorers import Scorer, blended_scorer, vector_scorer

CELLS = 2**22
"""Scores held at once: 16 MiB of fp32."""
BLENDS = tuple(round(0.1 * step, 1) for step in range(11))
TASKS = (("cold", "cold songs, new users"), ("cold_known_users", "cold songs, known users"))
HOT_TASKS = (("hot", "hot songs, new users"), ("hot_known_users", "hot songs, known users"))


def recommendation_tasks(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings) -> list[Task]:
    """`cold`, `cold_known_users`, `hot` and `hot_known_users`, without those in which nobody can be asked. `log`:
    schemas.EVENTS.
    """
    cold = songs.splits == settings.split
    heard = listening(songs.ids, cold, log, settings.split)
    tasks = []
    for names, candidates in ((TASKS, cold), (HOT_TASKS, hot_songs(songs, log, settings.split))):
        is_cold = candidates is cold
        asked = [questions(heard, candidates, settings, known_users=known) for known in (False, True)]
        if not any(one.users for one in asked):
            continue
        scorers, missing = _scorers(songs, log, settings, hot=not is_cold)
        popularity = _popularity(songs, log, settings, during=is_cold)
        for (name, title), known, one in zip(names, (False, True), asked, strict=True):
            if one.users:
                items = item_questions(heard, candidates, settings, known_users=known) if is_cold else None
                methods, counts = _figures(songs, one, items, scorers, popularity, settings)
                tasks.append(
                    Task(name, title, "users", "users and artists", "random", methods, one.counts | missing | counts)
                )
    return tasks


def blend_curve(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings) -> list[dict]:
    """NDCG@k, recall@k (the largest k) and user AUC of cold songs and new users at blend 0, 0.1 … 1; empty without
    stage 2.

    Each entry: `blend`, and `cold` with value, low and high of each figure.
    """
    cold = songs.splits == settings.split
    asked = questions(listening(songs.ids, cold, log, settings.split), cold, settings)
    if "preference" not in songs.spaces or not asked.users:
        return []
    draws = _draws(songs, asked, settings)
    ends = vector_scorer(songs.spaces["semantic"]), vector_scorer(songs.spaces["preference"])
    k, curve = max(settings.ks), []
    for blend in BLENDS:
        figures = user_figures([answers(asked, blended_scorer(*ends, blend), (k,), settings.seed)[0]], draws)
        points = {}
        for name in (f"ndcg@{k}", f"recall@{k}", "user_auc"):
            low, high = figures[name].interval or (None, None)
            points[name] = {"value": figures[name].value, "low": low, "high": high}
        curve.append({"blend": blend, "cold": points})
    return curve


def _draws(songs: Songs, asked: Questions, settings: EvaluateSettings) -> TwoWayDraws:
    """Of the users, and of the artists of the candidates."""
    artists = [songs.artists[row] for row in asked.candidates]
    return bootstrap.draw_two_way(asked.users, artists, settings.resamples, settings.seed).about(asked.asked, artists)


def answers(
    asked: Questions, scorer: Scorer, ks: Sequence[int], seed: int
) -> tuple[dict[str, Credited], sparse.csr_matrix]:
    """A method's metrics of all users (`auc` is `user_auc`), and its lists of max(ks), bool [users, candidates]."""
    at_once = max(1, CELLS // max(1, len(asked.candidates)))
    metrics, lists = [], []
    for start in range(0, len(asked.users), at_once):
        block = slice(start, start + at_once)
        scores, theirs = scorer(asked.history[block], asked.candidates), ~asked.met[block].toarray()
        metrics.append(credited_metrics(scores, asked.targets[block].toarray(), ks, theirs))
        lists.append(top(scores, theirs, max(ks), seed, start))
    named = {}
    for name in metrics[0]:
        values, gains, masses = zip(*(part[name] for part in metrics), strict=True)
        named["user_auc" if name == "auc" else name] = Credited(
            np.concatenate(values), np.sum(gains, axis=0), np.sum(masses, axis=0)
        )
    return named, sparse.vstack(lists).tocsr()


def user_figures(metrics: Sequence[dict[str, Credited]], draws: TwoWayDraws) -> dict[str, Estimate]:
    """Means over users of what `answers` gave; of several scorers (shuffles) the mean."""
    parts = {
        name: Credited(*(np.mean(same, axis=0) for same in zip(*(one[name] for one in metrics), strict=True)))
        for name in metrics[0]
    }
    return {name: bootstrap.two_way_mean(part.values, part.gain, part.mass, draws) for name, part in parts.items()}


def _scorers(
    songs: Songs, log: pd.DataFrame, settings: EvaluateSettings, *, hot: bool
) -> tuple[dict[str, list[Scorer]], dict[str, int]]:
    found: dict[str, list[Scorer]] = {space: [vector_scorer(vectors)] for space, vectors in songs.spaces.items()}
    if BLEND in songs.spaces:
        found[BLEND] = [blended_scorer(found["semantic"][0], found["preference"][0], 0.5)]
    beside, missing = baselines(songs, log, settings, hot=hot)
    return found | beside, missing


def _figures(
    songs: Songs,
    asked: Questions,
    items: ItemQuestions | None,
    scorers: dict[str, list[Scorer]],
    popularity: np.ndarray,
    settings: EvaluateSettings,
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """Figures of each method, and what the item AUC is made of."""
    artists = np.array(
        [artist or f"song {song}" for artist, song in zip(songs.labels("artist"), songs.ids, strict=True)]
    )
    draws, k = _draws(songs, asked, settings), max(settings.ks)
    methods = {}
    for method, several in scorers.items():
        found = [answers(asked, scorer, settings.ks, settings.seed) for scorer in several]
        lists = breadth(
            [listed for _, listed in found],
            asked.met,
            artists[asked.candidates],
            popularity[asked.candidates],
            k,
            draws,
        )
        methods[method] = user_figures([metrics for metrics, _ in found], draws) | lists
    if items is None:
        return methods, {}
    if len(items.songs):
        drawn = bootstrap.draw_two_way(
            items.users, artists[items.songs].tolist(), settings.resamples, settings.seed
        ).about(items.asked)
        for method, several in scorers.items():
            aucs, influence = (
                np.mean(of, axis=0) for of in zip(*(item_auc(items, scorer) for scorer in several), strict=True)
            )
            methods[method]["item_auc"] = bootstrap.two_way_mean_of_songs(aucs, influence / len(aucs), drawn)
    return methods, {"item_auc_songs": len(items.songs), "item_auc_users": items.history.shape[0]}


def _popularity(songs: Songs, log: pd.DataFrame, settings: EvaluateSettings, *, during: bool) -> np.ndarray:
    """float64 [catalogue]: positive events of all users before the evaluated period, or within it, as cold songs have
    no past.
    """
    earlier = periods_before(log, settings.split)
    counted = log["value"] > 0
    if earlier is not None:
        counted &= log["period"].isin([settings.split] if during else earlier)
    return log.loc[counted, "song_id"].value_counts().reindex(songs.ids, fill_value=0).to_numpy(dtype=np.float64)
