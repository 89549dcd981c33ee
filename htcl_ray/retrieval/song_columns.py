"""What a search needs of the songs' table beside vectors: filters, who made what, which are the same recording."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.retrieval.filters import Filter, allowed_rows

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
    def artists(self) -> NDArray[np.int32]:
        """A number for each row's artist; -1 without one."""
        return _codes(self.songs["artist"])

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
