"""The metrics of an evaluation: one record for each, with its label, direction and definition; and ranking metrics.

The functions `recall_at_k` to `median_rank` take `ranked`, one list of ids for each query, best first (list, tuple or
1-D array; it may be a part of the candidates), and `relevant`, one collection of ids for each query. Relevance is
binary. They return float64 [queries]; a query without a relevant id is nan, so that `numpy.nanmean` averages over the
queries that have one. An id that is listed twice counts at its first position.

Lists cannot express tied scores. `expected_metrics` takes scores instead and returns exact expectations over all orders
of tied candidates: the definitions that an evaluation uses.

To add a metric, add a record to `METRICS`; with a function on expected ranks, every recommendation or retrieval task
computes it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from htcl_ray.evaluation.stats.expected_ranks import (
    ExpectedRanks,
    FirstRelevant,
    expected_ranks,
    expected_reciprocal_rank,
    first_hit_distribution,
    hit_probability,
)

Ids = Iterable[Hashable]


def recall_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """Share of the relevant ids that are among the first k, in [0, 1]."""
    _check_k(k)
    return np.array(
        [hits[:k].sum() / total if total else np.nan for hits, total in _hits(ranked, relevant)], dtype=np.float64
    )


def hit_rate_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """1 when any relevant id is among the first k, else 0."""
    _check_k(k)
    return np.array(
        [float(hits[:k].any()) if total else np.nan for hits, total in _hits(ranked, relevant)], dtype=np.float64
    )


def ndcg_at_k(ranked: Sequence[Ids], relevant: Sequence[Ids], k: int) -> np.ndarray:
    """Normalised discounted cumulative gain, in [0, 1].

    DCG@k = Σ relevant(i) / log2(i + 1) over positions i = 1 … k, divided by the DCG@k of the best possible list, which
    begins with min(k, number of relevant ids) relevant ids.
    """
    _check_k(k)
    return np.array(
        [_dcg(hits[:k]) / ideal_dcg(total, k) if total else np.nan for hits, total in _hits(ranked, relevant)],
        dtype=np.float64,
    )


def first_rank(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> np.ndarray:
    """Position of the first relevant id, from 1; inf when none is listed."""
    ranks = [
        np.nan if not total else (float(hits.argmax()) + 1 if hits.any() else np.inf)
        for hits, total in _hits(ranked, relevant)
    ]
    return np.array(ranks, dtype=np.float64)


def mrr(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> np.ndarray:
    """Reciprocal rank of the first relevant id, in [0, 1]; 0 when none is listed. The mean over queries is the MRR."""
    return 1.0 / first_rank(ranked, relevant)


def median_rank(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> float:
    """Median of `first_rank` over the queries with a relevant id; nan when no query has one."""
    ranks = first_rank(ranked, relevant)
    ranks = ranks[~np.isnan(ranks)]
    return float(np.median(ranks)) if len(ranks) else float("nan")


def auc(scores: Sequence[Any], relevant: Sequence[Any]) -> np.ndarray:
    """Probability that a relevant candidate scores above another one, a tie counting half, in [0, 1]; 0.5 is chance.

    `scores`: one float array [candidates] for each query, or a matrix; `relevant`: bool of the same shapes. nan when
    all candidates are relevant, or none.
    """
    _check_queries(scores, relevant)
    return np.array(
        [_auc(np.asarray(s), np.asarray(r, dtype=bool)) for s, r in zip(scores, relevant, strict=True)],
        dtype=np.float64,
    )


def ideal_dcg(total: int, k: int) -> float:
    """DCG@k of the best list for a query with `total` relevant ids."""
    return float((1.0 / np.log2(np.arange(min(total, k)) + 2)).sum())


def _auc(scores: np.ndarray, relevant: np.ndarray) -> float:
    if scores.shape != relevant.shape:
        raise ValueError(f"scores have shape {scores.shape} and relevant {relevant.shape}; expected the same")
    positives = int(relevant.sum())
    negatives = len(relevant) - positives
    if not positives or not negatives:
        return float("nan")
    _, value, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2  # from 1, tied scores share their mean
    return float((mean_rank[value][relevant].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def _dcg(hits: np.ndarray) -> float:
    return float((hits / np.log2(np.arange(len(hits)) + 2)).sum())


def _hits(ranked: Sequence[Ids], relevant: Sequence[Ids]) -> list[tuple[np.ndarray, int]]:
    """For each query: bool [length], true at the first position of each relevant id; and its number of relevant ids."""
    _check_queries(ranked, relevant)
    result = []
    for row, ids in zip(ranked, relevant, strict=True):
        wanted, seen, hits = set(ids), set(), []
        for item in row:
            hits.append(item in wanted and item not in seen)
            seen.add(item)
        result.append((np.array(hits, dtype=bool), len(wanted)))
    return result


def _check_queries(first: Sequence[Any], relevant: Sequence[Any]) -> None:
    if len(first) != len(relevant):
        raise ValueError(
            f"got {len(first)} rankings and {len(relevant)} relevant sets; expected one of each for every query"
        )


def _check_k(k: int) -> None:
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1")


class QueryMetric(NamedTuple):
    """A metric of each query, and its attribution to items."""

    values: np.ndarray
    """float64 [queries]; nan for queries without a value."""
    gain: np.ndarray
    """float64 [items]: the item's parts of the values, summed over queries."""
    mass: np.ndarray
    """float64 [items]: sum of 1 / relevant candidates over the queries with a value to which the item is relevant."""


