"""Recommendation tasks: the next positive songs of new and known users, among cold-start and hot songs.

A cold-start song is in the held-out split: no training pair contains it, and no method sees events on it before the
evaluated period. A hot song is in the train split and has positive events of training users before that period. New
users are held out: none of their events is in a training pair; known users are the others.

The history of a user is their positive songs before the evaluated period, outside the held-out split; the targets are
the candidates with a positive event in the period. Candidates that the user met before it, as song or as trigger, are
excluded. Logs without times (affinity) have no period: history and targets are then all positives outside and inside
the held-out split, and hot songs have no task.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import BLEND, EvaluatedSongs
from htcl_ray.evaluation.metrics import QueryMetric, query_metrics
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate, TwoWayDraws
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks.item_auc import ItemQueries, item_auc, item_queries
from htcl_ray.evaluation.tasks.list_coverage import list_metrics, top_k
from htcl_ray.evaluation.tasks.recommendation_queries import (
    UserQueries,
    hot_songs,
    periods_before,
    user_activity,
    user_queries,
)
from htcl_ray.evaluation.tasks.scorers import Scorer, baseline_scorers, blended_scorer, vector_scorer

CELLS = 2**22
"""Scores held at once: 16 MiB of fp32."""
BLENDS = tuple(round(0.1 * step, 1) for step in range(11))
COLD_TASKS = (("cold", "cold songs, new users"), ("cold_known_users", "cold songs, known users"))
HOT_TASKS = (("hot", "hot songs, new users"), ("hot_known_users", "hot songs, known users"))


def recommendation_tasks(songs: EvaluatedSongs, log: pd.DataFrame, settings: EvaluateSettings) -> list[TaskResult]:
    """`cold`, `cold_known_users`, `hot` and `hot_known_users`, without those that have no query.

    `log`: columns of schemas.EVENTS.
    """
    cold = songs.splits == settings.split
    activity = user_activity(songs.ids, cold, log, settings.split)
    tasks = []
    for names, candidates in ((COLD_TASKS, cold), (HOT_TASKS, hot_songs(songs, log, settings.split))):
        is_cold = candidates is cold
        both = [user_queries(activity, candidates, settings, known_users=known) for known in (False, True)]
        if not any(queries.users for queries in both):
            continue
        scorers, about_songs = _scorers(songs, log, settings, hot=not is_cold)
        popularity = _popularity(songs, log, settings, during=is_cold)
        for (name, title), known, queries in zip(names, (False, True), both, strict=True):
            if queries.users:
                items = item_queries(activity, candidates, settings, known_users=known) if is_cold else None
                methods, counts = _task_metrics(songs, queries, items, scorers, popularity, settings)
                counts = queries.counts | about_songs | counts
                tasks.append(TaskResult(name, title, "users", "users and artists", "random", methods, counts))
    return tasks


def blend_curve(songs: EvaluatedSongs, log: pd.DataFrame, settings: EvaluateSettings) -> list[dict[str, Any]]:
    """Metrics of cold-start songs and new users at blend 0, 0.1 … 1; empty without stage 2.

    Each entry: `blend`, and `cold` with value, low and high of NDCG@k, recall@k (the largest k) and user AUC.
    """
    cold = songs.splits == settings.split
    queries = user_queries(user_activity(songs.ids, cold, log, settings.split), cold, settings)
    if "preference" not in songs.spaces or not queries.users:
        return []
    draws = _draws(songs, queries, settings)
    ends = vector_scorer(songs.spaces["semantic"]), vector_scorer(songs.spaces["preference"])
    k, curve = max(settings.ks), []
    for blend in BLENDS:
        metrics = mean_over_users([rank_users(queries, blended_scorer(*ends, blend), (k,), settings.seed)[0]], draws)
        points = {}
        for name in (f"ndcg@{k}", f"recall@{k}", "user_auc"):
            low, high = metrics[name].interval or (None, None)
            points[name] = {"value": metrics[name].value, "low": low, "high": high}
        curve.append({"blend": blend, "cold": points})
    return curve


def _draws(songs: EvaluatedSongs, queries: UserQueries, settings: EvaluateSettings) -> TwoWayDraws:
    """Draws of the users, and of the artists of the candidates."""
    artists = [songs.artists[row] for row in queries.candidates]
    draws = bootstrap.draw_two_way(queries.users, artists, settings.resamples, settings.seed)
    return draws.for_task(queries.population, artists)


def rank_users(
    queries: UserQueries, scorer: Scorer, ks: Sequence[int], seed: int
) -> tuple[dict[str, QueryMetric], sparse.csr_matrix]:
    """Metrics of one method for all users, and its lists of max(ks) songs, bool [users, candidates]."""
    at_once = max(1, CELLS // max(1, len(queries.candidates)))
    metrics, lists = [], []
    for start in range(0, len(queries.users), at_once):
        block = slice(start, start + at_once)
        scores, candidate = scorer(queries.history[block], queries.candidates), ~queries.met[block].toarray()
        metrics.append(query_metrics(scores, queries.targets[block].toarray(), ks, candidate))
        lists.append(top_k(scores, candidate, max(ks), seed, start))
    joined = {}
    for name in metrics[0]:
        values, gains, masses = zip(*(part[name] for part in metrics), strict=True)
        joined[name] = QueryMetric(np.concatenate(values), np.sum(gains, axis=0), np.sum(masses, axis=0))
    return joined, sparse.vstack(lists).tocsr()


def mean_over_users(metrics: Sequence[dict[str, QueryMetric]], draws: TwoWayDraws) -> dict[str, Estimate]:
    """Means over users of the metrics of `rank_users`; of several scorers (permutations) the mean."""
    parts = {
        name: QueryMetric(*(np.mean(same, axis=0) for same in zip(*(one[name] for one in metrics), strict=True)))
        for name in metrics[0]
    }
    return {name: bootstrap.two_way_mean(part.values, part.gain, part.mass, draws) for name, part in parts.items()}


def _scorers(
    songs: EvaluatedSongs, log: pd.DataFrame, settings: EvaluateSettings, *, hot: bool
) -> tuple[dict[str, list[Scorer]], dict[str, int]]:
    scorers = {space: [vector_scorer(vectors)] for space, vectors in songs.spaces.items()}
    if BLEND in songs.spaces:
        scorers[BLEND] = [blended_scorer(scorers["semantic"][0], scorers["preference"][0], 0.5)]
    baselines, counts = baseline_scorers(songs, log, settings, hot=hot)
    return scorers | baselines, counts


def _task_metrics(
    songs: EvaluatedSongs,
    queries: UserQueries,
    items: ItemQueries | None,
    scorers: dict[str, list[Scorer]],
    popularity: np.ndarray,
    settings: EvaluateSettings,
) -> tuple[dict[str, dict[str, Estimate]], dict[str, int]]:
    """Metrics of each method, and the numbers of songs and users of the item AUC."""
    artists = np.array(
        [artist or f"song {song}" for artist, song in zip(songs.labels("artist"), songs.ids, strict=True)]
    )
    draws, k = _draws(songs, queries, settings), max(settings.ks)
    candidate_artists, candidate_popularity = artists[queries.candidates], popularity[queries.candidates]
    methods = {}
    for method, several in scorers.items():
        ranked = [rank_users(queries, scorer, settings.ks, settings.seed) for scorer in several]
        lists = [listed for _, listed in ranked]
        methods[method] = mean_over_users([metrics for metrics, _ in ranked], draws) | list_metrics(
            lists, queries.met, candidate_artists, candidate_popularity, k, draws
        )
    if items is None:
        return methods, {}
    if len(items.songs):
        drawn = bootstrap.draw_two_way(
            items.users, artists[items.songs].tolist(), settings.resamples, settings.seed
        ).for_task(items.population)
        for method, several in scorers.items():
            aucs, influence = (
                np.mean(of, axis=0) for of in zip(*(item_auc(items, scorer) for scorer in several), strict=True)
            )
            methods[method]["item_auc"] = bootstrap.two_way_mean_of_songs(aucs, influence / len(aucs), drawn)
    return methods, {"item_auc_songs": len(items.songs), "item_auc_users": items.history.shape[0]}


def _popularity(songs: EvaluatedSongs, log: pd.DataFrame, settings: EvaluateSettings, *, during: bool) -> np.ndarray:
    """Positive events of all users before the evaluated period, or within it; float64 [catalogue].

    Cold-start songs have no events before the period.
    """
    earlier = periods_before(log, settings.split)
    counted = log["value"] > 0
    if earlier is not None:
        counted &= log["period"].isin([settings.split] if during else earlier)
    return log.loc[counted, "song_id"].value_counts().reindex(songs.ids, fill_value=0).to_numpy(dtype=np.float64)
