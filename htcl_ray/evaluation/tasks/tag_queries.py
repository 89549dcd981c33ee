"""Retrieval by tag queries: one to three tags, such as `sad guitar`, against the songs that have all of them.

A search query is a few words, unlike the texts of songs that the other retrieval tasks take as queries. Tags are the
values of the columns in schemas.TAG_COLUMNS, whether or not they are in the songs' text.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.metrics import query_metrics
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Estimate
from htcl_ray.evaluation.task_result import BEST, TaskResult
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.schemas import TAG_COLUMNS

MAX_TAGS = 3
"""Largest number of tags of a query."""
MAX_QUERIES = 300
"""Largest number of queries with one number of tags, chosen by a hash of the query."""
METRICS = ("precision", "mrr")
PERMUTATIONS = 10
"""Permutations that the shuffled control is averaged over."""

Query = tuple[str, ...]
"""The tags of a query, in the order in which they are written."""


def query_text(query: Query) -> str:
    """The text of a query."""
    return " ".join(query)


def tag_queries(songs: EvaluatedSongs, held_out: np.ndarray) -> list[list[Query]]:
    """Queries with 1, 2 … MAX_TAGS tags: distinct sets of tags that some held-out song has, and not all of them.

    `held_out`: int, rows of the catalogue. Tags are in the order of a hash, so that no column comes first.
    """
    tags = _tags_of_songs(songs, held_out)
    queries = []
    for count in range(1, MAX_TAGS + 1):
        subsets = {subset for of_song in tags for subset in itertools.combinations(sorted(of_song), count)}
        chosen = sorted(subsets, key=lambda query: (hash_fraction(query_text(query), "tag query"), query))
        partial = [query for query in chosen if not all(set(query) <= of_song for of_song in tags)][:MAX_QUERIES]
        queries.append(
            [tuple(sorted(query, key=lambda tag: hash_fraction(f"{tag} {query}", "tag order"))) for query in partial]
        )
    return queries


def tag_query_tasks(
    songs: EvaluatedSongs,
    held_out: np.ndarray,
    queries: Sequence[Sequence[Query]],
    texts: Sequence[dict[str, np.ndarray]],
    settings: EvaluateSettings,
) -> list[TaskResult]:
    """`tag_queries_1` to `tag_queries_3`, without those that have no query.

    `queries`: see `tag_queries`; `texts`: their vectors [queries, dim] in each space, unit norm. Metrics are means over
    queries: precision@k and MRR. The control is the expectation over random orders; `shuffled` ranks by the
    vectors of the last stage randomly permuted across songs; `best` ranks all songs with all tags first, since few
    queries have k such songs. Intervals resample queries and artists.
    """
    artists = [songs.artists[row] for row in held_out]
    tags = _tags_of_songs(songs, held_out)
    last = "preference" if "preference" in songs.spaces else "semantic"
    generator = np.random.default_rng(settings.seed)
    orders = [generator.permutation(len(held_out)) for _ in range(PERMUTATIONS)]
    tasks = []
    for count, (of_count, vectors) in enumerate(zip(queries, texts, strict=True), 1):
        if not of_count:
            continue
        relevant = np.array([[set(query) <= of_song for of_song in tags] for query in of_count])
        names = [query_text(query) for query in of_count]
        draws = bootstrap.draw_two_way(names, artists, settings.resamples, settings.seed).for_task(
            [songs.ids[row] for row in held_out], [sorted(of_song) for of_song in tags]
        )

        def measure(
            scores: np.ndarray, relevant: np.ndarray = relevant, draws: bootstrap.TwoWayDraws = draws
        ) -> dict[str, Estimate]:
            return {
                name: bootstrap.two_way_mean(part.values, part.gain, part.mass, draws)
                for name, part in query_metrics(scores, relevant, settings.ks).items()
                if name.partition("@")[0] in METRICS
            }

        scores = {space: vectors[space] @ of_songs[held_out].T for space, of_songs in songs.spaces.items()}
        methods = {space: measure(of_space) for space, of_space in scores.items()}
        permuted = [measure(scores[last][:, order]) for order in orders]
        methods["shuffled"] = {name: bootstrap.average([of[name] for of in permuted]) for name in permuted[0]}
        methods["random"] = measure(np.zeros_like(scores[last]))
        methods[BEST] = measure(relevant.astype(np.float32))
        counts = {"queries": len(of_count), "gallery": len(held_out)}
        title = f"queries of {('one tag', 'two tags', 'three tags')[count - 1]}"
        tasks.append(
            TaskResult(f"tag_queries_{count}", title, "queries", "queries and artists", "random", methods, counts)
        )
    return tasks


def _tags_of_songs(songs: EvaluatedSongs, rows: np.ndarray) -> list[set[str]]:
    columns = [songs.values(column) for column in TAG_COLUMNS]
    return [{tag for column in columns for tag in column[row]} for row in rows]
