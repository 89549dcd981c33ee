"""Pair mining on small tables, and compared with a naive implementation on random ones."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config.sections import PairSettings
from htcl_ray.interactions import pairs as pairs_module
from htcl_ray.interactions.pairs import draws_by_support, finish_negatives, finish_pairs, partial_pairs, positives
from htcl_ray.schemas import EVENTS, PAIRS

pytestmark = pytest.mark.unit

DAY = 86400.0
SONGS = pa.table(
    {
        "song_id": ["a", "b", "c", "d", "v", "w", "x"],
        "split": ["train", "train", "train", "train", "validation", "test", "test"],
    }
)
SPLIT = dict(zip(SONGS["song_id"].to_pylist(), SONGS["split"].to_pylist(), strict=True))


def plain(**settings: Any) -> PairSettings:
    """Settings under which one occurrence of a user weighs 1: no popularity correction and no shrinkage."""
    return PairSettings(**{"popularity_exponent": 0, "support_discount": 0, **settings})


PLAIN = plain()


def event(
    user: str,
    song: str,
    trigger: str | None = None,
    *,
    value: float = 1,
    time: float | None = 0,
    period: str = "train",
    out: bool = False,
) -> dict[str, Any]:
    return {
        "user_id": user,
        "song_id": song,
        "trigger_song_id": trigger,
        "value": value,
        "timestamp": time,
        "held_out_user": out,
        "period": period,
    }


def mine(
    rows: list[dict[str, Any]], settings: PairSettings = PLAIN, newest: float = 0.0
) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, int]]:
    events = pa.Table.from_pylist(rows, schema=EVENTS)
    partial = partial_pairs(events, SONGS, newest, settings)
    ids = SONGS["song_id"].combine_chunks()
    pairs, dropped = finish_pairs(partial, ids, positives(events, SONGS, settings), settings)
    assert pairs.schema == PAIRS
    return {(row["trigger_song_id"], row["song_id"]): row for row in pairs.to_pylist()}, dropped


def weights(rows: list[dict[str, Any]], settings: PairSettings = PLAIN, newest: float = 0.0) -> dict[str, float]:
    return {f"{a}{b}": row["weight"] for (a, b), row in mine(rows, settings, newest)[0].items()}


def test_positive_feedback_forms_pairs_of_trigger_and_song() -> None:
    rows = [
        event("u", "b", "a", time=1),
        event("u", "c", "a", value=0),
        event("u", "d", "a", value=-1),
        event("v", "b", "a", time=3),
        event("v", "a", "b", time=2),
        event("v", "b", "a", time=4),
    ]
    pairs, dropped = mine(rows)
    assert list(pairs) == [("a", "b"), ("b", "a")]
    assert pairs["a", "b"] == {
        "trigger_song_id": "a",
        "song_id": "b",
        "weight": pytest.approx(1 + 4 / 3),  # two occurrences of v weigh 4/3
        "support": 2,
        "first_timestamp": 1.0,
        "last_timestamp": 4.0,
        "split": "train",
    }
    assert dropped == {}


def test_plays_pair_with_the_last_positive_play_of_the_session() -> None:
    minute = 60.0
    rows = [
        event("u", "a", time=0),
        event("u", "b", time=5 * minute, value=0),
        event("u", "c", time=10 * minute),
        event("u", "d", time=15 * minute),
        event("u", "a", time=46 * minute),
        event("w", "b", time=16 * minute),
    ]
    assert weights(rows) == {"ac": 1.0, "cd": 1.0}
    assert weights(rows, plain(session_gap_minutes=31)) == {"ac": 1.0, "cd": 1.0, "da": 1.0}


def test_affinity_pairs_songs_of_a_user_in_both_directions() -> None:
    rows = [
        event(user, song, time=None, value=value)
        for user, song, value in [
            ("u", "a", 4),
            ("u", "b", 1),
            ("u", "c", 4),
            ("w", "a", 2),
            ("w", "b", 2),
            ("x", "d", 9),
        ]
    ]
    pairs, _ = mine(rows)
    assert {f"{a}{b}": (row["weight"], row["support"]) for (a, b), row in pairs.items()} == {
        "ab": (pytest.approx(2 / 3 + 1.0), 2),  # strengths 0.5 and 1
        "ba": (pytest.approx(2 / 3 + 1.0), 2),
        "ac": (1.0, 1),
        "ca": (1.0, 1),
        "bc": (pytest.approx(2 / 3), 1),
        "cb": (pytest.approx(2 / 3), 1),
    }
    assert pairs["a", "b"]["first_timestamp"] is None
    assert weights(rows, plain(max_songs_per_user=2)) == {"ab": 1.0, "ba": 1.0, "ac": 1.0, "ca": 1.0}


def test_dropped_occurrences_are_counted_by_reason() -> None:
    rows = [
        event("u", "a", "a"),
        event("u", "v", "a"),
        event("u", "w", "v"),
        event("u", "b", "a", period="test"),
        event("u", "b", "a", period="validation", out=True),
        event("u", "b", "a", out=True),
    ]
    pairs, dropped = mine(rows)
    assert pairs == {}
    assert dropped == {"self_pair": 1, "cross_split": 2, "later_period": 1, "held_out_user": 2}


def test_pairs_of_held_out_songs_take_any_user_and_period() -> None:
    rows = [event("u", "x", "w", period="test", out=True), event("v", "x", "w", period="train")]
    pairs, _ = mine(rows)
    assert pairs["w", "x"]["split"] == "test"
    assert pairs["w", "x"]["support"] == 2


def test_minimum_support_counts_users_not_events() -> None:
    rows = [event("u", "b", "a"), event("u", "b", "a"), event("u", "c", "a"), event("w", "c", "a")]
    pairs, dropped = mine(rows, plain(min_support=2))
    assert list(pairs) == [("a", "c")]
    assert dropped == {"below_support": 1}


def test_evidence_decays_with_age() -> None:
    rows = [
        event("u", "b", "a", time=0),
        event("u", "c", "a", time=10 * DAY),
        event("u", "d", "a", time=20 * DAY),
        event("u", "w", "x", time=30 * DAY),
    ]
    settings = plain(half_life_days=10)
    assert weights(rows, settings, newest=20 * DAY) == pytest.approx({"ab": 0.4, "ac": 2 / 3, "ad": 1.0, "xw": 1.0})


def test_max_pairs_per_song_keeps_the_heaviest_pairs() -> None:
    rows = [
        event("u", "b", "a"),
        event("u", "c", "a"),
        event("w", "c", "a"),
        event("u", "d", "a"),
        event("u", "a", "b"),
        event("u", "c", "b"),
    ]
    pairs, dropped = mine(rows, plain(max_pairs_per_song=2))
    assert list(pairs) == [("a", "b"), ("a", "c"), ("b", "a"), ("b", "c")]  # d is as heavy as b, but later by id
    assert dropped == {"above_cap": 1}


def test_weights_are_divided_by_popularity() -> None:
    rows = [event("u", "b", "a"), event("w", "b", "a"), event("u", "c", "b"), event("u", "c", "b", value=-1)]
    # Positive events: a by u and w (as trigger), b by u twice (song and trigger) and by w, c by u.
    events = pa.Table.from_pylist(rows, schema=EVENTS)
    assert positives(events, SONGS, PLAIN).tolist() == pytest.approx([2, 4 / 3 + 1, 1, 0, 0, 0, 0])
    assert positives(events, SONGS, plain(repetition_saturation=0)).tolist() == [2, 2, 1, 0, 0, 0, 0]
    users_only = {"repetition_saturation": 0, "popularity_offset": 0}
    assert weights(rows, plain(popularity_exponent=0.5, **users_only)) == pytest.approx(
        {"ab": 2 / np.sqrt(2 * 2), "bc": 1 / np.sqrt(2 * 1)}
    )
    assert weights(rows, plain(popularity_exponent=1, **users_only)) == pytest.approx({"ab": 2 / 4, "bc": 1 / 2})
    offset = plain(popularity_exponent=1, repetition_saturation=0, popularity_offset=3)
    assert weights(rows, offset) == pytest.approx({"ab": 2 / 25, "bc": 1 / 20})


def test_popularity_of_training_songs_ignores_evaluation_events() -> None:
    rows = [
        event("u", "b", "a"),
        event("u", "b", "a", period="test"),
        event("u", "b", "a", out=True),
        event("u", "x", "w", period="test", out=True),
    ]
    assert positives(pa.Table.from_pylist(rows, schema=EVENTS), SONGS, PLAIN).tolist() == [1, 1, 0, 0, 0, 1, 1]


def test_repetitions_of_one_user_have_diminishing_returns() -> None:
    rows = [event("u", "b", "a", time=i) for i in range(400)] + [event(user, "c", "a") for user in "vwx"]
    assert weights(rows) == pytest.approx({"ab": 400 * 2 / 401, "ac": 3.0})
    assert weights(rows, plain(repetition_saturation=0)) == {"ab": 1.0, "ac": 3.0}
    assert weights(rows, plain(repetition_saturation=3))["ab"] == pytest.approx(400 * 4 / 403)


def test_evidence_of_a_user_with_many_occurrences_is_scaled_down() -> None:
    rows = [event("u", song, "a") for song in "bbbbbbcd"] + [event("v", song, "a") for song in "bcd"]
    users_only = {"repetition_saturation": 0}
    assert weights(rows, plain(max_occurrences_per_user=8, **users_only)) == {"ab": 2.0, "ac": 2.0, "ad": 2.0}
    assert weights(rows, plain(max_occurrences_per_user=4, **users_only)) == {"ab": 1.5, "ac": 1.5, "ad": 1.5}
    assert weights(rows, plain(max_occurrences_per_user=None, **users_only)) == {"ab": 2.0, "ac": 2.0, "ad": 2.0}
    assert (
        rejected([event("u", "b", "a", value=-1)] * 8, plain(max_occurrences_per_user=4, **users_only))[0]["ab"][0]
        == 0.5
    )


def test_shrinkage_discounts_pairs_of_small_support() -> None:
    """n equal users weigh n − discount; a second user with little evidence does not double the weight."""
    rows = [event(user, song, "a") for song, users in (("b", "u"), ("c", "uv"), ("d", "uvwxy")) for user in users]
    assert weights(rows, plain(support_discount=0.75)) == pytest.approx({"ab": 0.25, "ac": 1.25, "ad": 4.25})
    assert list(weights(rows, plain(support_discount=1))) == ["ac", "ad"]
    assert mine(rows, plain(support_discount=1))[1] == {"below_support": 1}
    rows += [event("bot", "b", "a", time=i) for i in range(1000)]
    with_bot = weights(rows, plain(support_discount=0.75, max_occurrences_per_user=10))
    bot = 0.01 * 1000 * 2 / 1001
    assert with_bot["ab"] == pytest.approx(1 + bot - 0.75 * (1 + bot**2) / (1 + bot))
    assert with_bot["ab"] < 0.3


def test_an_account_that_loops_does_not_dominate_the_pairs() -> None:
    """200 users with 5 plays each, and one account with 20,000 plays of the same 40 songs in a loop."""
    random = np.random.default_rng(1)
    songs = pa.table({"song_id": [f"s{i:03d}" for i in range(40)], "split": ["train"] * 40})
    rows = [
        event(f"u{user}", f"s{song:03d}", time=user * 1000.0 + 60 * i)
        for user in range(200)
        for i, song in enumerate(random.permutation(40)[:5].tolist())
    ]
    loop = [event("bot", f"s{i % 40:03d}", time=30.0 * i) for i in range(20_000)]

    def share_of_loop(rows: list[dict[str, Any]]) -> float:
        events, settings = pa.Table.from_pylist(rows, schema=EVENTS), PairSettings()
        popularity = positives(events, songs, settings)
        pairs, _ = finish_pairs(
            partial_pairs(events, songs, 0.0, settings), songs["song_id"].combine_chunks(), popularity, settings
        )
        of_loop = sum(
            row["weight"]
            for row in pairs.to_pylist()
            if (int(row["trigger_song_id"][1:]) + 1) % 40 == int(row["song_id"][1:])
        )
        return of_loop / sum(pairs["weight"].to_pylist())

    without, with_it = share_of_loop(rows), share_of_loop(rows + loop)
    assert without == pytest.approx(0.024, abs=0.012)
    assert with_it < 2 * without


def test_draws_by_support_sums_weights_of_training_pairs() -> None:
    rows = [event(f"u{i}", song, "a") for song, users in (("b", 1), ("c", 4), ("d", 12)) for i in range(users)]
    rows += [event("u0", "x", "w")]  # not a training pair
    events = pa.Table.from_pylist(rows, schema=EVENTS)
    pairs, _ = finish_pairs(
        partial_pairs(events, SONGS, 0.0, PLAIN), SONGS["song_id"].combine_chunks(), np.zeros(7), PLAIN
    )
    assert draws_by_support(pairs) == {"1": 1.0, "2": 0.0, "3-5": 4.0, "6-10": 0.0, "11+": 12.0}


def test_no_events_give_no_pairs() -> None:
    assert mine([]) == ({}, {})
    assert rejected([]) == ({}, {})


def rejected(
    rows: list[dict[str, Any]], settings: PairSettings = PLAIN, newest: float = 0.0
) -> tuple[dict[str, tuple[float, int, str]], dict[str, int]]:
    """Weight, support and split of each explicit negative, and the counts of dropped ones."""
    partial = partial_pairs(pa.Table.from_pylist(rows, schema=EVENTS), SONGS, newest, settings)
    negatives, dropped = finish_negatives(partial, settings)
    assert negatives.schema == PAIRS
    named = {
        f"{row['trigger_song_id']}{row['song_id']}": (row["weight"], row["support"], row["split"])
        for row in negatives.to_pylist()
    }
    assert list(named) == sorted(named)
    return named, dropped


def test_rejected_songs_are_explicit_negatives_of_their_trigger() -> None:
    minute = 60.0
    rows = [
        event("u", "b", "a", value=-1, time=1),
        event("u", "b", "a", value=-1, time=2),
        event("v", "b", "a", value=-1, time=3),
        event("v", "c", "a", value=1, time=4),
        event("v", "d", "a", value=0, time=5),
        # plays: a positive play is the trigger of later plays of the session, a negative one is not
        event("w", "c", time=0, value=-1),
        event("w", "a", time=minute),
        event("w", "c", time=2 * minute, value=-1),
        event("w", "d", time=3 * minute, value=-1),
        event("w", "b", time=34 * minute, value=-1),
        # affinity: low weights are no negatives
        event("x", "a", time=None, value=9),
        event("x", "d", time=None, value=0.1),
    ]
    assert rejected(rows)[0] == {
        "ab": (pytest.approx(4 / 3 + 1), 2, "train"),
        "ac": (1.0, 1, "train"),
        "ad": (1.0, 1, "train"),
    }
    assert "ab" not in weights(rows)


def test_explicit_negatives_follow_the_rules_of_pairs() -> None:
    rows = [
        event("u", "a", "a", value=-1),
        event("u", "v", "a", value=-1),
        event("u", "b", "a", value=-1, period="test"),
        event("u", "c", "a", value=-1, out=True),
        event("u", "x", "w", value=-1, period="test", out=True),
        event("u", "c", "b", value=-1, time=0),
        event("v", "d", "b", value=-1, time=10 * DAY),
        event("u", "d", "b", value=-1, time=0),
        event("u", "a", "b", value=-1, time=5 * DAY),
    ]
    negatives, dropped = rejected(
        rows, plain(repetition_saturation=1e9, half_life_days=10, max_pairs_per_song=2), newest=10 * DAY
    )
    assert negatives == {
        "ba": (pytest.approx(0.5**0.5), 1, "train"),
        "bd": (pytest.approx(1.5), 2, "train"),
        "wx": (pytest.approx(0.5), 1, "test"),
    }
    assert dropped == {"self_pair": 1, "cross_split": 1, "later_period": 1, "held_out_user": 1, "above_cap": 1}
    assert rejected(rows, PairSettings(min_support=2))[0].keys() == {"bd"}
    assert mine(rows) == ({}, {}), "dropped negatives are not counted with the pairs"


def random_events(random: np.random.Generator, rows: int) -> list[dict[str, Any]]:
    songs = SONGS["song_id"].to_pylist()
    events = []
    for _ in range(rows):
        kind = random.integers(3)
        user = f"u{random.integers(12)}"
        events.append(
            event(
                user,
                str(random.choice(songs)),
                str(random.choice(songs)) if kind == 0 else None,
                value=float(random.choice([-1, -1, 0, 1, 1])),
                time=float(random.integers(100_000)) if kind < 2 else None,
                period=str(random.choice(["train", "train", "validation", "test"])) if kind < 2 else "train",
                out=user in ("u3", "u7"),
            )
        )
        if kind == 2:
            events[-1]["value"] = float(random.integers(1, 6))
    return events


class Seen(NamedTuple):
    """An occurrence of the naive implementation."""

    trigger: str
    song: str
    user: str
    strength: float
    time: float | None
    period: str
    held_out: bool


def naive_occurrences(rows: list[dict[str, Any]], settings: PairSettings, sign: int) -> Iterator[Seen]:
    """Occurrences of all users; negative ones with sign −1."""
    by_user = defaultdict(list)
    for row in rows:
        by_user[row["user_id"]].append(row)
    for of_user in by_user.values():
        for row in of_user:
            if row["trigger_song_id"] and sign * row["value"] > 0:
                yield naive_occurrence(row["trigger_song_id"], row)
        yield from naive_occurrences_of_plays(of_user, settings, sign)
        if sign > 0:
            yield from naive_occurrences_of_affinity(of_user, settings)


def naive_occurrence(trigger: str, row: dict[str, Any]) -> Seen:
    return Seen(
        trigger,
        row["song_id"],
        row["user_id"],
        abs(row["value"]),
        row["timestamp"],
        row["period"],
        row["held_out_user"],
    )


def naive_occurrences_of_plays(rows: list[dict[str, Any]], settings: PairSettings, sign: int) -> Iterator[Seen]:
    plays = [row for row in rows if not row["trigger_song_id"] and row["timestamp"] is not None]
    trigger, before = None, None
    for row in sorted(plays, key=lambda row: (row["timestamp"], row["song_id"])):
        if before is None or row["timestamp"] - before > settings.session_gap_minutes * 60:
            trigger = None
        if trigger and sign * row["value"] > 0:
            yield naive_occurrence(trigger, row)
        if row["value"] > 0:
            trigger = row["song_id"]
        before = row["timestamp"]


def naive_occurrences_of_affinity(rows: list[dict[str, Any]], settings: PairSettings) -> Iterator[Seen]:
    liked = Counter[str]()
    for row in rows:
        if row["timestamp"] is None:
            liked[row["song_id"]] += row["value"]
    top = dict(sorted(liked.items(), key=lambda item: (-item[1], item[0]))[: settings.max_songs_per_user])
    user, held_out = rows[0]["user_id"], rows[0]["held_out_user"]
    for a, b in itertools.permutations(top, 2):
        yield Seen(a, b, user, (top[a] * top[b]) ** 0.5 / max(top.values()), None, "train", held_out)


def saturated(strength: float, settings: PairSettings) -> float:
    return strength * (1 + settings.repetition_saturation) / (strength + settings.repetition_saturation)


def naive_popularity(rows: list[dict[str, Any]], settings: PairSettings) -> Counter[str]:
    positive = Counter[tuple[str, str]]()
    for row in rows:
        for song in (row["song_id"], row["trigger_song_id"]):
            in_training = row["period"] == "train" and not row["held_out_user"]
            if row["value"] > 0 and song and (SPLIT[song] != "train" or in_training):
                positive[row["user_id"], song] += 1
    popularity = Counter[str]()
    for (_, song), count in positive.items():
        popularity[song] += saturated(count, settings)
    return popularity


def naive_strengths(
    occurrences: Iterator[Seen], newest: float, settings: PairSettings
) -> tuple[dict[tuple[str, str], Counter[str]], Counter[str]]:
    """Strength of each pair by user, and the number of timed occurrences of each user."""
    strengths, timed = defaultdict[tuple[str, str], Counter[str]](Counter), Counter[str]()
    for seen in occurrences:
        a, b = seen.trigger, seen.song
        outside_training = seen.held_out or seen.period != "train"
        if a == b or SPLIT[a] != SPLIT[b] or (SPLIT[a] == "train" and outside_training):
            continue
        age = 0.0
        if seen.time is not None and settings.half_life_days is not None:
            age = max(0, newest - seen.time) / DAY / settings.half_life_days
        strengths[a, b][seen.user] += seen.strength * 0.5**age
        timed[seen.user] += seen.time is not None
    return strengths, timed


def naive_pairs(
    rows: list[dict[str, Any]], newest: float, settings: PairSettings, sign: int = 1
) -> dict[tuple[str, str], tuple[float, int]]:
    """The decision record in plain loops, with correction and cap. Explicit negatives with sign −1."""
    popularity, offset = naive_popularity(rows, settings), settings.popularity_offset
    strengths, timed = naive_strengths(naive_occurrences(rows, settings, sign), newest, settings)
    final = {}
    for (trigger, song), of_user in strengths.items():
        if len(of_user) < settings.min_support:
            continue
        evidence = [
            saturated(strength, settings) * min(1, (settings.max_occurrences_per_user or np.inf) / max(timed[user], 1))
            for user, strength in of_user.items()
        ]
        weight = sum(evidence) - settings.support_discount * sum(e**2 for e in evidence) / sum(evidence)
        if sign > 0:
            weight /= ((popularity[trigger] + offset) * (popularity[song] + offset)) ** settings.popularity_exponent
        final[trigger, song] = (weight, len(of_user))
    kept = {}
    for trigger in SPLIT:
        of_trigger = [pair for pair in final if pair[0] == trigger]
        heaviest = sorted(of_trigger, key=lambda pair: (-round(final[pair][0], 9), pair[1]))
        kept.update({pair: final[pair] for pair in heaviest[: settings.max_pairs_per_song]})
    return kept


@pytest.mark.parametrize(
    "settings",
    [
        PairSettings(),
        PairSettings(
            min_support=2, half_life_days=0.5, popularity_exponent=1.0, session_gap_minutes=60, max_songs_per_user=3
        ),
        PairSettings(max_pairs_per_song=2, popularity_exponent=0.3, session_gap_minutes=300),
        PairSettings(max_occurrences_per_user=5, repetition_saturation=0.4, support_discount=0.5, popularity_offset=0),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_pairs_equal_the_naive_ones_for_any_partition_of_users(
    settings: PairSettings, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_events(np.random.default_rng(seed), 300)
    expected = [naive_pairs(rows, 50_000.0, settings, sign) for sign in (1, -1)]
    assert len(expected[0]) > 5
    assert len(expected[1]) > (2 if settings.min_support == 1 else 0)
    ids, earlier = SONGS["song_id"].combine_chunks(), None
    users = sorted({row["user_id"] for row in rows})
    for pieces, at_once in ((1, 10**6), (1, 20), (4, 10**6)):
        monkeypatch.setattr(pairs_module, "OCCURRENCES_AT_ONCE", at_once)
        parts = [
            pa.Table.from_pylist([row for row in rows if users.index(row["user_id"]) % pieces == i], schema=EVENTS)
            for i in range(pieces)
        ]
        partial = pa.concat_tables([partial_pairs(part, SONGS, 50_000.0, settings) for part in reversed(parts)])
        popularity = np.sum([positives(part, SONGS, settings) for part in parts], axis=0)
        finished = (finish_pairs(partial, ids, popularity, settings)[0], finish_negatives(partial, settings)[0])
        for table, wanted in zip(finished, expected, strict=True):
            actual = {
                (row["trigger_song_id"], row["song_id"]): (row["weight"], row["support"]) for row in table.to_pylist()
            }
            assert actual.keys() == wanted.keys()
            for pair, (weight, support) in wanted.items():
                assert actual[pair] == (pytest.approx(weight), support)
            assert list(actual) == sorted(actual)
        if earlier is not None:  # bit for bit
            assert all(table.equals(before) for table, before in zip(finished, earlier, strict=True))
        earlier = finished
