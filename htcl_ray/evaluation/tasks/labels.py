"""A catalogue column as labels to predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs


@dataclass(frozen=True)
class Labels:
    """The labels of one column. Songs without a value are unlabelled and excluded, not counted as negatives."""

    column: str
    values: list[tuple[str, ...]]
    """Distinct labels of every song of the catalogue."""
    several: bool
    """Whether any song has more than one label; otherwise labels exclude each other."""
    training: np.ndarray
    """int: catalogue rows of the labelled training songs."""
    held_out: np.ndarray
    """int: catalogue rows of the labelled held-out songs."""

    def names(self, rows: np.ndarray) -> list[str]:
        """Labels of these songs, sorted."""
        return sorted({value for row in rows for value in self.values[row]})

    def single(self, rows: np.ndarray) -> np.ndarray:
        """The one label of each song, str [rows], for columns with one label per song."""
        return np.array([self.values[row][0] for row in rows], dtype=str)

    def indicator(self, rows: np.ndarray, names: list[str]) -> np.ndarray:
        """Whether each song has each label; bool [rows, names]."""
        place = {name: i for i, name in enumerate(names)}
        has = np.zeros((len(rows), len(names)), dtype=bool)
        for i, row in enumerate(rows):
            has[i, [place[value] for value in self.values[row] if value in place]] = True
        return has

    def rankable(self) -> list[str]:
        """Labels that at least one held-out song has and one does not, sorted."""
        names = self.names(self.held_out)
        share = self.indicator(self.held_out, names).mean(axis=0)
        return [name for name, part in zip(names, share.tolist(), strict=True) if part < 1]


def column_labels(songs: EvaluatedSongs, column: str, training: np.ndarray, held_out: np.ndarray) -> Labels | None:
    """Labels of a metadata column; None when no held-out song has one. `training`, `held_out`: catalogue rows."""
    values = [tuple(dict.fromkeys(of_song)) for of_song in songs.values(column)]
    has = np.array([bool(of_song) for of_song in values], dtype=bool)
    if not has[held_out].any():
        return None
    several = any(len(of_song) > 1 for of_song in values)
    return Labels(column, values, several, training[has[training]], held_out[has[held_out]])
