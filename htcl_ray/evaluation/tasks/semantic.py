"""Semantic tasks on held-out artists: retrieval by text, audio and tags, zero-shot classification, probes.

Songs with identical text cannot be told apart by text, so they form one correct set: each unique text is one query, and
its rank is that of the best of its songs. Audio-to-text ranks the unique texts for each song. Galleries are exact: all
held-out songs or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.evaluation.metrics import first_rank_metrics
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.expected_ranks import FirstRelevant, first_hit_distribution
from htcl_ray.evaluation.task_result import TaskResult
from htcl_ray.evaluation.tasks.labels import Labels, column_labels
from htcl_ray.evaluation.tasks.probes import probe_task
from htcl_ray.evaluation.tasks.tag_queries import query_text, tag_queries, tag_query_tasks
from htcl_ray.evaluation.tasks.zero_shot import zero_shot_labels, zero_shot_task
from htcl_ray.schemas import Split

CELLS = 2**24
"""Similarities held at once: 64 MiB of fp32."""
PERMUTATIONS = 10
"""Permutations that the shuffled control of retrieval is averaged over; one alone is as noisy as one random ranking."""

Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]
"""Texts → their unit-norm vectors [texts, dim] in each space of the songs."""


def semantic_tasks(songs: EvaluatedSongs, encode: Encode, settings: EvaluateSettings) -> list[TaskResult]:
    """Measure all semantic tasks of the held-out songs.

    They are `text_to_audio`, `audio_to_text`, `tag_queries_1` to `tag_queries_3`, and for each probe column with labels
    `zero_shot_COLUMN` and `probe_COLUMN`.

    Held-out songs are those of the split of the settings; without held-out songs the list is empty. Methods: each space
    of the songs, and the controls: `shuffled`, the vectors of the last stage randomly permuted across songs, and
    `log_mel`, statistics of the audio without a model. `encode` is called once.
    """
    training = np.flatnonzero(songs.splits == Split.TRAIN)
    held_out = np.flatnonzero(songs.splits == settings.split)
    if not len(held_out):
        return []
    artists = songs.artists
    draws = bootstrap.draw([artists[row] for row in held_out], settings.resamples, settings.seed)
    draws = draws.for_task([(songs.ids[row], songs.texts[row], artists[row]) for row in held_out])
    columns = [
        labels
        for name in settings.probe_columns
        if (labels := column_labels(songs, name, training, held_out)) is not None
    ]
    names = {labels.column: zero_shot_labels(labels) for labels in columns}
    prompts = {
        column: [[template.replace("{label}", name) for name in labels] for template in settings.label_prompts]
        for column, labels in names.items()
    }
    queries = tag_queries(songs, held_out)
    texts = sorted({songs.texts[row] for row in held_out})
    encoded = list(
        dict.fromkeys(
            [
                *texts,
                *(prompt for of_column in prompts.values() for of_template in of_column for prompt in of_template),
                *(query_text(query) for of_count in queries for query in of_count),
            ]
        )
    )
    place = {text: i for i, text in enumerate(encoded)}
    vectors = encode(encoded)

    last = songs.spaces.get("preference", songs.spaces["semantic"])
    held_out_spaces = {space: of_songs[held_out] for space, of_songs in songs.spaces.items()}
    text_spaces = {space: of_texts[: len(texts)] for space, of_texts in vectors.items()}
    text_of_song = np.array([place[songs.texts[row]] for row in held_out])
    tasks = retrieval_tasks(held_out_spaces, text_spaces, text_of_song, draws, settings)
    tag_vectors = [
        {space: of_texts[[place[query_text(query)] for query in of_count]] for space, of_texts in vectors.items()}
        for of_count in queries
    ]
    tasks += tag_query_tasks(songs, held_out, queries, tag_vectors, settings)
    permuted = last[np.random.default_rng(settings.seed).permutation(len(last))]
    methods = {**songs.spaces, "log_mel": songs.log_mel, "shuffled": permuted}
    for labels in columns:
        label_draws = draws.select(np.searchsorted(held_out, labels.held_out)).for_task(
            labels.column, _labelled(songs, labels, labels.held_out)
        )
        if names[labels.column]:
            prompt_vectors = [
                {space: of_texts[[place[prompt] for prompt in of_template]] for space, of_texts in vectors.items()}
                for of_template in prompts[labels.column]
            ]
            zero_shot_draws = label_draws.for_task(names[labels.column], settings.label_prompts)
            tasks.append(zero_shot_task(labels, names[labels.column], songs.spaces, prompt_vectors, zero_shot_draws))
        probe_draws = label_draws.for_task(
            _labelled(songs, labels, labels.training), settings.folds, settings.neighbors
        )
        probe = probe_task(labels, methods, artists, probe_draws, settings)
        tasks += [] if probe is None else [probe]
    return tasks


def _labelled(songs: EvaluatedSongs, labels: Labels, rows: np.ndarray) -> list[tuple[str, tuple[str, ...]]]:
    """Ids and labels of these songs, for the fingerprint of a task."""
    return [(songs.ids[row], labels.values[row]) for row in rows]


def retrieval_tasks(
    songs: dict[str, np.ndarray],
    texts: dict[str, np.ndarray],
    text_of_song: np.ndarray,
    draws: Draws,
    settings: EvaluateSettings,
) -> list[TaskResult]:
    """Both directions of retrieval; the control is the exact expectation over random orders.

    By space: `songs` [songs, dim] and the unique `texts` [texts, dim], unit norm. `text_of_song`: int [songs], the row
    of a song's text; every text has a song. `draws` of the songs.
    """
    num_songs, num_texts = len(text_of_song), len(next(iter(texts.values())))
    each, songs_of_text = np.arange(num_texts), np.bincount(text_of_song, minlength=num_texts)
    last = "preference" if "preference" in songs else "semantic"
    generator = np.random.default_rng(settings.seed)
    orders = [generator.permutation(num_songs) for _ in range(PERMUTATIONS)]

    def to_audio(of_songs: np.ndarray, of_texts: np.ndarray) -> FirstRelevant:
        return first_correct(of_texts, of_songs, each, text_of_song)

    def to_text(of_songs: np.ndarray, of_texts: np.ndarray) -> FirstRelevant:
        return first_correct(of_songs, of_texts, text_of_song, each)

    def task(
        name: str,
        title: str,
        unit: str,
        retrieve: Callable[[np.ndarray, np.ndarray], FirstRelevant],
        correct: np.ndarray,
        gallery: int,
        query_draws: Draws,
    ) -> TaskResult:
        methods = {
            space: retrieval_metrics(retrieve(of_songs, texts[space]), query_draws, settings.ks)
            for space, of_songs in songs.items()
        }
        permuted = [
            retrieval_metrics(retrieve(songs[last][order], texts[last]), query_draws, settings.ks) for order in orders
        ]
        methods["shuffled"] = {metric: bootstrap.average([of[metric] for of in permuted]) for metric in permuted[0]}
        tied = FirstRelevant(np.zeros_like(correct), np.full_like(correct, gallery), correct)
        middle = chance_metrics(gallery, correct, settings.ks)["median_rank"]  # hardly depends on the drawn songs
        same = np.full(len(draws.weights), middle, dtype=np.float32)
        median = Estimate(middle, len(correct), same, query_draws.population)
        methods["random"] = {**retrieval_metrics(tied, query_draws, settings.ks), "median_rank": median}
        counts = {"queries": len(correct), "gallery": gallery}
        return TaskResult(name, title, unit, "artists", "random", methods, counts)

    text_draws, one_each = draws.merge(text_of_song, num_texts), np.ones(num_songs, dtype=np.int64)
    return [
        task("text_to_audio", "text → audio", "texts", to_audio, songs_of_text, num_songs, text_draws),
        task("audio_to_text", "audio → text", "songs", to_text, one_each, num_texts, draws),
    ]


def first_correct(
    queries: np.ndarray, gallery: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, cells: int = CELLS
) -> FirstRelevant:
    """Position of the first gallery item of each query's own group.

    `queries`: [queries, dim], `gallery`: [items, dim], compared by inner product; groups: int. Every query needs an
    item of its group. At most `cells` similarities are held at once.
    """
    first = FirstRelevant(*(np.empty(len(queries), dtype=np.int64) for _ in range(3)))
    chunk = max(1, cells // max(1, len(gallery)))
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ gallery.T
        correct = query_group[rows, None] == gallery_group[None]
        best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
        tied = scores == best
        first.num_higher[rows] = (scores > best).sum(axis=1)
        first.num_tied[rows] = tied.sum(axis=1)
        first.num_relevant[rows] = (tied & correct).sum(axis=1)
    return first


def first_correct_rank(
    queries: np.ndarray, gallery: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, cells: int = CELLS
) -> np.ndarray:
    """Expected rank, from 1, of the first gallery item of each query's own group; float64 [queries].

    Arguments as of `first_correct`.
    """
    return first_correct(queries, gallery, query_group, gallery_group, cells).rank


def rank_summary(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`recall@k` (share of queries with a rank of at most k), `mrr` and `median_rank` of `first_correct_rank`."""
    recall = {f"recall@{k}": float((ranks <= k).mean()) for k in ks}
    return {**recall, "mrr": float((1 / ranks).mean()), "median_rank": float(np.median(ranks))}


def retrieval_metrics(first: FirstRelevant, draws: Draws, ks: Sequence[int]) -> dict[str, Estimate]:
    """`recall@k` (a correct item is among the first k), `mrr` and `median_rank` over queries.

    Metrics are expectations over random orders of tied items, so that a collapsed model, for which all items tie, is at
    chance. The median is that of the expected ranks.
    """
    statistics = {"mean": bootstrap.mean, "median": bootstrap.median}
    return {
        name: statistics[metric.aggregate](values, draws)
        for name, (metric, values) in first_rank_metrics(first, ks).items()
    }


def chance_metrics(gallery: int, correct: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """Metrics of a random order of `gallery` items; `correct`: int [queries], correct items of each query."""
    values, counts = np.unique(correct, return_counts=True)
    distribution = np.zeros(gallery)
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        distribution += first_hit_distribution(gallery, value) * count / len(correct)
    recall = {f"recall@{k}": float(min(distribution[:k].sum(), 1.0)) for k in ks}
    return {
        **recall,
        "mrr": float((distribution / np.arange(1, gallery + 1)).sum()),
        "median_rank": float(1 + np.searchsorted(np.cumsum(distribution), 0.5 - 1e-9)),
    }
