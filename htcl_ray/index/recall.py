"""How much of exact search an index finds, measured with songs that its structure has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from htcl_ray.config.sections import IndexSettings
from htcl_ray.index.engines.faiss_structures import best_rows
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import ModelVersions, Vectors

RECALL_AT = 10
QUERIES = 256
SHARE = 0.1
"""At most this share of the songs is held out."""
SAME_SCORE = 1e-6


@dataclass(frozen=True)
class Recall:
    """Share of the 10 best songs of exact search that were found, by blend; 1 with fewer than 2 songs, when nothing can
    be asked.
    """

    by_blend: dict[str, float]
    queries: int

    @property
    def worst(self) -> float:
        """Over the blends."""
        return min(self.by_blend.values())

    def quality(self) -> dict[str, object]:
        """As a manifest says it."""
        return {"recall_at_10": self.worst, "recall_at_10_by_blend": self.by_blend, "recall_queries": self.queries}


def build_measured(
    song_ids: list[str],
    vectors: Vectors,
    *,
    metadata: pa.Table | None = None,
    settings: IndexSettings | None = None,
    model_versions: ModelVersions | None = None,
    seed: int = 0,
) -> tuple[SongIndex, Recall]:
    """An index over all songs, and its recall before some of them were added, which served as queries.

    At most 256 songs and at most a tenth of them are drawn, but one at least when there are two songs. The index learns
    its lists and codes without them; afterwards they are folded in. Arguments and errors are those of
    `SongIndex.build`.
    """
    count = len(song_ids)
    held_out = min(QUERIES, max(int(SHARE * count), 1)) if count > 1 else 0
    order = np.random.default_rng(seed).permutation(count)
    asked, first = np.sort(order[:held_out]), np.sort(order[held_out:])

    def part(rows: np.ndarray) -> tuple[list[str], Vectors, pa.Table | None]:
        return [song_ids[row] for row in rows], vectors.rows(rows), None if metadata is None else metadata.take(rows)

    ids, stored, about = part(first)
    index = SongIndex.build(
        ids, stored, metadata=about, settings=settings, model_versions=model_versions, songs_to_come=held_out
    )
    ids, queries, about = part(asked)
    recall = measure_recall(index, stored, queries)
    index.upsert(ids, queries, metadata=about)
    index.compact()
    return index, recall


def measure_recall(index: SongIndex, stored: Vectors, queries: Vectors) -> Recall:
    """Recall@10 at both ends and in the middle of the blend; `stored` is what the index holds.

    A song that scores like the 10th counts as one of the 10.
    """
    by_blend = {}
    k = min(RECALL_AT, len(stored))
    for blend in (0.0, 0.5, 1.0) if index.has_preference else (0.0,):
        if not k or not len(queries):
            by_blend[str(blend)] = 1.0
            continue
        bounds = _kth_scores(stored, queries, k, blend)
        answers = index.search(queries, k, blend=blend)
        right = sum(
            hit.score >= bound - SAME_SCORE for hits, bound in zip(answers, bounds, strict=True) for hit in hits
        )
        by_blend[str(blend)] = right / (k * len(queries))
    return Recall(by_blend, len(queries))


def _kth_scores(stored: Vectors, queries: Vectors, k: int, blend: float) -> np.ndarray:
    """The k-th best score of each query, [n], in double precision; float32 finds which rows these are."""
    halves = [((1 - blend), stored.semantic, queries.semantic)]
    if stored.preference is not None and queries.preference is not None:
        halves.append((blend, stored.preference, queries.preference))
    rows = best_rows(
        np.concatenate([half for _, half, _ in halves], axis=1),
        np.concatenate([np.float32(weight) * query for weight, _, query in halves], axis=1),
        k,
    )
    scores = sum(
        weight * (half[rows].astype(np.float64) * query[:, None, :]).sum(axis=2) for weight, half, query in halves
    )
    return scores.min(axis=1)
