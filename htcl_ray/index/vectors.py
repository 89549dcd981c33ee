"""What an encoder gives and an index takes: each row's place in the semantic and in the preference space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from htcl_ray.errors import InputError, QueryError

UNIT_NORM_TOLERANCE = 1e-3
ENCODER_DAMAGED = "the encoder that gave it is damaged, so choose another model"
ModelVersions = dict[str, str | None]
"""`{"semantic": fingerprint of the weights, "preference": fingerprint or None without stage 2}`."""


@dataclass(frozen=True)
class Vectors:
    """Row i of both arrays belongs to song, clip or text i; float32 of unit norm.

    `semantic` is [n, dim]; `preference` is [n, dim], or None without stage 2.
    """

    semantic: NDArray[np.float32]
    preference: NDArray[np.float32] | None = None
    text_coverage: NDArray[np.float64] | None = None
    """[n], of texts: the share of each that the vocabulary knows (`TextEncoder.coverage`); None for songs and clips."""

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
        return self.semantic.shape[1]

    def rows(self, selection: slice | NDArray[np.int64]) -> Vectors:
        """Some of the rows."""
        preference = None if self.preference is None else self.preference[selection]
        return Vectors(
            self.semantic[selection], preference, None if self.text_coverage is None else self.text_coverage[selection]
        )


def concatenate(parts: list[Vectors]) -> Vectors:
    """The rows of all parts, in order; all have a preference half or none has, and the same of the text coverage."""

    def of_all(rows: list[NDArray[Any]]) -> NDArray[Any] | None:
        return np.concatenate(rows) if len(rows) == len(parts) else None

    return Vectors(
        np.concatenate([part.semantic for part in parts]),
        of_all([part.preference for part in parts if part.preference is not None]),
        of_all([part.text_coverage for part in parts if part.text_coverage is not None]),
    )


def check_unit_norm(vectors: Vectors, name_of: Callable[[int], str], advice: str) -> None:
    """Raise InputError unless every row is finite and of unit norm. `name_of` names a row in the message and `advice`
    ends it.
    """
    for space, half in (("semantic", vectors.semantic), ("preference", vectors.preference)):
        if half is not None:
            with np.errstate(over="ignore", invalid="ignore"):
                lengths = np.linalg.norm(half, axis=1)
            wrong = np.flatnonzero(~(np.abs(lengths - 1) < UNIT_NORM_TOLERANCE))  # a NaN among them
            if wrong.size:
                row = int(wrong[0])
                found = f"length {lengths[row]:.3g}" if np.isfinite(lengths[row]) else "numbers that are not finite"
                raise InputError(f"the {space} vector of {name_of(row)} has {found}; expected unit norm: {advice}")


def unit_norm(vectors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Each row of [n, dim] at length 1. Raises QueryError for a row that has no direction or is not finite."""
    wide = vectors.astype(np.float64)
    with np.errstate(over="ignore"):
        lengths = np.linalg.norm(wide, axis=1, keepdims=True)
    if not np.isfinite(lengths).all() or (lengths < np.finfo(np.float32).tiny).any():
        raise QueryError(
            "a query vector is zero or not finite in one of its halves; expected finite numbers that are not all zero"
        )
    return (wide / lengths).astype(np.float32)
