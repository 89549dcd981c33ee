"""What an index holds at one moment. Never changed: every change gives another state that shares what stayed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.index.engines.faiss_structures import Structure, best_rows
from htcl_ray.index.nprobe import make_structure


@dataclass(frozen=True)
class IndexState:
    """Songs in a structure, some of them removed since, and songs that came later, in a small block that is scored
    exactly.

    Rows 0 to n - 1 are those of the structure, removed ones included; the later songs follow and are all there.
    """

    structure: Structure
    songs: pa.Table
    """Row i describes vector i."""
    ids: Sequence[str]
    """Of the structure's rows; shared between states."""
    rows: dict[str, int]
    """Of the structure's songs, removed ones included; shared between states."""
    alive: NDArray[np.bool_] | None
    """Of the structure's rows; None when none was removed."""
    later_ids: tuple[str, ...]
    later_rows: dict[str, int]
    """Rows, counted from the structure's first."""
    later: NDArray[np.float32]
    """[later songs, width]."""
    removed: int
    """How many of the structure's rows are not alive."""

    @classmethod
    def of(cls, structure: Structure, songs: pa.Table) -> Self:
        """All songs in the structure, none later."""
        ids = songs["song_id"].to_pylist()
        rows = {song_id: row for row, song_id in enumerate(ids)}
        return cls(structure, songs, ids, rows, None, (), {}, np.empty((0, structure.width), dtype=np.float32), 0)

    def __len__(self) -> int:
        return len(self.ids) - self.removed + len(self.later_ids)

    def __contains__(self, song_id: object) -> bool:
        return self._find(song_id) is not None

    def row_of(self, song_id: str) -> int:
        """Raises SongNotFoundError."""
        row = self._find(song_id)
        if row is None:
            raise SongNotFoundError(f"there is no song '{song_id}' in the index")
        return row

    def id_of(self, row: int) -> str:
        """Of any row of `songs`."""
        return self.ids[row] if row < len(self.ids) else self.later_ids[row - len(self.ids)]

    def vectors(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """A copy of stored rows, [..., width] for rows of any shape."""
        if not self.later_ids:
            return self.structure.vectors[rows]
        found = np.empty((*rows.shape, self.structure.width), dtype=np.float32)
        late = rows >= len(self.ids)
        found[~late] = self.structure.vectors[rows[~late]]
        found[late] = self.later[rows[late] - len(self.ids)]
        return found

    def nearest(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """Candidates for the `count` best rows of each of q queries, [q, c], in no promised order, none twice.

        `allowed` has one entry per row of `songs`. Raises QueryError when it has not.
        """
        if allowed is None:
            return self._nearest(queries, count, self.alive, None)
        if allowed.shape != (self.songs.num_rows,) or allowed.dtype != np.bool_:
            raise QueryError(
                f"allowed has shape {allowed.shape} and holds {allowed.dtype}; expected one bool for each of {self.songs.num_rows} songs"
            )
        first = allowed[: len(self.ids)]
        return self._nearest(
            queries, count, first if self.alive is None else first & self.alive, allowed[len(self.ids) :]
        )

    def with_songs(self, song_ids: Sequence[str], vectors: NDArray[np.float32], songs: pa.Table) -> Self:
        """These songs beside the structure, in place of those of the same ids."""
        left = self.without([song_id for song_id in song_ids if song_id in self])
        start = len(self.ids) + len(left.later_ids)
        return replace(
            left,
            songs=_joined(left.songs, len(self.ids), songs),
            later_ids=left.later_ids + tuple(song_ids),
            later_rows=left.later_rows | {song_id: start + i for i, song_id in enumerate(song_ids)},
            later=np.concatenate([left.later, vectors]),
        )

    def without(self, song_ids: Collection[str]) -> Self:
        """Raises SongNotFoundError."""
        rows = np.array([self.row_of(song_id) for song_id in set(song_ids)], dtype=np.int64)
        if not len(rows):
            return self
        count = len(self.ids)
        gone, late = rows[rows < count], rows[rows >= count] - count
        alive = self.alive
        if len(gone):
            alive = np.ones(count, dtype=bool) if self.alive is None else self.alive.copy()
            alive[gone] = False
        changed = replace(self, alive=alive, removed=self.removed + len(gone))
        if not len(late):
            return changed
        stay = np.setdiff1d(np.arange(len(self.later_ids)), late)
        later_ids = tuple(self.later_ids[i] for i in stay)
        return replace(
            changed,
            songs=_joined(self.songs.slice(0, count), count, self.songs.slice(count).take(stay)),
            later_ids=later_ids,
            later_rows={song_id: count + i for i, song_id in enumerate(later_ids)},
            later=self.later[stay],
        )

    def compacted(self, settings: IndexSettings, dim: int) -> Self:
        """The same songs, all in the structure. Lists and codes are learned anew only when the number of songs asks for
        others.
        """
        if not self.removed and not self.later_ids:
            return self
        kept = np.arange(len(self.ids)) if self.alive is None else np.flatnonzero(self.alive)
        songs = self.songs.take(np.concatenate([kept, np.arange(len(self.ids), self.songs.num_rows)])).combine_chunks()
        if self.structure.plan.fits(settings, len(self)):
            structure = self.structure.changed(self.structure.plan, kept, self.later)
        else:
            vectors = np.concatenate([self.structure.vectors[kept], self.later])
            structure = make_structure(vectors, dim, settings, len(self))
        return self.of(structure, songs)

    def _find(self, song_id: object) -> int | None:
        row = self.later_rows.get(song_id)  # type: ignore[call-overload]
        if row is None:
            row = self.rows.get(song_id)  # type: ignore[call-overload]
            if row is not None and self.alive is not None and not self.alive[row]:
                return None
        return row

    def _nearest(
        self, queries: NDArray[np.float32], count: int, first: NDArray[np.bool_] | None, later: NDArray[np.bool_] | None
    ) -> NDArray[np.int64]:
        found = self.structure.nearest(queries, count, first)
        if not self.later_ids:
            return found
        rows = np.arange(len(self.later_ids)) if later is None else np.flatnonzero(later)
        if not len(rows):
            return found
        beside = best_rows(self.later, queries, min(count, len(rows)), rows) + len(self.ids)
        return np.concatenate([found, beside], axis=1)


def _joined(songs: pa.Table, count: int, later: pa.Table) -> pa.Table:
    """The first `count` rows as they lie in memory, then the later ones in one piece."""
    return pa.concat_tables([songs.slice(0, count), pa.concat_tables([songs.slice(count), later]).combine_chunks()])
