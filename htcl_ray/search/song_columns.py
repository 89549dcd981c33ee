"""Filters, artist credits and duplicate groups of the songs table, computed once per table."""

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

from htcl_ray.api.requests import Filter, YearRange
from htcl_ray.catalog.artists import credits_of_cells
from htcl_ray.schemas import ESTIMATED, TAG_COLUMNS

CACHED_FILTERS = 32
"""Filters whose rows are cached for one table."""
NO_GROUP = -1
"""Duplicate group of a song that has none."""


class SongColumns:
    """Columns of one immutable table of `schemas.INDEX_SONGS`; derived arrays are computed on first use."""

    def __init__(self, songs: pa.Table) -> None:
        self.songs = songs
        self._masks: OrderedDict[str, NDArray[np.bool_]] = OrderedDict()
        self._lock = threading.Lock()

    def allowed(self, conditions: Filter) -> NDArray[np.bool_]:
        """Mask of the rows that meet all conditions, cached; see `allowed_rows`."""
        key = conditions.model_dump_json(exclude_none=True)
        with self._lock:
            if key in self._masks:
                self._masks.move_to_end(key)
                return self._masks[key]
        mask = allowed_rows(self.songs, conditions)
        with self._lock:
            self._masks[key] = mask
            while len(self._masks) > CACHED_FILTERS:
                self._masks.popitem(last=False)
        return mask

    @cached_property
    def _artists(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Artist numbers of all rows, [credits], and the offset of each row's credits, [rows + 1]."""
        coded = _one_array(self.songs["artist"]).dictionary_encode()
        numbers: dict[str, int] = {}
        of_cell = [
            [numbers.setdefault(name, len(numbers)) for name in names] for names in credits_of_cells(coded.dictionary)
        ]
        of_row = pa.array(of_cell, pa.list_(pa.int64())).take(coded.indices)
        counts = pc.fill_null(pc.list_value_length(of_row), 0).to_numpy(zero_copy_only=False)
        return of_row.flatten().to_numpy(), np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    def artists_of(self, row: int) -> list[int]:
        """Numbers of the artists that a row credits."""
        artists, starts = self._artists
        numbers: list[int] = artists[starts[row] : starts[row + 1]].tolist()
        return numbers

    def credits_any(self, artists: Collection[int]) -> NDArray[np.bool_]:
        """Mask of the rows that credit one of these artists."""
        of_rows, starts = self._artists
        credited = np.concatenate([[0], np.cumsum(np.isin(of_rows, list(artists)))])
        return np.asarray(credited[starts[1:]] > credited[starts[:-1]])

    @cached_property
    def groups(self) -> NDArray[np.int32]:
        """Number of each row's duplicate group, [rows]; `NO_GROUP` for a song without duplicates."""
        column = _one_array(self.songs["duplicate_group"])
        if not len(column):
            return np.empty(0, dtype=np.int32)
        codes = column.dictionary_encode().indices.fill_null(NO_GROUP)
        return np.asarray(codes.to_numpy(zero_copy_only=False), dtype=np.int32)

    def metadata(self, rows: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """The named columns of some rows, one dictionary per row."""
        taken = self.songs.select(names).take(pa.array(rows, pa.int64()))
        columns = [column.to_pylist() for column in taken.columns]
        return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


class LatestColumns:
    """Cache of the `SongColumns` of the most recent tables; an index has a new table after every update."""

    def __init__(self, tables: int = 2) -> None:
        self._tables = tables
        self._columns: list[SongColumns] = []

    def of(self, songs: pa.Table) -> SongColumns:
        """The columns of this table."""
        for columns in self._columns:
            if columns.songs is songs:
                return columns
        columns = SongColumns(songs)
        self._columns = [columns, *self._columns[: self._tables - 1]]
        return columns


def allowed_rows(songs: pa.Table, conditions: Filter) -> NDArray[np.bool_]:
    """Mask of the rows of `songs`, a table of `schemas.INDEX_SONGS`, that meet all conditions, [rows]."""
    allowed = np.ones(songs.num_rows, dtype=bool)
    for name, wanted in conditions:
        if wanted is None or name == "include_estimated":
            continue
        allowed &= _matches(name, _one_array(songs[name]), wanted)
        if name in TAG_COLUMNS and conditions.include_estimated is False:
            allowed &= ~_matches(ESTIMATED, _one_array(songs[ESTIMATED]), name)
    return allowed


def _matches(name: str, column: pa.Array, wanted: Any) -> NDArray[np.bool_]:
    if isinstance(wanted, YearRange):
        low, high = (pa.scalar(year, column.type) if year is not None else None for year in (wanted.gte, wanted.lte))
        bounds = [pc.greater_equal(column, low)] if low is not None else []
        bounds += [pc.less_equal(column, high)] if high is not None else []
        return np.asarray(np.logical_and.reduce([_mask(bound) for bound in bounds]))
    values = wanted if isinstance(wanted, list) else [wanted]
    if name == "song_id" or pa.types.is_integer(column.type):
        return _mask(pc.is_in(column, value_set=pa.array(values, column.type)))
    folded = pc.utf8_lower(pa.array(values, pa.string()))
    if name == "artist":
        return _credits(column, set(folded.to_pylist()))
    if not pa.types.is_list(column.type):
        return _mask(pc.is_in(pc.utf8_lower(column), value_set=folded))
    hits = _mask(pc.is_in(pc.utf8_lower(pc.list_flatten(column)), value_set=folded))
    matches = np.zeros(len(column), dtype=bool)
    matches[pc.list_parent_indices(column).to_numpy()[hits]] = True
    return matches


def _credits(column: pa.Array, artists: set[str]) -> NDArray[np.bool_]:
    """Mask of the cells that are, or credit, one of the artists, compared in lower case."""
    coded = column.dictionary_encode()
    credited = zip(pc.utf8_lower(coded.dictionary).to_pylist(), credits_of_cells(coded.dictionary), strict=True)
    matches = pa.array([not artists.isdisjoint((cell, *names)) for cell, names in credited], pa.bool_())
    return _mask(matches.take(coded.indices))


def _mask(mask: pa.Array) -> NDArray[np.bool_]:
    """The mask as a NumPy array, in which null is False: a song without a value does not match."""
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False))


def _one_array(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
