"""Semantic tasks on held-out artists: retrieval between text and sound, zero-shot classification, probes of catalogue
columns.

Songs with identical text cannot be told apart by text, so they are one correct set: each unique text is asked once, and
its rank is that of the best of its songs. Sound → text ranks the unique texts for each song. Galleries are exact: every
held-out song or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import Songs
from htcl_ray.evaluation.stats import bootstrap
from htcl_ray.evaluation.stats.bootstrap import Draws, Estimate
from htcl_ray.evaluation.stats.ties import first_hit_distribution
from htcl_ray.evaluation.task_result import Task
from htcl_ray.evaluation.tasks.labels import Labels, labels
from htcl_ray.evaluation.tasks.probes import probe_task
from htcl_ray.evaluation.tasks.zero_shot import asked_labels, zero_shot_task
from htcl_ray.schemas import Split

CELLS = 2**24
"""Similarities held at once: 64 MiB of fp32."""
SHUFFLES = 10
"""Permutations that the shuffled control of retrieval is averaged over; one alone is as noisy as a single random
ranking."""

Encode = Callable[[Sequence[str]], dict[str, np.ndarray]]
"""Texts → their unit-norm vectors [texts, dim] in each space of the songs."""


def semantic_tasks(songs: Songs, encode: Encode, settings: EvaluateSettings) -> list[Task]:
    """`text_to_audio`, `audio_to_text`, and for each probe column with labels `zero_shot_COLUMN` and `probe_COLUMN`.

    Held-out songs are those of the settings' split. Methods: each space of the songs, and the controls. `shuffled`
    deals the vectors of the last stage to the wrong songs; `log_mel` are statistics of the sound that no model saw.
    `encode` is called once. No task without held-out songs.
    """
    training = np.flatnonzero(songs.splits == Split.TRAIN)
    held_out = np.flatnonzero(songs.splits == settings.split)
    if not len(held_out):
        return []
    artists = songs.artists
    draws = bootstrap.draw([artists[row] for row in held_out], settings.resamples, settings.seed)
    draws = draws.about([(songs.ids[row], songs.texts[row], artists[row]) for row in held_out])
    columns = [
        found for name in settings.probe_columns if (found := labels(songs, name, training, held_out)) is not None
    ]
    names = {of.column: asked_labels(of) for of in columns}
    prompts = {
        column: [settings.label_prompt.replace("{label}", name) for name in asked] for column, asked in names.items()
    }
    texts = sorted({songs.texts[row] for row in held_out})
    asked = list(dict.fromkeys([*texts, *(prompt for of_column in prompts.values() for prompt in of_column)]))
    place = {text: i for i, text in enumerate(asked)}
    vectors = encode(asked)

    last = songs.spaces.get("preference", songs.spaces["semantic"])
    heard = {space: of_songs[held_out] for space, of_songs in songs.spaces.items()}
    text_of_song = np.array([place[songs.texts[row]] for row in held_out])
    tasks = retrieval_tasks(
        heard, {space: of[: len(texts)] for space, of in vectors.items()}, text_of_song, draws, settings
    )
    dealt = last[np.random.default_rng(settings.seed).permutation(len(last))]
    methods = {**songs.spaces, "log_mel": songs.log_mel, "shuffled": dealt}
    for of in columns:
        of_labelled = draws.of(np.searchsorted(held_out, of.held_out)).about(
            of.column, _labelled(songs, of, of.held_out)
        )
        if names[of.column]:
            rows = [place[prompt] for prompt in prompts[of.column]]
            words = {space: of_texts[rows] for space, of_texts in vectors.items()}
            named = of_labelled.about(names[of.column], settings.label_prompt)
            tasks.append(zero_shot_task(of, names[of.column], songs.spaces, words, named))
        learned = of_labelled.about(_labelled(songs, of, of.training), settings.folds, settings.neighbors)
        probe = probe_task(of, methods, artists, learned, settings)
        tasks += [] if probe is None else [probe]
    return tasks


def _labelled(songs: Songs, of: Labels, rows: np.ndarray) -> list[tuple[str, tuple[str, ...]]]:
    """Ids and labels of these songs, for the fingerprint of a task."""
    return [(songs.ids[row], of.values[row]) for row in rows]


def retrieval_tasks(
    songs: dict[str, np.ndarray],
    texts: dict[str, np.ndarray],
    text_of_song: np.ndarray,
    draws: Draws,
    settings: EvaluateSettings,
) -> list[Task]:
    """Both directions of retrieval: `recall@k`, `mrr`, `median_rank`; the control is the exact expectation over random
    orders.

    By space: `songs` [songs, dim] and the unique `texts` [texts, dim], unit norm. `text_of_song`: int [songs], the row
    of a song's text; every text has a song. `draws` of the songs.
    """
    count = len(next(iter(texts.values())))
    each, songs_of_text = np.arange(count), np.bincount(text_of_song, minlength=count)
    last = "preference" if "preference" in songs else "semantic"
    generator = np.random.default_rng(settings.seed)
    orders = [generator.permutation(len(text_of_song)) for _ in range(SHUFFLES)]

    def to_audio(of_songs: np.ndarray, of_texts: np.ndarray) -> FirstCorrect:
        return first_correct(of_texts, of_songs, each, text_of_song)

    def to_text(of_songs: np.ndarray, of_texts: np.ndarray) -> FirstCorrect:
        return first_correct(of_songs, of_texts, text_of_song, each)

    tasks = []
    for name, title, unit, ask, correct, gallery, of_queries in (
        (
            "text_to_audio",
            "text → audio",
            "texts",
            to_audio,
            songs_of_text,
            len(text_of_song),
            draws.merged(text_of_song, count),
        ),
        ("audio_to_text", "audio → text", "songs", to_text, np.ones(len(text_of_song), dtype=np.int64), count, draws),
    ):
        methods = {
            space: query_figures(ask(of_songs, texts[space]), of_queries, settings.ks)
            for space, of_songs in songs.items()
        }
        dealt = [query_figures(ask(songs[last][order], texts[last]), of_queries, settings.ks) for order in orders]
        methods["shuffled"] = {figure: _average([of[figure] for of in dealt]) for figure in dealt[0]}
        tied = FirstCorrect(np.zeros_like(correct), np.full_like(correct, gallery), correct)
        middle = chance(gallery, correct, settings.ks)["median_rank"]  # which songs are drawn hardly moves it
        same = np.full(len(draws.weights), middle, dtype=np.float32)
        median = Estimate(middle, len(correct), same, of_queries.population)
        methods["random"] = {**query_figures(tied, of_queries, settings.ks), "median_rank": median}
        tasks.append(
            Task(name, title, unit, "artists", "random", methods, {"queries": len(correct), "gallery": gallery})
        )
    return tasks


class FirstCorrect(NamedTuple):
    """Where the best correct items of queries stand; int64 [queries] each."""

    above: np.ndarray
    """Items with a higher score than the best correct one."""
    tied: np.ndarray
    """Items with its score, itself among them."""
    correct: np.ndarray
    """Correct ones of those."""

    @property
    def rank(self) -> np.ndarray:
        """Expected rank, from 1, of the first correct item when tied items stand in random order; float64 [queries]."""
        # r correct and m other items in random order have m / (r + 1) others before the first correct one, on average
        return 1 + self.above + (self.tied - self.correct) / (self.correct + 1)


def first_correct(
    queries: np.ndarray, gallery: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, cells: int = CELLS
) -> FirstCorrect:
    """Where the first gallery item of each query's own group stands.

    `queries`: [queries, dim], `gallery`: [items, dim], compared by inner product; groups: int. Every query needs an
    item of its group. At most `cells` similarities are held at once.
    """
    found = FirstCorrect(*(np.empty(len(queries), dtype=np.int64) for _ in range(3)))
    chunk = max(1, cells // max(1, len(gallery)))
    for start in range(0, len(queries), chunk):
        rows = slice(start, start + chunk)
        scores = queries[rows] @ gallery.T
        correct = query_group[rows, None] == gallery_group[None]
        best = np.where(correct, scores, -np.inf).max(axis=1, keepdims=True)
        tied = scores == best
        found.above[rows] = (scores > best).sum(axis=1)
        found.tied[rows] = tied.sum(axis=1)
        found.correct[rows] = (tied & correct).sum(axis=1)
    return found


def first_correct_rank(
    queries: np.ndarray, gallery: np.ndarray, query_group: np.ndarray, gallery_group: np.ndarray, cells: int = CELLS
) -> np.ndarray:
    """Expected rank, from 1, of the first gallery item of each query's own group; float64 [queries]. Arguments as of
    `first_correct`.
    """
    return first_correct(queries, gallery, query_group, gallery_group, cells).rank


def rank_summary(ranks: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """`recall@k` (share of queries with a correct item among the first k), `mrr` and `median_rank` of
    `first_correct_rank`.
    """
    recall = {f"recall@{k}": float((ranks <= k).mean()) for k in ks}
    return {**recall, "mrr": float((1 / ranks).mean()), "median_rank": float(np.median(ranks))}


def query_figures(found: FirstCorrect, draws: Draws, ks: Sequence[int]) -> dict[str, Estimate]:
    """`recall@k` (a correct item is among the first k), `mrr` and `median_rank` over queries.

    Tied items stand in random order and the figures are expectations over it, so that a collapsed model, to which all
    items are equal, is at chance. The median is that of the expected ranks.
    """
    reciprocal = 1.0 / (found.above + 1)
    recall = {k: (found.above < k).astype(np.float64) for k in ks}
    for i in np.flatnonzero(found.tied > found.correct):
        first = first_hit_distribution(int(found.tied[i]), int(found.correct[i]))
        reciprocal[i] = (first / (found.above[i] + 1 + np.arange(len(first)))).sum()
        for k in ks:
            recall[k][i] = min(first[: max(0, k - int(found.above[i]))].sum(), 1.0)
    return {
        **{f"recall@{k}": bootstrap.mean(recall[k], draws) for k in ks},
        "mrr": bootstrap.mean(reciprocal, draws),
        "median_rank": bootstrap.median(found.rank, draws),
    }


def chance(gallery: int, correct: np.ndarray, ks: Sequence[int]) -> dict[str, float]:
    """The figures of a random order of `gallery` items; `correct`: int [queries], how many of them answer each
    query.
    """
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


def _average(parts: list[Estimate]) -> Estimate:
    """The mean of figures of the same units and draws."""
    resampled = np.mean([part.resampled for part in parts if part.resampled is not None], axis=0)
    return Estimate(float(np.mean([part.value for part in parts])), parts[0].n, resampled, parts[0].population)
