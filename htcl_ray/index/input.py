"""Songs and vectors as an index takes them, checked."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.index.vectors import UNIT_NORM_TOLERANCE, Vectors
from htcl_ray.schemas import INDEX_SONGS


def song_rows(song_ids: Sequence[str], metadata: pa.Table | None) -> pa.Table:
    """Rows of `schemas.INDEX_SONGS`; columns that `metadata` lacks are null. Raises ValueError for another number of
    rows.
    """
    if metadata is not None and metadata.num_rows != len(song_ids):
        raise ValueError(f"metadata has {metadata.num_rows} rows for {len(song_ids)} songs; expected one each")
    columns = {"song_id": pa.array(song_ids, pa.string())}
    for field in INDEX_SONGS:
        if field.name not in columns:
            given = metadata[field.name] if metadata is not None and field.name in metadata.column_names else None
            columns[field.name] = pa.nulls(len(song_ids), field.type) if given is None else given.cast(field.type)
    return pa.table(columns, schema=INDEX_SONGS)


def joined_rows(song_ids: Sequence[str], vectors: Vectors) -> NDArray[np.float32]:
    """Rows as they are stored, [n, width]: [semantic ; preference]. Raises ValueError as `SongIndex.build` says."""
    repeated = len(song_ids) - len(set(song_ids))
    if repeated:
        raise ValueError(f"{repeated} song ids are repeated; expected each once")
    if len(vectors) != len(song_ids):
        raise ValueError(f"there are {len(vectors)} vectors for {len(song_ids)} songs; expected one each")
    halves = [half for half in (vectors.semantic, vectors.preference) if half is not None]
    if not all((np.abs(np.linalg.norm(half, axis=1) - 1) < UNIT_NORM_TOLERANCE).all() for half in halves):
        raise ValueError("a vector is not of unit norm; expected finite rows of length 1")
    return np.ascontiguousarray(np.concatenate(halves, axis=1), dtype=np.float32)
