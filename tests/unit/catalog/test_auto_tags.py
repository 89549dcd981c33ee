"""Estimated genre, mood and tags: values by score, and completed songs."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.catalog.auto_tags import VALUES, completed, estimated_values, known_tags
from htcl_ray.schemas import ESTIMATES, TAG_COLUMNS

pytestmark = pytest.mark.unit

TAGS = ["rock", "Hip-Hop", "catchy", "chill", "chillout", "sad", "guitar", "female vocalist", "female vocalists"]
LISTS = pa.list_(pa.string())


def songs(**columns: list[list[str] | None]) -> pa.Table:
    count = len(next(iter(columns.values())))
    ids = {"song_id": [f"s{row}" for row in range(count)]}
    return pa.table(ids | {name: pa.array(columns.get(name, [None] * count), LISTS) for name in TAG_COLUMNS})


def test_values_are_those_of_the_best_scores_in_falling_order():
    """Against a naive loop over songs, columns and tags."""
    random = np.random.default_rng(0)
    scores = random.random((30, len(TAGS))).astype(np.float32)
    table = songs(genre=[["stated"], [], None] * 10, tags=[None, ["piano"]] * 15)
    actual = estimated_values(table, scores, TAGS, 0.4)
    assert actual.schema == ESTIMATES
    for row, (song, estimate) in enumerate(zip(table.to_pylist(), actual.to_pylist(), strict=True)):
        for column in TAG_COLUMNS:
            best: dict[str, float] = {}
            for tag, score in zip(TAGS, scores[row].tolist(), strict=True):
                if VALUES.get(tag, ("", ""))[0] == column and score >= 0.4:
                    best[VALUES[tag][1]] = max(score, best.get(VALUES[tag][1], 0))
            expected = sorted(best, key=best.__getitem__, reverse=True) or None
            assert estimate[column] == (None if song[column] else expected)


def test_stated_values_stay_and_estimated_columns_are_named():
    stated = songs(genre=[["Opera"], None, []], mood=[None, ["calm"], None], tags=[None, None, None])
    estimates = pa.table(
        {
            "song_id": ["s0", "s1", "s2"],
            "genre": pa.array([["rock"], ["jazz", "soul"], ["folk"]], LISTS),  # the first must not replace Opera
            "mood": pa.array([["sad"], ["sad"], None], LISTS),
            "tags": pa.array([None, ["guitar"], None], LISTS),
        }
    )
    rows = completed(stated, estimates).drop_columns("song_id").to_pylist()
    assert rows == [
        {"genre": ["Opera"], "mood": ["sad"], "tags": None, "estimated": ["mood"]},
        {"genre": ["jazz", "soul"], "mood": ["calm"], "tags": ["guitar"], "estimated": ["genre", "tags"]},
        {"genre": ["folk"], "mood": None, "tags": None, "estimated": ["genre"]},
    ]


def test_tags_that_no_column_takes_are_unknown():
    assert known_tags(["rock", "catchy", "00s", "Speech"]) == ["rock"]
    assert {column for column, _ in VALUES.values()} == set(TAG_COLUMNS)
    assert all(value == value.lower() for _, value in VALUES.values())
