"""Events → preference pairs (trigger song, song), and negatives (trigger song, rejected song), in two steps that a cluster can do apart.

`partial_pairs` sees all events of some users and sums what they say about each pair; `finish_pairs` and `finish_negatives` see all such
sums of some trigger songs. Our reading of how pairs are mined is in docs/decisions/0001-pair-mining.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.interactions.occurrences import occurrences, rejections, user_codes
from htcl_ray.schemas import PAIRS, Split
from htcl_ray.settings import PairSettings

OCCURRENCES_AT_ONCE = 2_000_000


class Dropped(StrEnum):
    """Why something that was seen in the logs is no pair."""

    SELF_PAIR = "self_pair"
    CROSS_SPLIT = "cross_split"
    LATER_PERIOD = "later_period"
    """Training songs, but after the training period."""
    HELD_OUT_USER = "held_out_user"
    BELOW_SUPPORT = "below_support"
    ABOVE_CAP = "above_cap"


PARTIAL_PAIRS = pa.schema([*PAIRS, pa.field("dropped", pa.string()), pa.field("rejected", pa.bool_(), nullable=False)])
"""Sums over some users. Rows with `dropped` are counts instead: `support` occurrences without songs. `rejected` rows are of negatives."""


def partial_pairs(events: pa.Table, songs: pa.Table, newest: float, settings: PairSettings) -> pa.Table:
    """What some users say about pairs: schema PARTIAL_PAIRS.

    `events`: schema EVENTS, with all events of each user in it. `songs`: song_id and split of every song. `newest`: epoch seconds of the
    newest event of the training period, which has age 0. `weight` is the sum of the strengths, decayed; `support` counts users.
    """
    sums = [PARTIAL_PAIRS.empty_table()]
    for piece in _whole_users(events.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("song_id", "ascending")]), settings):
        for rejected, seen in ((False, occurrences(piece, settings)), (True, rejections(piece, settings))):
            split, dropped = _judge(seen, songs)
            for reason in np.unique(dropped[dropped != ""]):
                sums.append(_dropped_count(reason, int(np.count_nonzero(dropped == reason)), rejected))
            kept = seen.append_column("split", pa.array(split, pa.string())).filter(pa.array(dropped == ""))
            sums.append(_sum_occurrences(_decay(kept, newest, settings), rejected))
    return pa.concat_tables(sums)


def finish_pairs(
    partial: pa.Table, song_ids: pa.Array, popularity: npt.NDArray[np.int64], settings: PairSettings
) -> tuple[pa.Table, dict[str, int]]:
    """Pairs of some trigger songs, schema PAIRS sorted by trigger and song, and how many were dropped, by reason.

    `partial`: every row of PARTIAL_PAIRS about these trigger songs. `popularity`: positives of each of `song_ids`, see `positives`.
    """
    pairs, dropped = _supported(partial.filter(pc.invert(partial["rejected"])), settings)
    return _capped(_correct_popularity(pairs, song_ids, popularity, settings.popularity_exponent), dropped, settings)


def finish_negatives(partial: pa.Table, settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """Rejected songs of some trigger songs, as `finish_pairs` gives pairs; the weight is the decayed sum of the rejections.

    It is not divided by popularity: a song that nobody received well has none. A song may be rejected after a trigger by one user and be a
    pair with it through another; who trains with negatives leaves these out.
    """
    return _capped(*_supported(partial.filter(partial["rejected"]), settings), settings)


def _supported(partial: pa.Table, settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """Sums over all users with enough support, and what was dropped so far."""
    counts = partial.filter(pc.is_valid(partial["dropped"])).group_by("dropped").aggregate([("support", "sum")])
    dropped = dict(zip(counts["dropped"].to_pylist(), counts["support_sum"].to_pylist(), strict=True))
    pairs = _sum_partials(partial.filter(pc.is_null(partial["dropped"])))
    supported = pairs.filter(pc.greater_equal(pairs["support"], settings.min_support))
    return supported, dropped | {Dropped.BELOW_SUPPORT: pairs.num_rows - supported.num_rows}


def _capped(pairs: pa.Table, dropped: dict[str, int], settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """The pairs that stay, in order, and all that was dropped."""
    kept = pairs if settings.max_pairs_per_song is None else _heaviest(pairs, settings.max_pairs_per_song)
    dropped = dropped | {Dropped.ABOVE_CAP: pairs.num_rows - kept.num_rows}
    ordered = kept.sort_by([("trigger_song_id", "ascending"), ("song_id", "ascending")])
    return ordered.select(PAIRS.names).cast(PAIRS), {reason: count for reason, count in dropped.items() if count}


def positives(events: pa.Table, songs: pa.Table) -> npt.NDArray[np.int64]:
    """How often each song was received well, int64 [songs]: what the popularity correction divides by.

    The trigger of well received feedback counts as received well, too. Only what may make pairs counts: for training songs, events of the
    training period by users that are not held out.
    """
    good = events.filter(pc.greater(events["value"], 0))
    total = np.zeros(songs.num_rows, dtype=np.int64)
    is_train = pc.equal(songs["split"], Split.TRAIN.value).to_numpy()
    may_train = pc.and_(pc.equal(good["period"], Split.TRAIN.value), pc.invert(good["held_out_user"])).to_numpy()
    for name in ("song_id", "trigger_song_id"):
        rows = pc.index_in(good[name], value_set=songs["song_id"].combine_chunks())
        there = pc.is_valid(rows).to_numpy()
        index = rows.fill_null(0).to_numpy()
        total += np.bincount(index[there & (may_train | ~is_train[index])], minlength=total.size)
    return total


def _whole_users(events: pa.Table, settings: PairSettings) -> Iterator[pa.Table]:
    """Slices of events sorted by user, each with whole users and at most about OCCURRENCES_AT_ONCE occurrences."""
    codes = user_codes(events)
    affinity = pc.is_null(events["timestamp"]).to_numpy()
    liked = np.minimum(np.bincount(codes, affinity), settings.max_songs_per_user)
    expected = np.cumsum(np.bincount(codes) + liked**2)
    piece_of_user = (expected // OCCURRENCES_AT_ONCE).astype(np.int64)
    edges = np.flatnonzero(np.diff(piece_of_user[codes], prepend=-1, append=-1)) if codes.size else np.zeros(1, np.int64)
    for start, end in itertools.pairwise(edges):
        yield events.slice(start, end - start)


def _judge(seen: pa.Table, songs: pa.Table) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.str_]]:
    """Split of each occurrence, and the reason why it is dropped or ""."""
    ids, splits = songs["song_id"].combine_chunks(), songs["split"].to_numpy()
    trigger, song = (splits[pc.index_in(seen[name], value_set=ids).to_numpy()] for name in ("trigger_song_id", "song_id"))
    is_train = song == Split.TRAIN.value
    rules = [
        (Dropped.SELF_PAIR, pc.equal(seen["trigger_song_id"], seen["song_id"]).to_numpy()),
        (Dropped.CROSS_SPLIT, trigger != song),
        (Dropped.HELD_OUT_USER, is_train & seen["held_out_user"].to_numpy()),
        (Dropped.LATER_PERIOD, is_train & (seen["period"].to_numpy() != Split.TRAIN.value)),
    ]
    return song, np.select([wrong for _, wrong in rules], [reason.value for reason, _ in rules], default="")


def _decay(seen: pa.Table, newest: float, settings: PairSettings) -> pa.Table:
    if settings.half_life_days is None:
        return seen
    age_days = np.maximum(0, newest - seen["timestamp"].fill_null(newest).to_numpy()) / 86400
    factor = pa.array(0.5 ** (age_days / settings.half_life_days))
    return seen.set_column(seen.schema.get_field_index("strength"), "strength", pc.multiply(seen["strength"], factor))


_KEYS = ["trigger_song_id", "song_id", "split"]


def _sum_occurrences(kept: pa.Table, rejected: bool) -> pa.Table:
    sums = kept.group_by(_KEYS, use_threads=False).aggregate(
        [("strength", "sum"), ("user_id", "count_distinct"), ("timestamp", "min"), ("timestamp", "max")]
    )
    renamed = sums.rename_columns([*_KEYS, "weight", "support", "first_timestamp", "last_timestamp"])
    marked = renamed.append_column("dropped", pa.nulls(sums.num_rows, pa.string()))
    return marked.append_column("rejected", pa.repeat(rejected, sums.num_rows)).select(PARTIAL_PAIRS.names).cast(PARTIAL_PAIRS)


def _sum_partials(partial: pa.Table) -> pa.Table:
    """Sums over users; in one order, because floating-point sums depend on it."""
    ordered = partial.sort_by([(name, "ascending") for name in [*_KEYS, "weight", "support", "first_timestamp", "last_timestamp"]])
    sums = ordered.group_by(_KEYS, use_threads=False).aggregate(
        [("weight", "sum"), ("support", "sum"), ("first_timestamp", "min"), ("last_timestamp", "max")]
    )
    return sums.rename_columns([*_KEYS, "weight", "support", "first_timestamp", "last_timestamp"])


def _dropped_count(reason: str, count: int, rejected: bool) -> pa.Table:
    row = {"trigger_song_id": "", "song_id": "", "weight": 0.0, "support": count, "split": "", "dropped": reason, "rejected": rejected}
    return pa.Table.from_pylist([row], schema=PARTIAL_PAIRS)


def _correct_popularity(pairs: pa.Table, song_ids: pa.Array, popularity: npt.NDArray[np.int64], exponent: float) -> pa.Table:
    trigger, song = (popularity[pc.index_in(pairs[name], value_set=song_ids).to_numpy()] for name in ("trigger_song_id", "song_id"))
    corrected = pairs["weight"].to_numpy() / (trigger * song.astype(np.float64)) ** exponent
    return pairs.set_column(pairs.schema.get_field_index("weight"), "weight", pa.array(corrected, pa.float64()))


def _heaviest(pairs: pa.Table, most: int) -> pa.Table:
    """At most `most` pairs of each trigger song; equal weights go by song id."""
    ordered = pairs.sort_by([("trigger_song_id", "ascending"), ("weight", "descending"), ("song_id", "ascending")])
    codes = ordered["trigger_song_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    rows = np.arange(codes.size)
    first = np.maximum.accumulate(np.where(np.diff(codes, prepend=-1) != 0, rows, 0)) if codes.size else rows
    return ordered.filter(pa.array(rows - first < most))