RankMetric = Callable[[ExpectedRanks, int], tuple[np.ndarray, np.ndarray]]
"""(ranks, k) → values, float64 [queries], and the weight of each relevant candidate in them, float64 [entries]."""
FirstRankMetric = Callable[[FirstRelevant, int], np.ndarray]
"""(best relevant candidate of each query, k) → float64 [queries]."""


@dataclass(frozen=True)
class Metric:
    """One metric. Only the largest k of a metric at k is a headline or judges a task."""

    name: str
    """Without `@k`, as in report.json."""
    label: str
    lower_is_better: bool = False
    headline: bool = False
    """Whether the summary of the report and the terminal show it; the tables of the report show all metrics."""
    judges: int | None = None
    """Priority as the metric that a task is judged by, the lowest first; higher must be better."""
    at_k: bool = False
    """Whether it is computed for each of `evaluate.ks`."""
    of_ranks: RankMetric | None = None
    """Definition for recommendation tasks."""
    of_first_rank: FirstRankMetric | None = None
    """Definition for retrieval tasks, in which the best relevant candidate counts."""
    aggregate: Literal["mean", "median"] = "mean"
    """Statistic over the queries of a retrieval task."""


def _hit_rate(ranks: ExpectedRanks, k: int) -> tuple[np.ndarray, np.ndarray]:
    return np.where(ranks.answerable, hit_probability(ranks.first, k), np.nan), _num_inside(ranks, k) / ranks.num_tied


def _recall(ranks: ExpectedRanks, k: int) -> tuple[np.ndarray, np.ndarray]:
    parts = _num_inside(ranks, k) / ranks.num_tied
    return _share(ranks, parts, ranks.num_relevant), parts


def _precision(ranks: ExpectedRanks, k: int) -> tuple[np.ndarray, np.ndarray]:
    parts = _num_inside(ranks, k) / ranks.num_tied
    return _share(ranks, parts, np.full(len(ranks.num_relevant), k)), parts


def _ndcg(ranks: ExpectedRanks, k: int) -> tuple[np.ndarray, np.ndarray]:
    ideal = np.r_[0.0, np.cumsum(1 / np.log2(np.arange(k) + 2))]  # DCG@k by the number of relevant candidates on top
    last = np.minimum(ranks.num_higher + _num_inside(ranks, k), k)
    parts = (ideal[last] - ideal[np.minimum(ranks.num_higher, k)]) / ranks.num_tied
    return _share(ranks, parts, ideal[np.minimum(ranks.num_relevant, k)]), parts


def _mrr(ranks: ExpectedRanks, _k: int) -> tuple[np.ndarray, np.ndarray]:
    values, has = np.full(len(ranks.num_relevant), np.nan), ranks.answerable
    ties = zip(*(part[has].tolist() for part in ranks.first), strict=True)
    values[has] = [expected_reciprocal_rank(*tie) for tie in ties]
    return values, 1 / (ranks.num_higher + (ranks.num_tied + 1) / 2)


