"""Recall@10 of an index against exact search, measured with songs that its structure has not seen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from htcl_ray.config.sections import IndexSettings
from htcl_ray.index.engines.base import best_rows
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import ModelVersions, Vectors

RECALL_AT = 10
QUERIES = 256
SHARE = 0.1
"""Maximum share of the songs that is held out."""
SAME_SCORE = 1e-6


@dataclass(frozen=True)
class Recall:
    """Recall@10 by blend: the share of the 10 best songs of exact search that the index returns.

    1 with fewer than 2 songs, which leave no queries.
    """

    by_blend: dict[str, float]
    queries: int

    @property
    def worst(self) -> float:
        """Lowest recall over all blends."""
        return min(self.by_blend.values())

    def quality(self) -> dict[str, object]:
        """The measurement in the format of manifests."""
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
    """Build an index over all songs, and measure its recall with held-out songs as queries.

    At most 256 songs and at most a tenth of all are held out, but at least one of two or more. The index learns its
    lists and codes without them; afterwards they are added and the index is compacted. Arguments and errors are those
    of `SongIndex.build`.
    """
    count = len(song_ids)
    held_out = min(QUERIES, max(int(SHARE * count), 1)) if count > 1 else 0
    order = np.random.default_rng(seed).permutation(count)
    query_rows, stored_rows = np.sort(order[:held_out]), np.sort(order[held_out:])

    def part(rows: np.ndarray) -> tuple[list[str], Vectors, pa.Table | None]:
        return [song_ids[row] for row in rows], vectors.rows(rows), None if metadata is None else metadata.take(rows)

    ids, stored, songs = part(stored_rows)
    index = SongIndex.build(
        ids, stored, metadata=songs, settings=settings, model_versions=model_versions, songs_to_come=held_out
    )
    ids, queries, songs = part(query_rows)
    recall = measure_recall(index, stored, queries)
    index.upsert(ids, queries, metadata=songs)
    index.compact()
    return index, recall


def measure_recall(index: SongIndex, stored: Vectors, queries: Vectors) -> Recall:
    """Measure recall@10 at blends 0, 0.5 and 1; `stored`: the vectors of the index.

    A song with the same score as the 10th best counts as a hit.
    """
    by_blend = {}
    k = min(RECALL_AT, len(stored))
    for blend in (0.0, 0.5, 1.0) if index.has_preference else (0.0,):
        if not k or not len(queries):
            by_blend[str(blend)] = 1.0
            continue
        bounds = _kth_scores(stored, queries, k, blend)
        results = index.search(queries, k, blend=blend)
        correct = sum(
            hit.score >= bound - SAME_SCORE for hits, bound in zip(results, bounds, strict=True) for hit in hits
        )
        by_blend[str(blend)] = correct / (k * len(queries))
    return Recall(by_blend, len(queries))


def _kth_scores(stored: Vectors, queries: Vectors, k: int, blend: float) -> np.ndarray:
    """The k-th best score of each query in double precision, [n]; single precision selects the rows."""
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
    return np.asarray(scores.min(axis=1))
