"""Immutable state of an index: a main structure with tombstones, and a delta segment of newer songs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.index.engines.base import Structure, best_rows
from htcl_ray.index.engines.selection import fits, make_structure


@dataclass(frozen=True)
class IndexState:
    """Songs of the main structure, some of which are deleted, and a small delta segment that is scored exactly.

    Rows 0 to n - 1 are those of the structure, tombstones included; the rows of the delta segment follow and have no
    tombstones. Every change returns another state, which shares the unchanged parts.
    """

    structure: Structure
    songs: pa.Table
    """Row i describes vector i."""
    ids: Sequence[str]
    """Song ids of the structure's rows; shared between states."""
    rows: dict[str, int]
    """Row of each song of the structure, tombstones included; shared between states."""
    live: NDArray[np.bool_] | None
    """Live mask of the structure's rows; None without tombstones."""
    delta_ids: tuple[str, ...]
    """Song ids of the delta segment."""
    delta_rows: dict[str, int]
    """Row of each song of the delta segment, counted from the structure's first row."""
    delta: NDArray[np.float32]
    """Vectors of the delta segment, [songs, width]."""
    tombstones: int
    """Number of deleted rows of the structure."""

    @classmethod
    def of(cls, structure: Structure, songs: pa.Table) -> Self:
        """A state whose songs are all in the structure."""
        ids = songs["song_id"].to_pylist()
        rows = {song_id: row for row, song_id in enumerate(ids)}
        return cls(structure, songs, ids, rows, None, (), {}, np.empty((0, structure.width), dtype=np.float32), 0)

    def __len__(self) -> int:
        return len(self.ids) - self.tombstones + len(self.delta_ids)

    def __contains__(self, song_id: object) -> bool:
        return isinstance(song_id, str) and self._row(song_id) is not None

    def row_of(self, song_id: str) -> int:
        """Row of a song. Raises SongNotFoundError."""
        row = self._row(song_id)
        if row is None:
            raise SongNotFoundError(f"the index holds no song '{song_id}'")
        return row

    def id_of(self, row: int) -> str:
        """Song id of any row of `songs`."""
        return self.ids[row] if row < len(self.ids) else self.delta_ids[row - len(self.ids)]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of the stored vectors, [..., width] for rows of any shape."""
        if not self.delta_ids:
            return self.structure.vectors[rows]
        copied = np.empty((*rows.shape, self.structure.width), dtype=np.float32)
        in_delta = rows >= len(self.ids)
        copied[~in_delta] = self.structure.vectors[rows[~in_delta]]
        copied[in_delta] = self.delta[rows[in_delta] - len(self.ids)]
        return copied

    def nearest(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Distinct candidates for the `count` best rows of each query, in no particular order, [q, c].

        `allowed`: mask of the rows of `songs`. Raises QueryError for another shape or type.
        """
        if allowed is None:
            return self._nearest(queries, count, self.live, None)
        if allowed.shape != (self.songs.num_rows,) or allowed.dtype != np.bool_:
            raise QueryError(
                f"allowed has shape {allowed.shape} and holds {allowed.dtype}; expected one bool for each of "
                f"{self.songs.num_rows} songs"
            )
        main = allowed[: len(self.ids)]
        return self._nearest(queries, count, main if self.live is None else main & self.live, allowed[len(self.ids) :])

    def with_songs(self, song_ids: Sequence[str], vectors: NDArray[np.float32], songs: pa.Table) -> Self:
        """The state with these songs in the delta segment, in place of songs with the same ids."""
        remaining = self.without([song_id for song_id in song_ids if song_id in self])
        start = len(self.ids) + len(remaining.delta_ids)
        return replace(
            remaining,
            songs=_joined(remaining.songs, len(self.ids), songs),
            delta_ids=remaining.delta_ids + tuple(song_ids),
            delta_rows=remaining.delta_rows | {song_id: start + i for i, song_id in enumerate(song_ids)},
            delta=np.concatenate([remaining.delta, vectors]),
        )

    def without(self, song_ids: Collection[str]) -> Self:
        """The state without these songs. Raises SongNotFoundError."""
        rows = np.array([self.row_of(song_id) for song_id in set(song_ids)], dtype=np.int64)
        if not len(rows):
            return self
        count = len(self.ids)
        deleted, in_delta = rows[rows < count], rows[rows >= count] - count
        live = self.live
        if len(deleted):
            live = np.ones(count, dtype=bool) if self.live is None else self.live.copy()
            live[deleted] = False
        changed = replace(self, live=live, tombstones=self.tombstones + len(deleted))
        if not len(in_delta):
            return changed
        kept = np.setdiff1d(np.arange(len(self.delta_ids)), in_delta)
        delta_ids = tuple(self.delta_ids[i] for i in kept)
        return replace(
            changed,
            songs=_joined(self.songs.slice(0, count), count, self.songs.slice(count).take(kept)),
            delta_ids=delta_ids,
            delta_rows={song_id: count + i for i, song_id in enumerate(delta_ids)},
            delta=self.delta[kept],
        )

    def compacted(self, settings: IndexSettings, dim: int) -> Self:
        """The same songs, all in the structure, without tombstones.

        Lists and codes are learned again only when the number of songs calls for another plan.
        """
        if not self.tombstones and not self.delta_ids:
            return self
        kept = np.arange(len(self.ids)) if self.live is None else np.flatnonzero(self.live)
        songs = self.songs.take(np.concatenate([kept, np.arange(len(self.ids), self.songs.num_rows)])).combine_chunks()
        if fits(self.structure.plan, settings, len(self)):
            structure = self.structure.extended(self.structure.plan, kept, self.delta)
        else:
            vectors = np.concatenate([self.structure.vectors[kept], self.delta])
            structure = make_structure(vectors, dim, settings, len(self))
        return self.of(structure, songs)

    def _row(self, song_id: str) -> int | None:
        row = self.delta_rows.get(song_id)
        if row is None:
            row = self.rows.get(song_id)
            if row is not None and self.live is not None and not self.live[row]:
                return None
        return row

    def _nearest(
        self,
        queries: NDArray[np.float32],
        count: int,
        main: NDArray[np.bool_] | None,
        delta: NDArray[np.bool_] | None,
    ) -> NDArray[np.int64]:
        """Candidates of the structure and of the delta segment; `main` and `delta`: masks of their allowed rows."""
        candidates = self.structure.nearest(queries, count, main)
        if not self.delta_ids:
            return candidates
        rows = np.arange(len(self.delta_ids)) if delta is None else np.flatnonzero(delta)
        if not len(rows):
            return candidates
        from_delta = best_rows(self.delta, queries, min(count, len(rows)), rows) + len(self.ids)
        return np.concatenate([candidates, from_delta], axis=1)


def _joined(songs: pa.Table, count: int, delta: pa.Table) -> pa.Table:
    """The first `count` rows with their chunks unchanged, followed by all others in one chunk."""
    return pa.concat_tables([songs.slice(0, count), pa.concat_tables([songs.slice(count), delta]).combine_chunks()])
