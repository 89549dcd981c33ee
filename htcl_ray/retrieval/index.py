"""Songs and their vectors, searched by inner product. The only file that knows FAISS.

A stored vector is [semantic ; preference], both of unit norm, never renormalised. A query is scaled by (1 - blend, blend), so that one
inner product is `(1 - blend) * semantic_score + blend * preference_score` exactly.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from htcl_ray.errors import MismatchError, QueryError, SongNotFoundError
from htcl_ray.retrieval.index_folder import SONGS_FILE, VECTORS_FILE, read_manifest
from htcl_ray.retrieval.vectors import ModelVersions, Vectors
from htcl_ray.schemas import INDEX_SONGS
from htcl_ray.settings import IndexSettings
from htcl_ray.storage import MANIFEST, Workspace, build_manifest, file_sha256

UNIT_NORM_TOLERANCE = 1e-3
TIE_TOLERANCE = 1e-6
"""Scores this close may come back from FAISS in any order, so they are compared again in double precision."""
SPARE_CANDIDATES = 8
"""Candidates fetched beyond what is asked for, so that ties at the k-th place are seen without a second search."""


@dataclass(frozen=True)
class Hit:
    """One result. Scores are cosines in [-1, 1]; `preference_score` is None without stage 2 or without a preference query."""

    song_id: str
    score: float
    semantic_score: float
    preference_score: float | None


class SongIndex:
    """Nearest songs to a query. Make one with `build` or `load`.

    Searches may run at the same time in several threads; `upsert`, `remove` and `compact` may not run beside anything else.
    """

    def __init__(self, vectors: Any, songs: pa.Table, *, dim: int, settings: IndexSettings, model_versions: ModelVersions) -> None:
        self._faiss = vectors
        self.songs = songs
        """Row i describes vector i; columns of `schemas.INDEX_SONGS`. Removed songs stay until `compact`."""
        self.dim = dim
        """Width of one space."""
        self.settings = settings
        self.model_versions = model_versions
        """Fingerprints of the weights that made the vectors."""
        self.manifest: dict[str, Any] = {}
        """Of the folder that the index was loaded from or saved to."""
        self._ids: list[str] = songs["song_id"].to_pylist()
        self._row = {song_id: row for row, song_id in enumerate(self._ids)}
        self._alive = np.ones(len(self._ids), dtype=bool)

    @classmethod
    def build(
        cls,
        song_ids: Sequence[str],
        vectors: Vectors,
        *,
        metadata: pa.Table | None = None,
        settings: IndexSettings | None = None,
        model_versions: ModelVersions | None = None,
    ) -> Self:
        """An index over `vectors`, whose row i belongs to `song_ids[i]`.

        `metadata` has one row per song in the same order and any columns of `schemas.INDEX_SONGS`. Without preference vectors only
        blend 0 can be searched. Raises ValueError for rows that are not finite or not of unit norm, and for repeated ids.
        """
        settings = settings or IndexSettings()
        width = vectors.dim * (1 if vectors.preference is None else 2)
        index = cls(
            _new(settings, width), INDEX_SONGS.empty_table(), dim=vectors.dim, settings=settings, model_versions=model_versions or {}
        )
        index.upsert(song_ids, vectors, metadata=metadata)
        return index

    def __len__(self) -> int:
        return len(self._row)

    def __contains__(self, song_id: object) -> bool:
        return song_id in self._row

    @property
    def kind(self) -> str:
        """`flat` (exact) or `hnsw`."""
        return self.settings.kind

    @property
    def has_preference(self) -> bool:
        """Whether the vectors have a preference half, so that a blend above 0 is valid."""
        return self._faiss.d == 2 * self.dim

    @property
    def default_blend(self) -> float:
        """0.5, or 0 without stage 2."""
        return 0.5 if self.has_preference else 0.0

    def describe(self) -> dict[str, Any]:
        """What this index is, as its manifest says it."""
        return {
            "dim": self.dim,
            "has_preference": self.has_preference,
            "songs": len(self),
            "index": self.settings.model_dump(mode="json"),
            "model_versions": self.model_versions,
        }

    def search(
        self, queries: Vectors, k: int = 10, *, blend: float | None = None, exclude: Sequence[Collection[str]] | None = None
    ) -> list[list[Hit]]:
        """The k best songs for each of n queries, best first; equal scores are in the order of their ids.

        `exclude` has one collection of song ids per query, which are left out; k songs come back while there are that many others.
        `queries.preference` may be None when blend is 0. Raises QueryError.
        """
        blend = self.check_blend(blend)
        if k < 1:
            raise QueryError(f"k is {k}; expected at least 1")
        if queries.dim != self.dim:
            raise QueryError(f"the query has {queries.dim} dimensions, but the index has {self.dim}; expected those of its models")
        if blend > 0 and queries.preference is None:
            raise QueryError(f"blend is {blend}, but the query has no preference vector; expected one, or blend 0")
        excluded: Sequence[Collection[str]] = exclude if exclude is not None else [()] * len(queries)
        if len(excluded) != len(queries):
            raise QueryError(f"exclude has {len(excluded)} collections; expected one for each of the {len(queries)} queries")
        if not len(self) or not len(queries):
            return [[] for _ in range(len(queries))]
        joined = self._join(queries, blend)
        if not np.isfinite(joined).all():
            raise QueryError("the query vector holds a number that is not finite; expected finite numbers")
        most = max(len(ids) for ids in excluded)
        candidates = self._nearest(joined, k + most + SPARE_CANDIDATES)
        return [
            self._rank(joined[i : i + 1], queries.rows(slice(i, i + 1)), candidates[i], k, blend, set(excluded[i]))
            for i in range(len(queries))
        ]

    def check_blend(self, blend: float | None) -> float:
        """The blend to use. Raises QueryError for a value out of range, or above 0 without stage 2."""
        if blend is None:
            return self.default_blend
        if not 0 <= blend <= 1:
            raise QueryError(f"blend is {blend}; expected 0 (semantic) to 1 (preference)")
        if blend > 0 and not self.has_preference:
            raise QueryError(f"blend is {blend}, but this index has no preference vectors (stage 2); expected 0")
        return float(blend)

    def vectors_of(self, song_ids: Sequence[str]) -> Vectors:
        """Stored vectors, in the order of the ids. Raises SongNotFoundError."""
        rows = np.array([self._row_of(song_id) for song_id in song_ids], dtype=np.int64)
        return self._split(self._faiss.reconstruct_batch(rows))

    def metadata_of(self, song_id: str) -> dict[str, Any]:
        """The song's row of `songs`. Raises SongNotFoundError."""
        return self.songs.slice(self._row_of(song_id), 1).to_pylist()[0]

    def upsert(self, song_ids: Sequence[str], vectors: Vectors, *, metadata: pa.Table | None = None) -> None:
        """Add songs, or replace those that are there. Arguments and errors are those of `build`."""
        repeated = len(song_ids) - len(set(song_ids))
        if repeated:
            raise ValueError(f"{repeated} song ids are repeated; expected each once")
        if len(vectors) != len(song_ids):
            raise ValueError(f"there are {len(vectors)} vectors for {len(song_ids)} songs; expected one each")
        stored = self._join(vectors)
        if vectors.dim != self.dim or stored.shape[1] != self._faiss.d:
            raise ValueError(f"the vectors are {stored.shape[1]} wide, but the index is {self._faiss.d}; expected those of the same models")
        for half in (vectors.semantic, vectors.preference):
            if half is not None and not (np.abs(np.linalg.norm(half, axis=1) - 1) < UNIT_NORM_TOLERANCE).all():
                raise ValueError("a vector is not of unit norm; expected finite rows of length 1")
        added = _song_rows(song_ids, metadata)
        self.remove([song_id for song_id in song_ids if song_id in self._row])
        self._faiss.add(stored)
        self._row |= {song_id: len(self._ids) + i for i, song_id in enumerate(song_ids)}
        self._ids += song_ids
        self.songs = pa.concat_tables([self.songs, added]).combine_chunks()
        self._alive = np.append(self._alive, np.ones(len(song_ids), dtype=bool))

    def remove(self, song_ids: Collection[str]) -> None:
        """Take songs out of every later answer; `compact` frees their space. Raises SongNotFoundError and then removes none."""
        rows = [self._row_of(song_id) for song_id in set(song_ids)]
        self._alive[rows] = False
        for song_id in set(song_ids):
            del self._row[song_id]

    def compact(self) -> None:
        """Build the structure anew from the songs that are left, when any was removed. Answers stay the same up to the kind's recall."""
        if self._alive.all():
            return
        kept = np.flatnonzero(self._alive)
        vectors = self._faiss.reconstruct_batch(kept)
        self._faiss = _new(self.settings, self._faiss.d)
        self._faiss.add(vectors)
        self.songs = self.songs.take(kept).combine_chunks()
        self._ids = [self._ids[row] for row in kept]
        self._row = {song_id: row for row, song_id in enumerate(self._ids)}
        self._alive = np.ones(len(kept), dtype=bool)

    def save(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
    ) -> None:
        """Write `index.faiss`, `songs.parquet` and, last, `manifest.json`; compacts first."""
        self.compact()
        target = Workspace(str(folder))
        Path(target.root).mkdir(parents=True, exist_ok=True)
        Path(target.full(MANIFEST)).unlink(missing_ok=True)
        faiss.write_index(self._faiss, target.full(VECTORS_FILE))
        target.write_table(SONGS_FILE, self.songs)
        self.manifest = build_manifest(
            "index",
            config=config or {},
            inputs=inputs or {},
            quality=quality,
            **self.describe(),
            files={name: file_sha256(target.full(name)) for name in (VECTORS_FILE, SONGS_FILE)},
        )
        target.finish("", self.manifest)

    @classmethod
    def load(cls, folder: str | Path, *, dim: int | None = None, model_versions: ModelVersions | None = None) -> Self:
        """The index of a folder that `save` wrote.

        Refuses, with both values: a newer format, changed files, and - when they are given - another dimension or other models.
        Raises WorkspaceError and MismatchError.
        """
        source = Workspace(str(folder))
        manifest = read_manifest(folder, dim=dim, model_versions=model_versions)
        vectors = faiss.read_index(source.full(VECTORS_FILE))
        songs = pq.read_table(source.full(SONGS_FILE)).cast(INDEX_SONGS)
        width = manifest["dim"] * (2 if manifest["has_preference"] else 1)
        if (vectors.d, vectors.ntotal) != (width, songs.num_rows):
            raise MismatchError(
                f"{source.uri} holds {vectors.ntotal} vectors of {vectors.d} numbers, but its manifest and songs say {songs.num_rows} of "
                f"{width}; run 'htcl index' again"
            )
        settings = IndexSettings.model_validate(manifest["index"])
        index = cls(vectors, songs, dim=manifest["dim"], settings=settings, model_versions=manifest["model_versions"])
        index.manifest = manifest
        return index

    def _row_of(self, song_id: str) -> int:
        if song_id not in self._row:
            raise SongNotFoundError(f"there is no song '{song_id}' in the index")
        return self._row[song_id]

    def _join(self, vectors: Vectors, blend: float | None = None) -> NDArray[np.float32]:
        """Rows as FAISS sees them, [n, width]: unscaled (stored), or scaled for a query."""
        weights = (1.0, 1.0) if blend is None else (1 - blend, blend)
        halves = [vectors.semantic * np.float32(weights[0])]
        if blend is None and vectors.preference is not None:
            halves.append(vectors.preference)
        elif blend is not None and self.has_preference:
            given = vectors.preference if vectors.preference is not None else np.zeros_like(vectors.semantic)
            halves.append(given * np.float32(weights[1]))
        return np.ascontiguousarray(np.concatenate(halves, axis=1), dtype=np.float32)

    def _split(self, joined: NDArray[np.float32]) -> Vectors:
        return Vectors(joined[:, : self.dim], joined[:, self.dim :] if self.has_preference else None)

    def _nearest(self, joined: NDArray[np.float32], count: int) -> NDArray[np.int64]:
        """Rows of about the `count` best songs of each query, [n, <= count]; -1 where the kind found fewer."""
        count = min(count, len(self))
        selector = None if self._alive.all() else faiss.IDSelectorBitmap(np.packbits(self._alive, bitorder="little"))
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(self.settings.ef_search, count))
        else:
            parameters = faiss.SearchParameters(sel=selector)
        rows = self._faiss.search(joined, count, params=parameters)[1]
        if self.kind == "hnsw":
            # A graph search may end early, above all when many songs were removed; those queries are answered exactly.
            short = np.flatnonzero((rows < 0).any(axis=1))
            if len(short):
                exact = faiss.downcast_index(self._faiss.storage)
                rows[short] = exact.search(joined[short], count, params=faiss.SearchParameters(sel=selector))[1]
        return rows

    def _rank(
        self, joined: NDArray[np.float32], query: Vectors, rows: NDArray[np.int64], k: int, blend: float, excluded: set[str]
    ) -> list[Hit]:
        """The k best of one query's candidates; fetches more while a tie at the k-th place may reach beyond them."""
        while True:
            kept = np.array([row for row in rows if row >= 0 and self._ids[row] not in excluded], dtype=np.int64)
            stored = self._split(self._faiss.reconstruct_batch(kept))
            semantic = _cosines(stored.semantic, query.semantic)
            preference = None
            if stored.preference is not None and query.preference is not None:
                preference = _cosines(stored.preference, query.preference)
            scores = semantic if preference is None else (1 - blend) * semantic + blend * preference
            order = sorted(range(len(kept)), key=lambda i: (-scores[i], self._ids[kept[i]]))
            tied = len(order) > k and scores[order[k - 1]] - scores[order[-1]] <= TIE_TOLERANCE
            if not tied or len(rows) >= len(self):
                break
            rows = self._nearest(joined, 2 * len(rows))[0]
        return [
            Hit(self._ids[kept[i]], float(scores[i]), float(semantic[i]), None if preference is None else float(preference[i]))
            for i in order[:k]
        ]


def _new(settings: IndexSettings, width: int) -> Any:
    if settings.kind == "flat":
        return faiss.IndexFlatIP(width)
    graph = faiss.IndexHNSWFlat(width, settings.hnsw_neighbors, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = settings.ef_construction
    return graph


def _song_rows(song_ids: Sequence[str], metadata: pa.Table | None) -> pa.Table:
    if metadata is not None and metadata.num_rows != len(song_ids):
        raise ValueError(f"metadata has {metadata.num_rows} rows for {len(song_ids)} songs; expected one each")
    columns = {"song_id": pa.array(song_ids, pa.string())}
    for field in INDEX_SONGS:
        if field.name not in columns:
            given = metadata[field.name] if metadata is not None and field.name in metadata.column_names else None
            columns[field.name] = pa.nulls(len(song_ids), field.type) if given is None else given.cast(field.type)
    return pa.table(columns, schema=INDEX_SONGS)


def _cosines(stored: NDArray[np.float32], query: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inner products, [n], clipped against rounding. Summed row by row, so that equal rows score equally wherever they lie."""
    return np.clip((stored.astype(np.float64) * query.astype(np.float64)).sum(axis=1), -1.0, 1.0)
