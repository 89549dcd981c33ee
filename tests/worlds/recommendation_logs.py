"""Interaction logs for tests of the recommendation tasks: a few rows each, or synthetic users with known taste."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.evaluation.evaluated_songs import with_blend
from tests.worlds.evaluation_songs import made_up, unit

SONGS = ["a", "b", "c", "d", "e", "f"]
SPLITS = np.array(["train", "train", "validation", "test", "test", "test"])


def log(*rows: tuple) -> pd.DataFrame:
    """Rows of user, song, value, period and, optionally, trigger; users in capitals are held out."""
    table = pd.DataFrame(
        [(*row, None)[:5] for row in rows], columns=["user_id", "song_id", "value", "period", "trigger_song_id"]
    )
    table["timestamp"] = table["period"].map({"train": 1.0, "validation": 2.0, "test": 3.0})
    table["held_out_user"] = table["user_id"].str.isupper()
    return table


def columns_of_rows(marks: sparse.csr_matrix) -> list[list[int]]:
    """The columns of each row."""
    return [np.flatnonzero(row).tolist() for row in marks.toarray()]


def histories(*users: list[int], songs: int) -> sparse.csr_matrix:
    return sparse.csr_matrix([[song in user for song in range(songs)] for user in users])


class Listeners:
    """Users who like songs of one hidden taste; `preference` vectors know it, `semantic` ones do not. A third is
    popular with all."""

    def __init__(self, users: int = 160, feedback: bool = True) -> None:
        generator = np.random.default_rng(7)
        songs = made_up(preference=True)
        self.taste = generator.integers(0, 4, len(songs.ids))
        spaces = {
            **songs.spaces,
            "preference": unit(np.eye(8)[4 + self.taste] + 0.2 * generator.normal(size=(len(songs.ids), 8))),
        }
        spaces.pop("blend_0.5")
        self.songs = dataclasses.replace(songs, spaces=with_blend(spaces))
        rows = []
        for user in range(users):
            for number, song in enumerate(generator.choice(len(songs.ids), 80, replace=False)):
                late = number >= 40
                likes = self.taste[song] == user // 2 % 4
                if likes or feedback:
                    rows.append(
                        (
                            f"{'U' if user % 2 else 'u'}{user}",
                            songs.ids[song],
                            1.0 if likes else -1.0,
                            "test" if late else "train",
                        )
                    )
        self.log = log(*rows)
