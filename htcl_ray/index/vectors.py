"""Vectors in the semantic and the preference space, as encoders return and indexes store them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from htcl_ray.errors import InputError, QueryError

UNIT_NORM_TOLERANCE = 1e-3
ENCODER_DAMAGED = "the encoder that gave it is damaged, so choose another model"
ModelVersions = dict[str, str | None]
"""`{"semantic": fingerprint of the weights, "preference": fingerprint or None without stage 2}`."""


@dataclass(frozen=True)
class Vectors:
    """Vectors of n songs, clips or texts: float32 of unit norm, row i of both arrays for item i.

    `semantic`: [n, dim]. `preference`: [n, dim], or None without stage 2.
    """

    semantic: NDArray[np.float32]
    preference: NDArray[np.float32] | None = None
    text_coverage: NDArray[np.float64] | None = None
    """Fraction of each text that the vocabulary covers (`TextEncoder.coverage`), [n]; None for songs and clips."""

    def __post_init__(self) -> None:
        if self.semantic.ndim != 2:
            raise ValueError(f"semantic has shape {self.semantic.shape}; expected [n, dim]")
        if self.preference is not None and self.preference.shape != self.semantic.shape:
            raise ValueError(
                f"preference has shape {self.preference.shape}; expected that of semantic, {self.semantic.shape}"
            )

    def __len__(self) -> int:
        return len(self.semantic)

    @property
    def dim(self) -> int:
        """Width of one space."""
        return int(self.semantic.shape[1])

    def rows(self, selection: slice | NDArray[np.int64]) -> Vectors:
        """The selected rows."""
        preference = None if self.preference is None else self.preference[selection]
        return Vectors(
            self.semantic[selection], preference, None if self.text_coverage is None else self.text_coverage[selection]
        )


def concatenate(parts: list[Vectors]) -> Vectors:
    """The rows of all parts, in order.

    The preference half and the text coverage are None unless all parts have them.
    """

    def if_complete(rows: list[NDArray[Any]]) -> NDArray[Any] | None:
        return np.concatenate(rows) if len(rows) == len(parts) else None

    return Vectors(
        np.concatenate([part.semantic for part in parts]),
        if_complete([part.preference for part in parts if part.preference is not None]),
        if_complete([part.text_coverage for part in parts if part.text_coverage is not None]),
    )


def check_unit_norm(vectors: Vectors, name_of: Callable[[int], str], advice: str) -> None:
    """Raise InputError unless every row is finite and of unit norm.

    `name_of`: name of a row for the message. `advice`: end of the message.
    """
    for space, half in (("semantic", vectors.semantic), ("preference", vectors.preference)):
        if half is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                lengths = np.linalg.norm(half, axis=1)
            wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_NORM_TOLERANCE))  # a NaN among them
            if wrong.size:
                row = int(wrong[0])
                actual = f"length {lengths[row]:.3g}" if np.isfinite(lengths[row]) else "numbers that are not finite"
                raise InputError(f"the {space} vector of {name_of(row)} has {actual}; expected unit norm: {advice}")


def unit_norm(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Normalise each row of [n, dim] to unit norm. Raises QueryError for a row that is zero or not finite."""
    wide = vectors.astype(np.float64)
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths < np.finfo(np.float32).tiny).any():
        raise QueryError(
            "a query vector is zero or not finite in one of its halves; expected finite numbers that are not all zero"
        )
    return np.asarray(wide / lengths, dtype=np.float32)


def matrix_of(column: pa.ChunkedArray | pa.Array) -> NDArray[np.float32]:
    """A column of equally long lists, without nulls, as an array [rows, width]."""
    lists = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return np.asarray(lists.flatten().to_numpy(zero_copy_only=False)).reshape(len(lists), -1)
