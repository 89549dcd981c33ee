"""Interaction logs, sessions, triggers and splits."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from htcl_ray.config.sections import EvaluateSettings, PairSettings
from htcl_ray.errors import TableError
from htcl_ray.evaluation.tasks.recommendation_queries import user_activity, user_queries
from htcl_ray.interactions.log_summary import LogSummary
from htcl_ray.interactions.logs import LogShape, complete, detect_shape, feedback_value, normalise
from htcl_ray.interactions.occurrences import occurrences, rejections, session_starts, triggers
from htcl_ray.interactions.splits import group_split, hash_fraction, is_held_out, period_ends, periods, thin_out
from htcl_ray.schemas import EVENTS, Feedback, Reason, Split

pytestmark = pytest.mark.unit

SONGS = pa.array(["a", "b", "c"])
SETTINGS = PairSettings()
NOON = 1_700_000_000


def test_columns_determine_the_shape_of_a_log() -> None:
    assert (
        detect_shape(["user_id", "trigger_song_id", "song_id", "feedback", "timestamp", "weight"], "log")
        is LogShape.FEEDBACK
    )
    assert detect_shape(["user_id", "song_id", "timestamp", "feedback"], "log") is LogShape.PLAYS
    assert detect_shape(["user_id", "song_id", "weight", "timestamp"], "log") is LogShape.AFFINITY
    assert detect_shape(["user_id", "song_id", "rating", "timestamp"], "log") is LogShape.RATINGS
    for names in (
        ["user_id", "song_id"],
        ["song_id", "weight"],
        ["user_id", "trigger_song_id", "song_id", "timestamp"],
        [],
    ):
        with pytest.raises(
            TableError, match=r"the log log has no column '\w+' .*feedback \(.*plays \(.*affinity \(.*data\.columns\."
        ):
            detect_shape(names, "log")


def test_feedback_value_maps_every_feedback_and_rating() -> None:
    expected = {"like": 1, "collect": 1, "share": 1, "complete": 1, "play": 0, "skip": -1, "dislike": -1}
    assert set(expected) == set(Feedback)
    assert {word: feedback_value(word.upper(), SETTINGS) for word in expected} == expected
    assert [feedback_value(rating, SETTINGS) for rating in ("5", "4.0", "3.9", "2.1", "2", "0")] == [1, 1, 0, 0, -1, -1]
    assert [feedback_value(unknown, SETTINGS) for unknown in ("liked", "nan", "inf", "")] == [None] * 4


def normalised(
    rows: list[dict[str, object]], shape: LogShape
) -> tuple[list[dict[str, object]], list[tuple[object, ...]]]:
    events, rejected = normalise(pa.Table.from_pylist(rows), shape, SONGS, SETTINGS, "log.csv", first_row=100)
    return events.to_pylist(), [(row["row"], row["song_id"], row["reason"]) for row in rejected.to_pylist()]


def test_normalise_feedback_log() -> None:
    good = {
        "user_id": "u",
        "trigger_song_id": "a",
        "song_id": "b",
        "feedback": "like",
        "timestamp": "2024-01-01T00:00:00Z",
    }
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
    events, rejected = normalised([{**good, **change} for change in changes], LogShape.FEEDBACK)
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
        (108, "z", Reason.MISSING_USER_ID),  # the first of several reasons
    ]


def test_normalise_log_of_plays() -> None:
    def play(**cells: object) -> dict[str, object]:
        return {"user_id": 1, "song_id": "a", "timestamp": NOON, "feedback": None, "played_ratio": None, **cells}

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
    events, rejected = normalised(rows, LogShape.PLAYS)
    assert [event["value"] for event in events] == [1, 1, 0, 1, 0, 1, -1, 1]
    assert all(
        event["user_id"] == "1" and event["trigger_song_id"] is None and event["timestamp"] == NOON for event in events
    )
    assert rejected == [(108, "a", Reason.BAD_PLAYED_RATIO), (109, "a", Reason.BAD_PLAYED_RATIO)]
    bare, _ = normalised([{"user_id": 1, "song_id": "a", "timestamp": NOON}], LogShape.PLAYS)
    assert bare[0]["value"] == 1


def test_normalise_affinity_log() -> None:
    rows = [
        {"user_id": "u", "song_id": "a", "weight": weight}
        for weight in (3.5, 0.0, -1.0, float("nan"), float("inf"), None)
    ]
    events, rejected = normalised(rows, LogShape.AFFINITY)
    assert events == [{"user_id": "u", "song_id": "a", "trigger_song_id": None, "value": 3.5, "timestamp": None}]
    assert [row for row, _, reason in rejected if reason == Reason.BAD_WEIGHT] == [101, 102, 103, 104, 105]


def test_weights_beyond_a_32_bit_float_are_rejected() -> None:
    rows = [
        {"user_id": "u", "song_id": song, "weight": weight}
        for song, weight in zip("abcab", (3.0, 1e39, 1e-50, 1e308, 3e38), strict=True)
    ]
    events, rejected = normalised(rows, LogShape.AFFINITY)
    assert [event["value"] for event in events] == pytest.approx([3.0, 3e38])
    assert [row for row, _, reason in rejected if reason == Reason.BAD_WEIGHT] == [101, 102, 103]
    table = complete(pa.Table.from_pylist(events, schema=pa.schema(list(EVENTS)[:5])), (np.inf, np.inf), 0.0)
    assert np.isfinite(occurrences(table, SETTINGS)["strength"].to_numpy()).all()


def test_only_ratings_that_reach_the_threshold_are_positive() -> None:
    given = [1, 2, 3, 4, 5, "4.5", None, "inf", "good", {"stars": 5}]
    rows = [{"user_id": "u", "song_id": f"s{i}", "rating": rating} for i, rating in enumerate(given)]
    columns = {"user_id": [row["user_id"] for row in rows], "song_id": [row["song_id"] for row in rows]}
    cells = pa.ExtensionArray.from_storage(pa.json_(), pa.array([None if r is None else json.dumps(r) for r in given]))
    songs = pa.array(columns["song_id"])
    events, rejected = normalise(pa.table({**columns, "rating": cells}), LogShape.RATINGS, songs, SETTINGS, "log", 0)
    assert dict(zip(events["song_id"].to_pylist(), events["value"].to_pylist(), strict=True)) == {
        "s0": -1, "s1": -1, "s2": 0, "s3": 1, "s4": 1, "s5": 1
    }  # fmt: skip
    assert rejected["reason"].to_pylist() == ["bad_rating"] * 4
    completed = complete(events, (np.inf, np.inf), 0.0)
    positive = occurrences(completed, SETTINGS)
    assert {*positive["song_id"].to_pylist(), *positive["trigger_song_id"].to_pylist()} == {"s3", "s4", "s5"}
    assert not rejections(completed, SETTINGS).num_rows
    strict = normalise(
        pa.table({**columns, "rating": cells}), LogShape.RATINGS, songs, PairSettings(min_positive_rating=5), "log", 0
    )[0]
    assert strict.filter(pc.greater(strict["value"], 0))["song_id"].to_pylist() == ["s4"]


def test_low_ratings_are_not_evaluation_targets() -> None:
    songs = [f"s{i}" for i in range(8)]
    random = np.random.default_rng(0)
    ratings = random.integers(1, 6, (40, 8))
    rows = [
        {"user_id": f"u{u}", "song_id": song, "rating": int(ratings[u, s])}
        for u in range(40)
        for s, song in enumerate(songs)
    ]
    events, _ = normalise(pa.Table.from_pylist(rows), LogShape.RATINGS, pa.array(songs), SETTINGS, "log", 0)
    log = complete(events, (np.inf, np.inf), 0.5).to_pandas()
    cold = np.array([False] * 4 + [True] * 4)
    queries = user_queries(user_activity(songs, cold, log, Split.TEST), cold, EvaluateSettings())
    assert queries.users
    for row, user in enumerate(queries.users):
        of_user = ratings[int(user[1:])]
        assert queries.targets[row].toarray()[0].tolist() == (of_user[4:] >= 4).tolist()
        assert queries.history[row].toarray()[0].astype(bool)[:4].tolist() == (of_user[:4] >= 4).tolist()


def summary_of(rows: list[dict[str, object]], settings: PairSettings = SETTINGS) -> LogSummary:
    table = pa.Table.from_pylist(rows)
    summary = LogSummary("log.csv", detect_shape(table.column_names, "log.csv"))
    summary.add_names(table.column_names)
    for batch in (table.slice(0, 3), table.slice(3)):
        summary.add(batch, settings)
    return summary


def test_summary_reports_shape_times_feedback_and_ratings() -> None:
    cells = [
        ("20240131", "like"),
        ("2024-02-01T12:00:00Z", "like"),
        ("1706875200", "skip"),
        ("1706875200000", "4"),
        ("soon", None),
    ]
    plays: list[dict[str, object]] = [
        {"user_id": "u", "song_id": "a", "timestamp": time, "feedback": word} for time, word in cells
    ]
    (line,) = summary_of(plays).lines(SETTINGS)
    assert line == (
        "log log.csv: plays (user_id, song_id, timestamp); 5 rows; "
        "timestamp 2024-01-31 00:00:00 to 2024-02-02 12:00:00 UTC "
        "(unreadable 1, ISO 8601 2, epoch seconds 1, epoch milliseconds 1); feedback like 2, skip 1; "
        "ratings 4 to 4 (1 positive, from 4; 0 neutral; 0 negative, up to 2)"
    )
    counts = [
        {"user_id": "u", "song_id": "a", "weight": weight, "timestamp": 1_700_000_000, "feedback": "like"}
        for weight in (3, 1, 9)
    ]
    assert summary_of(counts).lines(SETTINGS) == [
        "log log.csv: affinity (user_id, song_id, weight); 3 rows; weight 1 to 9 (play counts); "
        "not used: feedback, timestamp"
    ]
    rated = [{"user_id": "u", "song_id": "a", "rating": rating} for rating in (1, 3, 4, 5)]
    assert summary_of(rated).lines(SETTINGS) == [
        "log log.csv: ratings (user_id, song_id, rating); 4 rows; "
        "ratings 1 to 5 (2 positive, from 4; 1 neutral; 1 negative, up to 2)"
    ]
    days = [{"user_id": "u", "song_id": "a", "timestamp": day} for day in ("2024-01-01", "2024-01-03")]
    first, warning = summary_of(days).lines(SETTINGS)
    assert "timestamp 2024-01-01 to 2024-01-03 UTC (ISO 8601 2)" in first
    assert warning.startswith("warning: the log log.csv knows days but no times")


@pytest.mark.parametrize(("ratings", "settings", "message"), [
    ((1, 0, 1), PairSettings(), "from 0 to 1, and no number reaches 4; without pairs.min_positive_rating"),
    ((1, 3, 10), PairSettings(), "from 1 to 10; without pairs.min_positive_rating"),
    ((20, 60, 100), PairSettings(), "from 20 to 100"),
    ((-1, 5, 1), PairSettings(), "from -1 to 5"),
    ((1, 2, 5), PairSettings(), None),
    ((0, 4, 3), PairSettings(), None),
    ((1, 0, 1), PairSettings(min_positive_rating=1, max_negative_rating=0), None),
    ((20, 60, 100), PairSettings(min_positive_rating=60), None),
])  # fmt: skip
@pytest.mark.parametrize("shape", ["ratings", "feedback", "plays"])
def test_check_rejects_implausible_rating_scales(
    ratings: tuple[int, ...], settings: PairSettings, message: str | None, shape: str
) -> None:
    more = {"ratings": {}, "plays": {"timestamp": NOON}, "feedback": {"timestamp": NOON, "trigger_song_id": "b"}}[shape]
    column = "rating" if shape == "ratings" else "feedback"
    summary = summary_of([{"user_id": "u", "song_id": "a", column: rating, **more} for rating in ratings], settings)
    assert summary.shape == shape
    if message is None:
        summary.check(settings, 0.1)
    else:
        with pytest.raises(TableError, match=message):
            summary.check(settings, 0.1)


def test_a_configured_threshold_above_all_ratings_gives_a_warning() -> None:
    settings = PairSettings(min_positive_rating=4.0)
    summary = summary_of([{"user_id": "u", "song_id": "a", "rating": rating} for rating in (1, 0, 1)], settings)
    summary.check(settings, 0.1)
    assert summary.lines(settings)[1] == "warning: no number of the log log.csv reaches pairs.min_positive_rating=4"


def test_unknown_feedback_is_rejected_only_above_the_allowed_share() -> None:
    summary = summary_of(
        [
            {"user_id": "u", "song_id": "a", "timestamp": NOON, "feedback": "liked" if i < 2 else "like"}
            for i in range(20)
        ]
    )
    summary.check(SETTINGS, 0.1)
    with pytest.raises(TableError, match="unknown feedback values: 'liked'; expected like, collect"):
        summary.check(SETTINGS, 0.09)


def test_a_log_without_readable_times_is_rejected() -> None:
    summary = summary_of([{"user_id": "u", "song_id": "a", "timestamp": time} for time in ("12", "2024/01/31", None)])
    with pytest.raises(TableError, match=r"no timestamp of the log log.csv can be read \(the first is '12'\)"):
        summary.check(SETTINGS, 0.1)


def test_complete_adds_held_out_user_and_period() -> None:
    rows = [{"user_id": f"u{i}", "song_id": "a", "timestamp": NOON + i} for i in range(200)]
    events, _ = normalise(pa.Table.from_pylist(rows), LogShape.PLAYS, SONGS, SETTINGS, "log", 0)
    done = complete(events, (NOON + 99.0, NOON + 149.0), 0.3)
    assert done.schema == EVENTS
    assert done["period"].to_pylist() == ["train"] * 100 + ["validation"] * 50 + ["test"] * 50
    assert done["held_out_user"].to_pylist() == [is_held_out(f"u{i}", 0.3) for i in range(200)]
    assert complete(events.slice(0, 0), (99.0, 149.0), 0.3).schema == EVENTS


def test_sessions_end_at_gaps_and_users() -> None:
    users = np.array([0, 0, 0, 1, 1, 1])
    seconds = np.array([0.0, 60, 121, 121, 181, 181])
    starts = session_starts(users, seconds, gap_seconds=60)
    assert starts.tolist() == [0, 0, 2, 3, 3, 3]
    # Play 2 starts a session; play 4 is not positive, so the trigger of play 5 is play 3.
    positive = np.array([True, False, True, True, False, True])
    assert triggers(starts, seconds, np.arange(6), positive).tolist() == [-1, 0, -1, -1, 3, 3]


def test_triggers_of_no_plays() -> None:
    none = np.zeros(0)
    assert triggers(session_starts(none.astype(int), none, 60.0), none, none.astype(int), none.astype(bool)).size == 0


def naive_triggers(
    users: list[int], seconds: list[float], songs: list[int], positive: list[bool], gap: float
) -> list[int | None]:
    """Trigger song of each play, by a search backwards through the times of its session."""
    triggers_: list[int | None] = []
    for i in range(len(users)):
        times = sorted(
            {seconds[j] for j in range(len(users)) if users[j] == users[i] and seconds[j] <= seconds[i]}, reverse=True
        )
        trigger = None
        for later, time in itertools.pairwise(times):
            if later - time > gap:
                break
            liked = {songs[j] for j in range(len(users)) if users[j] == users[i] and seconds[j] == time and positive[j]}
            if liked:
                trigger = liked.pop() if len(liked) == 1 else None
                break
        triggers_.append(trigger)
    return triggers_


@pytest.mark.parametrize("times", [300, 40])  # with 40 most plays share their time with another
def test_triggers_equal_a_backward_search(times: int) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        users = np.sort(random.integers(0, 5, 60))
        seconds = np.concatenate(
            [np.sort(random.integers(0, times, np.count_nonzero(users == user))) for user in np.unique(users)]
        )
        positive, songs = random.random(60) < 0.5, random.integers(0, 4, 60)
        rows = triggers(session_starts(users, seconds.astype(float), 10.0), seconds.astype(float), songs, positive)
        actual = [None if row < 0 else int(songs[row]) for row in rows]
        assert actual == naive_triggers(users.tolist(), seconds.tolist(), songs.tolist(), positive.tolist(), 10.0)


def test_plays_at_one_time_form_no_pair() -> None:
    random = np.random.default_rng(0)
    plays = [
        (f"u{u}", f"s{song:02d}", NOON + 86400.0 * day)
        for u in range(30)
        for day in range(3)
        for song in random.choice(12, 6, False)
    ]
    assert not occurrences(events_of(plays), PairSettings()).num_rows
    # One more play ten minutes after each six, whose trigger is ambiguous.
    later = [(user, song, time + 600) for user, song, time in plays[::6]]
    assert not occurrences(events_of([*plays, *later]), PairSettings()).num_rows
    # One more play ten minutes before each six, which is the trigger of all six.
    earlier = [(user, "earlier", time - 600) for user, _, time in plays[::6]]
    pairs = occurrences(events_of([*plays, *earlier]), PairSettings())
    assert pairs.num_rows == len(plays)
    assert set(pairs["trigger_song_id"].to_pylist()) == {"earlier"}


def events_of(plays: list[tuple[str, str, float]]) -> pa.Table:
    rows = [{"user_id": user, "song_id": song, "value": 1.0, "timestamp": time} for user, song, time in plays]
    events = pa.Table.from_pylist([{**row, "held_out_user": False, "period": "train"} for row in rows], schema=EVENTS)
    return events.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("song_id", "ascending")])


def test_hash_fraction_is_uniform_stable_and_independent_between_purposes() -> None:
    names = [f"name {i}" for i in range(4000)]
    one, other = (np.array([hash_fraction(name, purpose) for name in names]) for purpose in ("one", "other"))
    assert one.min() >= 0
    assert one.max() < 1
    np.testing.assert_allclose(np.histogram(one, 10, (0, 1))[0] / 4000, 0.1, atol=0.02)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.05
    assert hash_fraction("name", "one") == pytest.approx(0.31131, abs=1e-5)  # a change moves songs between splits


def test_group_split_follows_the_shares() -> None:
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


def test_thin_out_keeps_the_distribution_of_times() -> None:
    seconds = np.append(np.random.default_rng(0).exponential(1e6, 100_000), np.nan)
    times, weights = thin_out(seconds, 2000)
    assert times.size == 2000
    assert weights.sum() == 100_000
    exact = np.sort(seconds)
    for share, end in zip((0.8, 0.9), period_ends(times, weights, (0.8, 0.1, 0.1)), strict=True):
        assert np.searchsorted(exact, end) / 100_000 == pytest.approx(share, abs=1 / 2000)
    few = thin_out(np.array([3.0, 1.0, np.nan]), 2)
    assert [part.tolist() for part in few] == [[1.0, 3.0], [1.0, 1.0]]