def _user_auc(ranks: ExpectedRanks, _k: int) -> tuple[np.ndarray, np.ndarray]:
    """From the mean ranks of the relevant candidates (Mann and Whitney 1947), a tie counting half."""
    parts, others = ranks.num_other_below(), ranks.num_candidates - ranks.num_relevant
    return _share(ranks, parts, ranks.num_relevant * others, ranks.answerable & (others > 0)), parts


def _num_inside(ranks: ExpectedRanks, k: int) -> np.ndarray:
    """Positions among the first `k` that the tie of each relevant candidate reaches; int [entries]."""
    inside: np.ndarray = np.clip(k - ranks.num_higher, 0, ranks.num_tied)
    return inside


def _share(ranks: ExpectedRanks, parts: np.ndarray, total: np.ndarray, where: np.ndarray | None = None) -> np.ndarray:
    """Sum of `parts` [entries] over each query, divided by `total` [queries]; nan elsewhere."""
    where = ranks.answerable if where is None else where
    values: np.ndarray = np.divide(ranks.sum_by_query(parts), total, out=np.full(len(total), np.nan), where=where)
    return values


def _first_recall(first: FirstRelevant, k: int) -> np.ndarray:
    values = (first.num_higher < k).astype(np.float64)
    for query, distribution in _random_ties(first):
        values[query] = min(distribution[: max(0, k - int(first.num_higher[query]))].sum(), 1.0)
    return values


def _first_mrr(first: FirstRelevant, _k: int) -> np.ndarray:
    values = 1.0 / (first.num_higher + 1)
    for query, distribution in _random_ties(first):
        values[query] = (distribution / (first.num_higher[query] + 1 + np.arange(len(distribution)))).sum()
    return values


def _random_ties(first: FirstRelevant) -> Iterable[tuple[int, np.ndarray]]:
    """Queries whose best tie also holds other candidates, with the distribution of the first relevant position."""
    for query in np.flatnonzero(first.num_tied > first.num_relevant).tolist():
        yield query, first_hit_distribution(int(first.num_tied[query]), int(first.num_relevant[query]))


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("hit_rate", "HR", at_k=True, of_ranks=_hit_rate),
        Metric("recall", "recall", headline=True, judges=4, at_k=True, of_ranks=_recall, of_first_rank=_first_recall),
        Metric("precision", "precision", headline=True, judges=5, at_k=True, of_ranks=_precision),
        Metric("ndcg", "NDCG", headline=True, judges=1, at_k=True, of_ranks=_ndcg),
        Metric("mrr", "MRR", of_ranks=_mrr, of_first_rank=_first_mrr),
        Metric(
            "median_rank",
            "median rank",
            lower_is_better=True,
            headline=True,
            of_first_rank=lambda first, _k: first.rank,
            aggregate="median",
        ),
        Metric("user_auc", "user AUC", headline=True, of_ranks=_user_auc),
        Metric("item_auc", "item AUC", headline=True),
        Metric("accuracy", "accuracy", headline=True, judges=2),
        Metric("roc_auc", "ROC-AUC", headline=True, judges=3),
        Metric("map", "mAP", headline=True),
        Metric("prompt_spread", "spread over prompts", lower_is_better=True),
        Metric("coverage", "coverage"),
        Metric("gini", "gini", lower_is_better=True),
        Metric("artist_diversity", "artist diversity"),
        Metric("popularity_lift", "popularity lift", lower_is_better=True),
        Metric("audio_mean_cosine", "audio mean cosine", lower_is_better=True),
        Metric("text_mean_cosine", "text mean cosine", lower_is_better=True),
        Metric("audio_effective_rank", "audio effective rank"),
        Metric("text_effective_rank", "text effective rank"),
        Metric("repeat_difference", "repeat difference", lower_is_better=True),
        Metric("batch_difference", "batch difference", lower_is_better=True),
        Metric("padding_difference", "padding difference", lower_is_better=True),
        Metric("stored_difference", "stored difference", lower_is_better=True),
        Metric("from_audio_difference", "from audio difference", lower_is_better=True),
        Metric("loss", "loss", lower_is_better=True),
    )
}
"""All metrics by name."""


