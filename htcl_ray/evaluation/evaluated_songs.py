"""The catalogue of an evaluation: songs with their metadata, splits and vectors."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from htcl_ray.catalog.artists import artist_groups

BLEND = "blend_0.5"


@dataclass(frozen=True)
class EvaluatedSongs:
    """The catalogue, sorted by song id; row i of each space is the unit-norm vector of song i."""

    ids: list[str]
    texts: list[str]
    splits: np.ndarray
    duplicate_groups: list[str]
    metadata: pa.Table
    """Columns of schemas.METADATA."""
    spaces: dict[str, np.ndarray]
    """`semantic` (stage 1); with stage 2 `preference` and `blend_0.5`. float32 [songs, dim]."""
    log_mel: np.ndarray
    """float32 [songs, 2·mels], unit norm: mean and standard deviation of each mel band, standardised over the training
    songs; computed without a model."""
    oracle: np.ndarray | None = None
    """float32 [songs, traits]: the true traits (`evaluate.oracle_vectors`), for recommendation tasks."""

    def without(self, excluded: np.ndarray) -> EvaluatedSongs:
        """All songs except those of a bool mask [songs]."""
        rows = np.flatnonzero(~excluded)
        return EvaluatedSongs(
            [self.ids[row] for row in rows],
            [self.texts[row] for row in rows],
            self.splits[rows],
            [self.duplicate_groups[row] for row in rows],
            self.metadata.take(rows),
            {space: vectors[rows] for space, vectors in self.spaces.items()},
            self.log_mel[rows],
            None if self.oracle is None else self.oracle[rows],
        )

    @cached_property
    def artists(self) -> list[str]:
        """Artist group of each song, shared by songs with a common credited artist; its own without an artist."""
        groups = artist_groups(self.metadata["artist"]).to_pylist()
        return [group or f"song {song}" for group, song in zip(groups, self.ids, strict=True)]

    def values(self, column: str) -> list[list[str]]:
        """All values of a metadata column, one list for each song, empty for no value."""
        return [
            [str(v) for v in value] if isinstance(value, list) else [] if value in (None, "") else [str(value)]
            for value in self.metadata[column].to_pylist()
        ]

    def labels(self, column: str) -> list[str | None]:
        """A metadata column as one label for each song: the first of several values, None for no value."""
        return [values[0] if values else None for values in self.values(column)]


def with_blend(spaces: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Add the space whose inner product is the mean of the semantic and the preference cosine.

    Without stage 2 the spaces stay as they are.
    """
    if "preference" not in spaces:
        return spaces
    return {**spaces, BLEND: blended(spaces, 0.5)}


def blended(spaces: dict[str, np.ndarray], blend: float) -> np.ndarray:
    """Unit-norm [songs, 2·dim] whose inner product is (1 − blend) · semantic cosine + blend · preference cosine."""
    weights = np.sqrt(np.array([1 - blend, blend], dtype=np.float32))
    return np.concatenate([weights[0] * spaces["semantic"], weights[1] * spaces["preference"]], axis=1)
