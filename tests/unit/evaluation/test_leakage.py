"""Every kind of leakage between training and evaluation is detected, counted, and refused unless allowed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.errors import LeakageError
from htcl_ray.evaluation.leakage import leakage, without_copies
from tests.worlds.evaluation_songs import made_up, metadata

pytestmark = pytest.mark.unit

SETTINGS = EvaluateSettings()


def log(**columns: list) -> pd.DataFrame:
    rows = {
        "user_id": ["a", "a", "b"],
        "timestamp": [1.0, 5.0, 2.0],
        "period": ["train", "test", "train"],
        "held_out_user": [True, True, False],
    }
    return pd.DataFrame(rows | columns)


def pairs(**columns: list) -> pd.DataFrame:
    rows = {
        "trigger_song_id": ["s0000", "s0001"],
        "song_id": ["s0002", "s0003"],
        "split": ["train", "test"],
        "last_timestamp": [2.0, 9.0],
    }
    return pd.DataFrame(rows | columns)


def test_clean_splits_share_nothing():
    report = leakage(made_up(), log(), pairs(), SETTINGS)
    assert {kind: overlap["shared"] for kind, overlap in report.items()} == dict.fromkeys(
        ("songs", "artists", "joint_credits", "duplicate_groups", "users", "times"), 0
    )
    assert report["artists"]["training"] == report["artists"]["held_out"] == 12
    assert report["users"] == {"training": 1, "held_out": 1, "shared": 0, "examples": [], "forbidden": True}


def test_users_and_times_are_omitted_without_a_log():
    assert set(leakage(made_up(), None, None, SETTINGS)) == {"songs", "artists", "joint_credits", "duplicate_groups"}


def test_a_held_out_song_in_a_training_pair_is_refused():
    with pytest.raises(
        LeakageError, match=r"1 of the test songs are in training pairs \(for instance s0001\).*finetune"
    ):
        leakage(made_up(), log(), pairs(song_id=["s0001", "s0003"]), SETTINGS)


def test_a_shared_artist_is_refused_unless_allowed():
    songs = made_up()
    names = [("Prince ", "PRINCE")[i % 2] if i < 2 else f"artist {i % 2} {i}" for i in range(len(songs.ids))]
    songs = dataclasses.replace(songs, metadata=metadata(len(songs.ids), artist=names))
    with pytest.raises(
        LeakageError, match=r"1 of 120 artists of the test split are in the train split too \(for instance prince\)"
    ):
        leakage(songs, log(), pairs(), SETTINGS)
    report = leakage(songs, log(), pairs(), EvaluateSettings(allowed_overlaps="artists"))
    assert report["artists"]["shared"] == 1
    assert report["artists"]["forbidden"] is False


@pytest.mark.parametrize(
    ("training", "held_out", "shared"),
    [
        ("Queen", "Queen; Guest", "queen"),
        ("Beyoncé", "Drake (feat. BEYONCE)", "beyonce"),
        ("Jay-Z", "Drake Ft. Jay Z", "jay z"),
        ("Various Artists", "various artists", None),
        ("V.A.", "VA", None),
        ("Simon & Garfunkel", "Simon", None),
        ("Earth", "Earth, Wind & Fire", None),
        ("Bush (UK)", "Bush (Canada)", None),
        ("ガガ", "カカ", None),
        ("का", "की", None),
    ],
)
def test_artists_are_compared_independently_of_the_grouping(training: str, held_out: str, shared: str | None):
    songs = made_up()
    names = [training, held_out] + [f"artist {i % 2} {i}" for i in range(2, len(songs.ids))]
    songs = dataclasses.replace(songs, metadata=metadata(len(songs.ids), artist=names))
    report = leakage(songs, log(), pairs(), EvaluateSettings(allowed_overlaps="artists"))
    assert report["artists"]["examples"] == ([shared] if shared else [])
    if shared:
        with pytest.raises(LeakageError, match=f"for instance {shared}"):
            leakage(songs, log(), pairs(), SETTINGS)


def test_joint_credits_are_counted_and_allowed():
    songs = made_up()
    names = ["Earth", "Earth, Wind & Fire"] + [f"artist {i % 2} {i}" for i in range(2, len(songs.ids))]
    report = leakage(
        dataclasses.replace(songs, metadata=metadata(len(songs.ids), artist=names)), log(), pairs(), SETTINGS
    )
    assert (report["joint_credits"]["shared"], report["joint_credits"]["examples"]) == (1, ["earth"])
    assert report["joint_credits"]["forbidden"] is False


def test_songs_without_an_artist_share_none():
    songs = made_up()
    songs = dataclasses.replace(songs, metadata=metadata(len(songs.ids)))
    assert leakage(songs, log(), pairs(), SETTINGS)["artists"]["shared"] == 0


def test_a_user_in_both_training_and_held_out_is_refused():
    with pytest.raises(LeakageError, match=r"1 users are both held out and in training \(for instance a\)"):
        leakage(made_up(), log(held_out_user=[True, False, False]), pairs(), SETTINGS)


def test_a_training_pair_after_the_training_period_is_refused():
    with pytest.raises(
        LeakageError, match=r"1 of 1 training pairs last occurred after .* \(for instance s0000 → s0002\)"
    ):
        leakage(made_up(), log(), pairs(last_timestamp=[2.5, 9.0]), SETTINGS)


def test_a_log_without_times_has_no_late_pairs():
    report = leakage(
        made_up(), log(timestamp=[np.nan] * 3, period=["train"] * 3), pairs(last_timestamp=[np.nan] * 2), SETTINGS
    )
    assert report["times"]["shared"] == 0


def test_duplicates_of_training_recordings_are_excluded_and_counted():
    songs = made_up()
    groups = list(songs.duplicate_groups)
    groups[1], groups[3], groups[5] = groups[0], groups[2], groups[0]
    groups[7] = groups[9]  # both held out: no leak
    songs = dataclasses.replace(songs, duplicate_groups=groups)
    kept = without_copies(songs, "test")
    assert np.flatnonzero(~kept).tolist() == [1, 3, 5]
    report = leakage(songs, log(), pairs(), SETTINGS)["duplicate_groups"]
    assert (report["shared"], report["songs_left_out"], report["forbidden"]) == (2, 3, False)
