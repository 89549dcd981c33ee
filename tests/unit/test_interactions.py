"""Log rows, sessions and splits."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.errors import TableError
from htcl_ray.interactions.logs import LogShape, check_feedback_values, complete, feedback_value, normalise, recognise
from htcl_ray.interactions.sessions import session_starts, triggers
from htcl_ray.interactions.splits import group_split, hash_fraction, is_held_out, period_ends, periods, thin_out
from htcl_ray.schemas import EVENTS, Feedback, Reason, Split
from htcl_ray.settings import PairSettings

pytestmark = pytest.mark.unit

SONGS = pa.array(["a", "b", "c"])
SETTINGS = PairSettings()


def test_shapes_are_recognised_by_their_columns() -> None:
    assert recognise(["user_id", "trigger_song_id", "song_id", "feedback", "timestamp", "weight"], "log") is LogShape.FEEDBACK
    assert recognise(["user_id", "song_id", "timestamp", "feedback"], "log") is LogShape.PLAYS
    assert recognise(["user_id", "song_id", "weight", "timestamp"], "log") is LogShape.AFFINITY
    for names in (["user_id", "song_id"], ["song_id", "weight"], ["user_id", "trigger_song_id", "song_id", "timestamp"], []):
        with pytest.raises(TableError, match=r"the log log has no column '\w+' .*feedback \(.*plays \(.*affinity \(.*data\.columns\."):
            recognise(names, "log")


def test_feedback_values() -> None:
    expected = {"like": 1, "collect": 1, "share": 1, "complete": 1, "play": 0, "skip": -1, "dislike": -1}
    assert set(expected) == set(Feedback)
    assert {word: feedback_value(word.upper(), SETTINGS) for word in expected} == expected
    assert [feedback_value(rating, SETTINGS) for rating in ("5", "4.0", "3.9", "2.1", "2", "0")] == [1, 1, 0, 0, -1, -1]
    assert [feedback_value(other, SETTINGS) for other in ("liked", "nan", "inf", "")] == [None] * 4
    with pytest.raises(TableError, match="unknown feedback values: 'liked', 'thumbs'; expected like, collect"):
        check_feedback_values(["like", "thumbs", "liked", "3"], SETTINGS, "log")


def run(rows: list[dict[str, object]], shape: LogShape) -> tuple[list[dict[str, object]], list[tuple[object, ...]]]:
    events, rejected = normalise(pa.Table.from_pylist(rows), shape, SONGS, SETTINGS, "log.csv", first_row=100)
    return events.to_pylist(), [(row["row"], row["song_id"], row["reason"]) for row in rejected.to_pylist()]


def test_feedback_log() -> None:
    good = {"user_id": "u", "trigger_song_id": "a", "song_id": "b", "feedback": "like", "timestamp": "2024-01-01T00:00:00Z"}
    changes: list[dict[str, object]] = [
        {},
        {"user_id": None},
        {"song_id": ""},
        {"song_id": "z"},
        {"trigger_song_id": "z"},
        {"trigger_song_id": None},
        {"timestamp": "soon"},
        {"feedback": None},
        {"feedback": "skip", "user_id": None, "song_id": "z"},
        {"feedback": "play", "timestamp": "1704067201"},
    ]
    events, rejected = run([{**good, **change} for change in changes], LogShape.FEEDBACK)
    assert events == [
        {"user_id": "u", "song_id": "b", "trigger_song_id": "a", "value": 1.0, "timestamp": 1704067200.0},
        {"user_id": "u", "song_id": "b", "trigger_song_id": "a", "value": 0.0, "timestamp": 1704067201.0},
    ]
    assert sorted(rejected) == [
        (101, "b", Reason.MISSING_USER_ID),
        (102, None, Reason.MISSING_SONG_ID),
        (103, "z", Reason.UNKNOWN_SONG),
        (104, "b", Reason.UNKNOWN_TRIGGER_SONG),
        (105, "b", Reason.UNKNOWN_TRIGGER_SONG),
        (106, "b", Reason.BAD_TIMESTAMP),
        (107, "b", Reason.BAD_FEEDBACK),
        (108, "z", Reason.MISSING_USER_ID),  # the first of its faults
    ]


def test_plays_log() -> None:
    def play(**cells: object) -> dict[str, object]:
        return {"user_id": 1, "song_id": "a", "timestamp": 10, "feedback": None, "played_ratio": None, **cells}

    rows = [
        play(),
        play(played_ratio="0.5"),
        play(played_ratio="0.49"),
        play(feedback="play", played_ratio="0.9"),
        play(feedback="play", played_ratio="0.1"),
        play(feedback="play"),
        play(feedback="skip", played_ratio="0.9"),
        play(feedback="like", played_ratio="0.1"),
        play(played_ratio="57"),
        play(played_ratio="half"),
    ]
    events, rejected = run(rows, LogShape.PLAYS)
    assert [event["value"] for event in events] == [1, 1, 0, 1, 0, 1, -1, 1]
    assert all(event["user_id"] == "1" and event["trigger_song_id"] is None and event["timestamp"] == 10.0 for event in events)
    assert rejected == [(108, "a", Reason.BAD_PLAYED_RATIO), (109, "a", Reason.BAD_PLAYED_RATIO)]
    bare, _ = run([{"user_id": 1, "song_id": "a", "timestamp": 10}], LogShape.PLAYS)
    assert bare[0]["value"] == 1


def test_affinity_log() -> None:
    rows = [{"user_id": "u", "song_id": "a", "weight": weight} for weight in (3.5, 0.0, -1.0, float("nan"), float("inf"), None)]
    events, rejected = run(rows, LogShape.AFFINITY)
    assert events == [{"user_id": "u", "song_id": "a", "trigger_song_id": None, "value": 3.5, "timestamp": None}]
    assert [row for row, _, reason in rejected if reason == Reason.BAD_WEIGHT] == [101, 102, 103, 104, 105]


def test_events_are_completed_with_user_and_period() -> None:
    rows = [{"user_id": f"u{i}", "song_id": "a", "timestamp": i} for i in range(200)]
    events, _ = normalise(pa.Table.from_pylist(rows), LogShape.PLAYS, SONGS, SETTINGS, "log", 0)
    done = complete(events, (99.0, 149.0), 0.3)
    assert done.schema == EVENTS
    assert done["period"].to_pylist() == ["train"] * 100 + ["validation"] * 50 + ["test"] * 50
    assert done["held_out_user"].to_pylist() == [is_held_out(f"u{i}", 0.3) for i in range(200)]
    assert complete(events.slice(0, 0), (99.0, 149.0), 0.3).schema == EVENTS


def test_sessions_end_at_gaps_and_users() -> None:
    users = np.array([0, 0, 0, 1, 1, 1])
    seconds = np.array([0.0, 60, 121, 121, 181, 181])
    starts = session_starts(users, seconds, gap_seconds=60)
    assert starts.tolist() == [0, 0, 2, 3, 3, 3]
    #             play 2 opens a session; play 4 was not liked, so play 5 still follows from play 3
    positive = np.array([True, False, True, True, False, True])
    assert triggers(starts, positive).tolist() == [-1, 0, -1, -1, 3, 3]


def test_sessions_of_nothing() -> None:
    none = np.zeros(0)
    assert triggers(session_starts(none.astype(int), none, 60.0), none.astype(bool)).size == 0


def naive_triggers(users: list[int], seconds: list[float], positive: list[bool], gap: float) -> list[int]:
    found = []
    for i in range(len(users)):
        trigger, j = -1, i
        while trigger < 0 and j > 0 and users[j - 1] == users[j] and seconds[j] - seconds[j - 1] <= gap:
            j -= 1
            trigger = j if positive[j] else -1
        found.append(trigger)
    return found


def test_triggers_equal_a_search_backwards() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        users = np.sort(random.integers(0, 5, 60))
        seconds = np.concatenate([np.sort(random.integers(0, 300, np.count_nonzero(users == user))) for user in np.unique(users)]).astype(
            float
        )
        positive = random.random(60) < 0.5
        found = triggers(session_starts(users, seconds, 10.0), positive)
        assert found.tolist() == naive_triggers(users.tolist(), seconds.tolist(), positive.tolist(), 10.0)


def test_hashes_are_uniform_stable_and_independent() -> None:
    names = [f"name {i}" for i in range(4000)]
    one, other = (np.array([hash_fraction(name, purpose) for name in names]) for purpose in ("one", "other"))
    assert one.min() >= 0
    assert one.max() < 1
    np.testing.assert_allclose(np.histogram(one, 10, (0, 1))[0] / 4000, 0.1, atol=0.02)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert hash_fraction("name", "one") == pytest.approx(0.31131, abs=1e-5)  # a change would move songs between splits


def test_group_splits() -> None:
    shares = (0.7, 0.1, 0.2)
    splits = [group_split(f"artist:{i}", shares) for i in range(3000)]
    assert [splits.count(split) / 3000 for split in Split] == pytest.approx(shares, abs=0.03)
    assert {group_split("artist:x", (1.0, 0.0, 0.0))} == {Split.TRAIN}


def test_periods_divide_the_events_by_time() -> None:
    seconds = np.random.default_rng(0).permutation(1000).astype(float)
    ends = period_ends(seconds, np.ones(1000), (0.8, 0.1, 0.1))
    assert ends == (799.0, 899.0)
    names = periods(np.array([0, 799, 800, 899, 900, np.nan]), ends)
    assert names.tolist() == ["train", "train", "validation", "validation", "test", "train"]
    assert period_ends(np.zeros(0), np.zeros(0), (0.8, 0.1, 0.1)) == (np.inf, np.inf)
    assert period_ends(seconds, np.ones(1000), (1.0, 0.0, 0.0)) == (999.0, 999.0)


def test_thinned_times_stand_for_all() -> None:
    seconds = np.append(np.random.default_rng(0).exponential(1e6, 100_000), np.nan)
    times, weights = thin_out(seconds, 2000)
    assert times.size == 2000
    assert weights.sum() == 100_000
    exact = np.sort(seconds)
    for share, end in zip((0.8, 0.9), period_ends(times, weights, (0.8, 0.1, 0.1)), strict=True):
        assert np.searchsorted(exact, end) / 100_000 == pytest.approx(share, abs=1 / 2000)
    few = thin_out(np.array([3.0, 1.0, np.nan]), 2)
    assert [part.tolist() for part in few] == [[1.0, 3.0], [1.0, 1.0]]
