"""A catalogue column as labels that can be predicted: which songs have any, which labels there are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htcl_ray.evaluation.evaluated_songs import Songs


@dataclass(frozen=True)
class Labels:
    """The labels of one column. A song without a value is unlabelled and takes no part: nothing says that none would
    apply.
    """

    column: str
    values: list[tuple[str, ...]]
    """Of every song of the catalogue, each label once."""
    several: bool
    """Whether any song has more than one; otherwise the labels exclude each other."""
    training: np.ndarray
    """int: catalogue rows of the labelled training songs."""
    held_out: np.ndarray
    """int: catalogue rows of the labelled held-out songs."""

    def names(self, rows: np.ndarray) -> list[str]:
        """The labels of these songs, sorted."""
        return sorted({value for row in rows for value in self.values[row]})

    def one_each(self, rows: np.ndarray) -> np.ndarray:
        """The labels, str [rows], of songs of a column that gives each song one."""
        return np.array([self.values[row][0] for row in rows], dtype=str)

    def indicator(self, rows: np.ndarray, names: list[str]) -> np.ndarray:
        """Booleans [rows, names]: which song has which label."""
        place = {name: i for i, name in enumerate(names)}
        found = np.zeros((len(rows), len(names)), dtype=bool)
        for i, row in enumerate(rows):
            found[i, [place[value] for value in self.values[row] if value in place]] = True
        return found

    def rankable(self) -> list[str]:
        """Labels that at least one held-out song has and one has not, sorted."""
        names = self.names(self.held_out)
        share = self.indicator(self.held_out, names).mean(axis=0)
        return [name for name, part in zip(names, share.tolist(), strict=True) if part < 1]


def labels(songs: Songs, column: str, training: np.ndarray, held_out: np.ndarray) -> Labels | None:
    """The labels of a metadata column, or None when no held-out song has one. `training`, `held_out`: catalogue
    rows.
    """
    values = [tuple(dict.fromkeys(of_song)) for of_song in songs.values(column)]
    has = np.array([bool(of_song) for of_song in values], dtype=bool)
    if not has[held_out].any():
        return None
    several = any(len(of_song) > 1 for of_song in values)
    return Labels(column, values, several, training[has[training]], held_out[has[held_out]])
