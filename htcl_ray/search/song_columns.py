"""What a search needs of the songs' table beside vectors: filters, who made what, which are the same recording."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from htcl_ray.catalog.artists import credits_of_cells
from htcl_ray.search.filters import Filter, allowed_rows

MASKS = 32
"""Filters whose rows are remembered for a table."""
NOBODY = -1


class SongColumns:
    """Of one table of `schemas.INDEX_SONGS`, which never changes; what is asked for is computed once."""

    def __init__(self, songs: pa.Table) -> None:
        self.songs = songs
        self._masks: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.Lock()

    def allowed(self, conditions: Filter) -> NDArray[np.bool_]:
        """See `filters.allowed_rows`."""
        key = conditions.model_dump_json(exclude_none=True)
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        mask = allowed_rows(self.songs, conditions)
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > MASKS:
                self._masks.popitem(last=False)
        return mask

    @cached_property
    def _artists(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Numbers of all rows' credited artists, and where each row's begin: [credits], [rows + 1]."""
        column = self.songs["artist"]
        whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        coded = whole.dictionary_encode()
        numbers: dict[str, int] = {}
        of_cell = [
            [numbers.setdefault(name, len(numbers)) for name in names] for names in credits_of_cells(coded.dictionary)
        ]
        of_row = pa.array(of_cell, pa.list_(pa.int64())).take(coded.indices)
        counts = pc.fill_null(pc.list_value_length(of_row), 0).to_numpy(zero_copy_only=False)
        return of_row.flatten().to_numpy(), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def artists_of(self, row: int) -> list[int]:
        """A number for each artist that a row credits."""
        artists, starts = self._artists
        return artists[starts[row] : starts[row + 1]].tolist()

    def credits_any(self, artists: Collection[int]) -> NDArray[np.bool_]:
        """Whether each row credits one of these artists."""
        of_rows, starts = self._artists
        found = np.concatenate([[0], np.cumsum(np.isin(of_rows, list(artists)))])
        return found[starts[1:]] > found[starts[:-1]]

    @cached_property
    def groups(self) -> NDArray[np.int32]:
        """A number for each row's duplicate group; -1 without one."""
        return _codes(self.songs["duplicate_group"])

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Some columns of some rows."""
        taken = self.songs.select(names).take(pa.array(rows, pa.int64()))
        columns = [column.to_pylist() for column in taken.columns]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


class LatestColumns:
    """The SongColumns of the last few tables: an index's table changes with every update."""

    def __init__(self, tables: int = 2) -> None:
        self._tables = tables
        self._columns: list[SongColumns] = []

    def of(self, songs: pa.Table) -> SongColumns:
        """Those of this table."""
        for columns in self._columns:
            if columns.songs is songs:
                return columns
        columns = SongColumns(songs)
        self._columns = [columns, *self._columns[: self._tables - 1]]
        return columns


def _codes(column: Any) -> NDArray[np.int32]:
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if not len(whole):
        return np.empty(0, dtype=np.int32)
    return whole.dictionary_encode().indices.fill_null(NOBODY).to_numpy(zero_copy_only=False).astype(np.int32)
