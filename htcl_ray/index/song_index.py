"""Songs and their vectors, searched by inner product.

A stored vector is [semantic ; preference], both of unit norm, never renormalised. A query is scaled by (1 - blend,
blend), so that one inner product is `(1 - blend) * semantic_score + blend * preference_score` exactly.
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
from htcl_ray.index.engines.faiss_structures import Structure
from htcl_ray.index.folder import MAP_FILE, SONGS_FILE, read_manifest
from htcl_ray.index.input import joined_rows, song_rows
from htcl_ray.index.nprobe import make_structure
from htcl_ray.index.plan import IndexPlan
from htcl_ray.index.segments import IndexState
from htcl_ray.index.vectors import ModelVersions, Vectors
from htcl_ray.schemas import INDEX_SONGS, SONG_MAP
from htcl_ray.search.ranking import Hit, rank
from htcl_ray.workspace.manifest import MANIFEST, build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace

SPARE_CANDIDATES = 8
"""Candidates fetched beyond what is asked for, so that ties at the k-th place are seen without a second search."""


class SongIndex:
    """Nearest songs to a query. Make one with `build` or `load`.

    Searches may run in any number of threads beside `upsert`, `remove` and `compact`: each answers from the songs of
    one moment. All that changes is one reference to an `IndexState`, which itself never changes; who changes the index
    waits for who does so already.

    The structure of `build` or `load` stays as it is. Songs that come later lie beside it and are scored exactly,
    removed ones are left out by a mask, and `compact` folds both in. Filters, removals and exclusions keep returning k
    results: see `Structure`.
    """

    def __init__(self, state: IndexState, *, dim: int, settings: IndexSettings, model_versions: ModelVersions) -> None:
        self._state = state
        self._writing = threading.Lock()
        self.dim = dim
        """Width of one space."""
        self.settings = settings
        """As asked; `kind` is what came of it."""
        self.model_versions = model_versions
        """Fingerprints of the weights that made the vectors."""
        self.manifest: dict[str, Any] = {}
        """Of the folder that the index was loaded from or saved to."""
        self.song_map: pa.Table | None = None
        """Places of songs for people to look at (`song_map.draw_map`); None where nobody drew them."""

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

        `metadata` has one row per song in the same order and any columns of `schemas.INDEX_SONGS`. Without preference
        vectors only blend 0 can be searched. The kind and its numbers are chosen for `songs_to_come` songs more. Raises
        ValueError for rows that are not finite or not of unit norm, and for repeated ids.
        """
        settings = settings or IndexSettings()
        joined = joined_rows(song_ids, vectors)
        structure = make_structure(joined, vectors.dim, settings, len(song_ids) + songs_to_come)
        state = IndexState.of(structure, song_rows(song_ids, metadata))
        return cls(state, dim=vectors.dim, settings=settings, model_versions=model_versions or {})

    def snapshot(self) -> Self:
        """The index as it is now: nothing that happens to one of the two afterwards changes an answer of the other."""
        other = type(self)(self._state, dim=self.dim, settings=self.settings, model_versions=self.model_versions)
        other.manifest = self.manifest
        other.song_map = self.song_map
        return other

    @property
    def songs(self) -> pa.Table:
        """Row i describes vector i; columns of `schemas.INDEX_SONGS`. Songs removed from the structure stay until
        `compact`.
        """
        return self._state.songs

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, song_id: object) -> bool:
        return song_id in self._state

    @property
    def kind(self) -> str:
        """What was built: `flat` (exact), `hnsw`, `ivf` or `ivf_pq`."""
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
        """What this index is, as its manifest says it: `index` what was asked, `structure` what was chosen."""
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
        """The k best songs for each of n queries, best first; equal scores are in the order of their ids.

        `exclude` has one collection of song ids per query, `allowed` one entry per row of `songs` (take both from one
        `snapshot`); songs excluded or not allowed are left out, and k songs come back while there are that many others.
        `queries.preference` may be None when blend is 0. Raises QueryError.
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
        """Song ids of rows of `songs`."""
        state = self._state
        return [state.id_of(int(row)) for row in rows]

    def metadata_of(self, song_id: str) -> dict[str, Any]:
        """The song's row of `songs`, as a dictionary. Raises SongNotFoundError."""
        state = self._state
        return state.songs.slice(state.row_of(song_id), 1).to_pylist()[0]

    def upsert(self, song_ids: Sequence[str], vectors: Vectors, *, metadata: pa.Table | None = None) -> None:
        """Add songs, or replace those that are there. Arguments and errors are those of `build`."""
        joined = joined_rows(song_ids, vectors)
        width = self._state.structure.width
        if vectors.dim != self.dim or joined.shape[1] != width:
            raise ValueError(
                f"the vectors are {joined.shape[1]} wide, but the index is {width}; expected those of the same models"
            )
        songs = song_rows(song_ids, metadata)
        with self._writing:
            self._state = self._state.with_songs(song_ids, joined, songs)

    def remove(self, song_ids: Collection[str]) -> None:
        """Take songs out of every later answer; `compact` frees their space. Raises SongNotFoundError and then removes
        none.
        """
        with self._writing:
            self._state = self._state.without(song_ids)

    def compact(self) -> None:
        """Fold later and removed songs into the structure. Answers stay the same up to the kind's recall."""
        with self._writing:
            self._state = self._state.compacted(self.settings, self.dim)

    def save(
        self,
        folder: str | Path,
        *,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Any] | None = None,
        quality: Mapping[str, Any] | None = None,
    ) -> None:
        """Write the structure's files, `songs.parquet`, the map where there is one and, last, `manifest.json`; compacts
        first.
        """
        self.compact()
        whole = self.snapshot()
        target = Workspace(str(folder))
        Path(target.root).mkdir(parents=True, exist_ok=True)
        Path(target.full(MANIFEST)).unlink(missing_ok=True)
        names = [*whole._state.structure.write(Path(target.root)), SONGS_FILE]
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
            files={name: file_sha256(target.full(name)) for name in names},
        )
        target.finish("", self.manifest)

    @classmethod
    def load(cls, folder: str | Path, *, dim: int | None = None, model_versions: ModelVersions | None = None) -> Self:
        """The index of a folder that `save` wrote; its vectors are mapped, so that processes of one machine share them.

        Refuses, with both values: a newer format, changed files, and - when they are given - another dimension or other
        models. Raises WorkspaceError and MismatchError.
        """
        source = Workspace(str(folder))
        manifest = read_manifest(folder, dim=dim, model_versions=model_versions)
        songs = pq.read_table(source.full(SONGS_FILE)).cast(INDEX_SONGS)
        width = manifest["dim"] * (2 if manifest["has_preference"] else 1)
        structure = Structure.read(Path(source.root), IndexPlan(**manifest["structure"]), width, songs.num_rows)
        settings = IndexSettings.model_validate(manifest["index"])
        state = IndexState.of(structure, songs)
        index = cls(state, dim=manifest["dim"], settings=settings, model_versions=manifest["model_versions"])
        index.manifest = manifest
        if MAP_FILE in manifest["files"]:
            index.song_map = pq.read_table(source.full(MAP_FILE)).cast(SONG_MAP)
        return index

    def _scaled(self, queries: Vectors, blend: float) -> NDArray[np.float32]:
        """[n, width]: each half times its share of the blend."""
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
    """Candidates less each query's excluded rows, ranked; asked again for more where a tie at the k-th place may reach
    beyond them.
    """
    count = k + max((len(rows) for rows in excluded), default=0) + spare
    candidates = state.nearest(joined, count, allowed)
    for i, rows in enumerate(excluded):
        if rows:
            candidates[i, np.isin(candidates[i], rows)] = -1
    answers = []
    for i, ranked in enumerate(rank(state, queries, candidates, k, blend)):
        hits = ranked.hits
        if ranked.open and count < state.songs.num_rows:
            one = slice(i, i + 1)
            hits = _search(state, queries.rows(one), joined[one], k, blend, excluded[one], allowed, 2 * count)[0]
        answers.append(hits)
    return answers