def lower_is_better(name: str) -> bool:
    """Direction of a metric of an evaluation (`gini@10`, `knn_map_folds`) or of training (`validation_median_rank`).

    A name without a record, such as a misspelt one in a gate file, never has a value and counts as higher is better.
    """
    base = name.partition("@")[0].removeprefix("validation_").removeprefix("pair_")
    metric = METRICS.get(base.removeprefix("knn_").removesuffix("_folds"))
    return metric is not None and metric.lower_is_better


def metric_label(name: str) -> str:
    """Label of a metric for people: `NDCG@10`, `kNN accuracy, folds`."""
    base, at, k = name.partition("@")
    core = base.removeprefix("knn_").removesuffix("_folds")
    label = METRICS[core].label if core in METRICS else core.replace("_", " ")
    prefix, suffix = "kNN " if base.startswith("knn_") else "", ", folds" if base.endswith("_folds") else ""
    return f"{prefix}{label}{suffix}{at}{k}"


def headline_metrics(names: Sequence[str]) -> list[str]:
    """The headline metrics among `names`, in the same order; of several k the largest."""
    largest: dict[str, int] = {}
    for name in names:
        base, _, k = name.partition("@")
        largest[base] = max(largest.get(base, 0), int(k or 0))

    def is_headline(name: str) -> bool:
        base, _, k = name.partition("@")
        return base in METRICS and METRICS[base].headline and int(k or 0) == largest[base]

    return [name for name in names if is_headline(name)]


def primary_metric(names: Iterable[str]) -> str | None:
    """The metric that a task with these metrics is judged by; None without one.

    NDCG, accuracy, ROC-AUC or recall, the first that the task has; of several k the largest.
    """
    judging = [
        (priority, name)
        for name in headline_metrics(list(names))
        if (priority := METRICS[name.partition("@")[0]].judges) is not None
    ]
    return min(judging)[1] if judging else None


def query_metrics(
    scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int], candidate: np.ndarray | None = None
) -> dict[str, QueryMetric]:
    """The metrics of `METRICS` that are defined on ranks, for each query, with their attribution to items.

    A value is divided among the query's relevant candidates: recall, NDCG and AUC are sums over them; hit rate and MRR,
    which are not, are divided in proportion to a candidate's own recall@k or reciprocal of its mean rank. All values
    are nan where no candidate is relevant; `user_auc` is nan also where all are. Arguments and errors as of
    `expected_ranks`.
    """
    ranks = expected_ranks(scores, relevant, candidate)
    return {
        name: _attribute(ranks, *metric.of_ranks(ranks, k), scores.shape[1])
        for name, metric, k in _computed(ks)
        if metric.of_ranks is not None
    }


def expected_metrics(
    scores: np.ndarray, relevant: np.ndarray, ks: Sequence[int], candidate: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """The values of `query_metrics`, float64 [queries] each.

    Without ties they equal the metrics of the sorted list; with all scores equal, those of a random order.
    """
    return {name: metric.values for name, metric in query_metrics(scores, relevant, ks, candidate).items()}


def first_rank_metrics(first: FirstRelevant, ks: Sequence[int]) -> dict[str, tuple[Metric, np.ndarray]]:
    """The metrics of `METRICS` that are defined on the first relevant candidate, float64 [queries] each."""
    return {
        name: (metric, metric.of_first_rank(first, k))
        for name, metric, k in _computed(ks)
        if metric.of_first_rank is not None
    }


def _computed(ks: Sequence[int]) -> list[tuple[str, Metric, int]]:
    """Name in the report, record and k (0 without one) of each metric, those at k first."""
    at_k = [(f"{metric.name}@{k}", metric, k) for k in ks for metric in METRICS.values() if metric.at_k]
    return at_k + [(metric.name, metric, 0) for metric in METRICS.values() if not metric.at_k]


def _attribute(ranks: ExpectedRanks, values: np.ndarray, weights: np.ndarray, items: int) -> QueryMetric:
    """Divide each value among the relevant candidates of its query in proportion to `weights` [entries]."""
    query = ranks.query
    total = ranks.sum_by_query(weights)[query]
    parts = np.divide(weights * values[query], total, out=np.zeros(len(total)), where=total > 0)
    known = ~np.isnan(values[query])
    gain, mass = (
        np.bincount(ranks.item[known], weights=column[known], minlength=items)
        for column in (parts, 1 / ranks.num_relevant[query])
    )
    return QueryMetric(values, gain, mass)
