"""Index of songs and their vectors, searched by inner product.

A stored vector is [semantic ; preference], both halves of unit norm and never renormalised. The halves of a query are
scaled by 1 - blend and blend, so that one inner product is (1 - blend) · semantic_score + blend · preference_score.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import QueryError
from htcl_ray.index.engines.base import IndexPlan
from htcl_ray.index.engines.selection import make_structure, read_structure
from htcl_ray.index.folder import MAP_FILE, SONGS_FILE, read_manifest
from htcl_ray.index.ranking import Hit, rank
from htcl_ray.index.segments import IndexState
from htcl_ray.index.vectors import UNIT_NORM_TOLERANCE, ModelVersions, Vectors
from htcl_ray.schemas import ESTIMATED, INDEX_SONGS, SONG_MAP
from htcl_ray.workspace.manifest import MANIFEST, build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace

SPARE_CANDIDATES = 8
"""Candidates fetched in addition to the requested ones, so that ties at rank k are seen without a second search."""


class SongIndex:
    """Nearest-neighbour index of songs. Create one with `build` or `load`.

    Searches may run in any number of threads during `upsert`, `remove` and `compact`: each search reads one immutable
    `IndexState`, and a change replaces the reference to it. Changes are serialised by a lock.

    The main structure of `build` or `load` is not modified. Upserted songs go to a delta segment, which is scored
    exactly; removed songs become tombstones, which a live mask excludes; `compact` merges both into the structure.
    Searches with filters, tombstones and exclusions return k results while k songs qualify: see `Structure`.
    """

    def __init__(self, state: IndexState, *, dim: int, settings: IndexSettings, model_versions: ModelVersions) -> None:
        self._state = state
        self._writing = threading.Lock()
        self.dim = dim
        """Width of one space."""
        self.settings = settings
        """As configured; `kind` is the kind that was built."""
        self.model_versions = model_versions
        """Fingerprints of the weights of the models that made the vectors."""
        self.manifest: dict[str, Any] = {}
        """Manifest of the folder that the index was loaded from or saved to."""
        self.song_map: pa.Table | None = None
        """Coordinates of songs on a map (`song_map.draw_map`); None when no map was drawn."""

    @classmethod
    def build(
        cls,
        song_ids: Sequence[str],
        vectors: Vectors,
        *,
        metadata: pa.Table | None = None,
        settings: IndexSettings | None = None,
        model_versions: ModelVersions | None = None,
        songs_to_come: int = 0,
    ) -> Self:
        """An index over `vectors`, whose row i belongs to `song_ids[i]`.

        `metadata`: one row per song in the same order, with any columns of `schemas.INDEX_SONGS`. `songs_to_come`:
        additional songs for which the kind and its parameters are chosen. Without preference vectors only blend 0 can
        be searched. Raises ValueError for rows that are not finite or not of unit norm, and for repeated ids.
        """
        settings = settings or IndexSettings()
        joined = _joined_rows(song_ids, vectors)
        structure = make_structure(joined, vectors.dim, settings, len(song_ids) + songs_to_come)
        state = IndexState.of(structure, _song_rows(song_ids, metadata))
        return cls(state, dim=vectors.dim, settings=settings, model_versions=model_versions or {})

    def snapshot(self) -> Self:
        """A copy of the index as it is now; later changes of one of the two do not affect the other."""
        other = type(self)(self._state, dim=self.dim, settings=self.settings, model_versions=self.model_versions)
        other.manifest = self.manifest
        other.song_map = self.song_map
        return other

    @property
    def state(self) -> IndexState:
        """The current immutable state."""
        return self._state

    @property
    def songs(self) -> pa.Table:
        """Songs table, with the columns of `schemas.INDEX_SONGS`; row i describes vector i.

        Tombstones keep their rows until `compact`.
        """
        return self._state.songs

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, song_id: object) -> bool:
        return song_id in self._state

    @property
    def kind(self) -> str:
        """Kind that was built: `flat` (exact), `hnsw`, `ivf` or `ivf_pq`."""
        return self._state.structure.plan.kind

    @property
    def has_preference(self) -> bool:
        """Whether the vectors have a preference half, so that a blend above 0 is valid."""
        return self._state.structure.width == 2 * self.dim

    @property
    def default_blend(self) -> float:
        """0.5, or 0 without stage 2."""
        return 0.5 if self.has_preference else 0.0

    def describe(self) -> dict[str, Any]:
        """Description for the manifest: `index` holds the configured settings, `structure` the chosen plan."""
        state = self._state
        return {
            "dim": self.dim,
            "has_preference": self.has_preference,
            "songs": len(state),
            "index": self.settings.model_dump(mode="json"),
            "structure": dataclasses.asdict(state.structure.plan),
            "model_versions": self.model_versions,
        }

    def search(
        self,
        queries: Vectors,
        k: int = 10,
        *,
        blend: float | None = None,
        exclude: Sequence[Collection[str]] | None = None,
        allowed: NDArray[np.bool_] | None = None,
    ) -> list[list[Hit]]:
        """The k best songs of each of n queries, best first; equal scores are sorted by song id.

        `exclude`: one collection of song ids per query. `allowed`: mask of the rows of `songs`; take it and `songs`
        from one `snapshot`. k songs are returned while k others qualify. `queries.preference` may be None when blend is
        0. Raises QueryError.
        """
        blend = self.check_blend(blend)
        if k < 1:
            raise QueryError(f"k is {k}; expected at least 1")
        if queries.dim != self.dim:
            raise QueryError(
                f"the query has {queries.dim} dimensions, but the index has {self.dim}; expected those of its models"
            )
        if blend > 0 and queries.preference is None:
            raise QueryError(f"blend is {blend}, but the query has no preference vector; expected one, or blend 0")
        if exclude is not None and len(exclude) != len(queries):
            raise QueryError(
                f"exclude has {len(exclude)} collections; expected one for each of the {len(queries)} queries"
            )
        if not len(queries):
            return []
        joined = self._scaled(queries, blend)
        if not np.isfinite(joined).all():
            raise QueryError("the query vector holds a number that is not finite; expected finite numbers")
        state = self._state
        excluded = [[state.row_of(song_id) for song_id in ids if song_id in state] for ids in exclude or ()]
        return _search(state, queries, joined, k, blend, excluded, allowed)

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
        state = self._state
        joined = state.vectors(np.array([state.row_of(song_id) for song_id in song_ids], dtype=np.int64))
        return Vectors(joined[:, : self.dim], joined[:, self.dim :] if self.has_preference else None)

    def row_of(self, song_id: str) -> int:
        """The song's row of `songs`. Raises SongNotFoundError."""
        return self._state.row_of(song_id)

    def ids_of(self, rows: Sequence[int] | NDArray[np.int64]) -> list[str]:
        """Song ids of some rows of `songs`."""
        state = self._state
        return [state.id_of(int(row)) for row in rows]

    def metadata_of(self, song_id: str) -> dict[str, Any]:
        """The song's row of `songs`, as a dictionary. Raises SongNotFoundError."""
        state = self._state
        row: dict[str, Any] = state.songs.slice(state.row_of(song_id), 1).to_pylist()[0]
        return row

    def upsert(self, song_ids: Sequence[str], vectors: Vectors, *, metadata: pa.Table | None = None) -> None:
        """Insert songs, or replace those with the same ids. Arguments and errors are those of `build`."""
        joined = _joined_rows(song_ids, vectors)
        width = self._state.structure.width
        if vectors.dim != self.dim or joined.shape[1] != width:
            raise ValueError(
                f"the vectors are {joined.shape[1]} wide, but the index is {width}; expected those of the same models"
            )
        songs = _song_rows(song_ids, metadata)
        with self._writing:
            self._state = self._state.with_songs(song_ids, joined, songs)

    def remove(self, song_ids: Collection[str]) -> None:
        """Delete songs; `compact` frees their space.

        Raises SongNotFoundError, and then deletes none, when the index does not contain one of them.
        """
        with self._writing:
            self._state = self._state.without(song_ids)

    def compact(self) -> None:
        """Merge the delta segment and tombstones into the structure. Results change only within the kind's recall."""
        with self._writing:
            self._state = self._state.compacted(self.settings, self.dim)

    def save(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
        auto_tags: Mapping[str, Any] | None = None,
    ) -> None:
        """Compact, then write the structure's files, `songs.parquet`, the map, if any, and finally `manifest.json`.

        `auto_tags`: where estimated values of the songs come from, for the manifest.
        """
        self.compact()
        whole = self.snapshot()
        target = Workspace(str(folder))
        Path(target.root).mkdir(parents=True, exist_ok=True)
        Path(target.full(MANIFEST)).unlink(missing_ok=True)
        names = [*whole.state.structure.write(Path(target.root)), SONGS_FILE]
        target.write_table(SONGS_FILE, whole.songs)
        if whole.song_map is not None:
            target.write_table(MAP_FILE, whole.song_map)
            names.append(MAP_FILE)
        self.manifest = build_manifest(
            "index",
            config=config or {},
            inputs=inputs or {},
            quality=quality,
            **whole.describe(),
            auto_tags=auto_tags,
            files={name: file_sha256(target.full(name)) for name in names},
        )
        target.finish("", self.manifest)

    @classmethod
    def load(cls, folder: str | Path, *, dim: int | None = None, model_versions: ModelVersions | None = None) -> Self:
        """Load the index of a folder that `save` wrote. Vectors are memory-mapped and shared by processes.

        Raises WorkspaceError for a missing file, and MismatchError for a newer format, changed files, or another `dim`
        or `model_versions` than expected.
        """
        source = Workspace(str(folder))
        manifest = read_manifest(folder, dim=dim, model_versions=model_versions)
        songs = pq.read_table(source.full(SONGS_FILE))
        if ESTIMATED not in songs.column_names:  # an index of before estimates existed
            songs = songs.append_column(
                INDEX_SONGS.field(ESTIMATED), pa.nulls(len(songs), INDEX_SONGS.field(ESTIMATED).type)
            )
        songs = songs.cast(INDEX_SONGS)
        width = manifest["dim"] * (2 if manifest["has_preference"] else 1)
        structure = read_structure(Path(source.root), IndexPlan(**manifest["structure"]), width, songs.num_rows)
        settings = IndexSettings.model_validate(manifest["index"])
        state = IndexState.of(structure, songs)
        index = cls(state, dim=manifest["dim"], settings=settings, model_versions=manifest["model_versions"])
        index.manifest = manifest
        if MAP_FILE in manifest["files"]:
            index.song_map = pq.read_table(source.full(MAP_FILE)).cast(SONG_MAP)
        return index

    def _scaled(self, queries: Vectors, blend: float) -> NDArray[np.float32]:
        """The queries as [n, width], each half multiplied by its share of the blend."""
        joined = np.zeros((len(queries), self._state.structure.width), dtype=np.float32)
        joined[:, : self.dim] = queries.semantic * np.float32(1 - blend)
        if self.has_preference and queries.preference is not None:
            joined[:, self.dim :] = queries.preference * np.float32(blend)
        return joined


