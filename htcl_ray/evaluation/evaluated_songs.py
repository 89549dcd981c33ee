"""The catalogue as an evaluation sees it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from htcl_ray.catalog.artists import artist_groups

BLEND = "blend_0.5"


@dataclass(frozen=True)
class Songs:
    """The catalogue, sorted by id; row i of each space is song i's unit-norm vector."""

    ids: list[str]
    texts: list[str]
    splits: np.ndarray
    duplicate_groups: list[str]
    metadata: pa.Table
    """Columns of schemas.METADATA."""
    spaces: dict[str, np.ndarray]
    """`semantic` (stage 1); with stage 2 `preference` and `blend_0.5`. float32 [songs, dim]."""
    log_mel: np.ndarray
    """float32 [songs, 2·mels], unit norm: mean and deviation of each mel band, standardised over the training songs. No
    model saw it."""

    def without(self, left_out: np.ndarray) -> Songs:
        """The songs but for those of a bool mask [songs]."""
        rows = np.flatnonzero(~left_out)
        return Songs(
            [self.ids[row] for row in rows],
            [self.texts[row] for row in rows],
            self.splits[rows],
            [self.duplicate_groups[row] for row in rows],
            self.metadata.take(rows),
            {space: vectors[rows] for space, vectors in self.spaces.items()},
            self.log_mel[rows],
        )

    @cached_property
    def artists(self) -> list[str]:
        """Artist group of each song: songs that share a credited artist have one; a song without an artist is its
        own.
        """
        groups = artist_groups(self.metadata["artist"]).to_pylist()
        return [group or f"song {song}" for group, song in zip(groups, self.ids, strict=True)]

    def values(self, column: str) -> list[list[str]]:
        """All values of a metadata column, a list a song, empty where there is none."""
        found = self.metadata[column].to_pylist()
        return [
            [str(v) for v in value] if isinstance(value, list) else [] if value in (None, "") else [str(value)]
            for value in found
        ]

    def labels(self, column: str) -> list[str | None]:
        """A metadata column as one label a song: of several values the first, None when there is none."""
        return [values[0] if values else None for values in self.values(column)]


def with_blend(spaces: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds to semantic and preference vectors the space whose inner product is the mean of both cosines."""
    if "preference" not in spaces:
        return spaces
    return {**spaces, BLEND: blended(spaces, 0.5)}


def blended(spaces: dict[str, np.ndarray], blend: float) -> np.ndarray:
    """Unit-norm [songs, 2·dim] whose inner product is (1 − blend) · semantic cosine + blend · preference cosine."""
    weights = np.sqrt(np.array([1 - blend, blend], dtype=np.float32))
    return np.concatenate([weights[0] * spaces["semantic"], weights[1] * spaces["preference"]], axis=1)