def _search(
    state: IndexState,
    queries: Vectors,
    joined: NDArray[np.float32],
    k: int,
    blend: float,
    excluded: Sequence[list[int]],
    allowed: NDArray[np.bool_] | None,
    spare: int = SPARE_CANDIDATES,
) -> list[list[Hit]]:
    """Ranked candidates without each query's excluded rows.

    A query with a tie at rank k that may extend beyond the candidates is repeated with twice as many.
    """
    count = k + max((len(rows) for rows in excluded), default=0) + spare
    candidates = state.nearest(joined, count, allowed)
    for i, rows in enumerate(excluded):
        if rows:
            candidates[i, np.isin(candidates[i], rows)] = -1
    results = []
    for i, ranked in enumerate(rank(state, queries, candidates, k, blend)):
        hits = ranked.hits
        if ranked.tied and count < state.songs.num_rows:
            one = slice(i, i + 1)
            hits = _search(state, queries.rows(one), joined[one], k, blend, excluded[one], allowed, 2 * count)[0]
        results.append(hits)
    return results


def _song_rows(song_ids: Sequence[str], metadata: pa.Table | None) -> pa.Table:
    """Rows of `schemas.INDEX_SONGS`; columns that `metadata` lacks are null. Raises ValueError for another length."""
    if metadata is not None and metadata.num_rows != len(song_ids):
        raise ValueError(f"metadata has {metadata.num_rows} rows for {len(song_ids)} songs; expected one each")
    columns = {"song_id": pa.array(song_ids, pa.string())}
    for field in INDEX_SONGS:
        if field.name not in columns:
            given = metadata[field.name] if metadata is not None and field.name in metadata.column_names else None
            columns[field.name] = pa.nulls(len(song_ids), field.type) if given is None else given.cast(field.type)
    return pa.table(columns, schema=INDEX_SONGS)


def _joined_rows(song_ids: Sequence[str], vectors: Vectors) -> NDArray[np.float32]:
    """Rows as they are stored, [n, width]: [semantic ; preference]. Raises ValueError; see `SongIndex.build`."""
    repeated = len(song_ids) - len(set(song_ids))
    if repeated:
        raise ValueError(f"{repeated} song ids are repeated; expected each once")
    if len(vectors) != len(song_ids):
        raise ValueError(f"got {len(vectors)} vectors for {len(song_ids)} songs; expected one each")
    halves = [half for half in (vectors.semantic, vectors.preference) if half is not None]
    if not all((np.abs(np.linalg.norm(half, axis=1) - 1) < UNIT_NORM_TOLERANCE).all() for half in halves):
        raise ValueError("a vector is not of unit norm; expected finite rows of length 1")
    return np.ascontiguousarray(np.concatenate(halves, axis=1), dtype=np.float32)
