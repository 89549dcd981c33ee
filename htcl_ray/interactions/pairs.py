"""Mine preference pairs (trigger song, song) and explicit negatives from events, by co-occurrence, in two steps.

`partial_pairs` takes all events of some users and sums their evidence for each pair; `finish_pairs` and
`finish_negatives` take all partial sums of some trigger songs. Both steps run distributed over users and trigger songs,
respectively. docs/decisions/0001-pair-mining.md records the choices.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from enum import StrEnum

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.config.sections import PairSettings
from htcl_ray.interactions.occurrences import occurrences, rejections, user_codes
from htcl_ray.schemas import PAIRS, Split

OCCURRENCES_AT_ONCE = 2_000_000


class Dropped(StrEnum):
    """Reason why an occurrence or a pair was dropped."""

    SELF_PAIR = "self_pair"
    CROSS_SPLIT = "cross_split"
    LATER_PERIOD = "later_period"
    """Training songs after the training period."""
    HELD_OUT_USER = "held_out_user"
    BELOW_SUPPORT = "below_support"
    ABOVE_CAP = "above_cap"


PARTIAL_PAIRS = pa.schema(
    [
        *PAIRS,
        pa.field("squares", pa.float64(), nullable=False),
        pa.field("dropped", pa.string()),
        pa.field("rejected", pa.bool_(), nullable=False),
    ]
)
"""Sums over some users: `weight` of their evidence, `squares` of its squares.

A row with `dropped` is a count instead: `support` occurrences were dropped for that reason. Rows with `rejected` belong
to explicit negatives.
"""

EVIDENCE_STEP = 2.0**-32
"""Evidence of a user is rounded to a multiple of this, which makes sums over up to 2**20 users exact, in any order."""

SUPPORT_BANDS = {"1": 1, "2": 2, "3-5": 3, "6-10": 6, "11+": 11}
"""Label of a range of support → its smallest support."""


def partial_pairs(events: pa.Table, songs: pa.Table, newest: float, settings: PairSettings) -> pa.Table:
    """Sum the evidence of some users for each pair: schema PARTIAL_PAIRS.

    `events`: schema EVENTS, with all events of each user. `songs`: song_id and split of every song. `newest`: epoch
    seconds of the newest event of the training period, whose age is 0. `weight` is the sum of the users' evidence (see
    `_user_evidence`); `support` is the number of users.
    """
    sums = [PARTIAL_PAIRS.empty_table()]
    for piece in _whole_users(
        events.sort_by([("user_id", "ascending"), ("timestamp", "ascending"), ("song_id", "ascending")]), settings
    ):
        for rejected, seen in ((False, occurrences(piece, settings)), (True, rejections(piece, settings))):
            split, dropped = _drop_reasons(seen, songs)
            sums.extend(
                _dropped_count(reason, int(np.count_nonzero(dropped == reason)), rejected)
                for reason in np.unique(dropped[dropped != ""])
            )
            kept = seen.append_column("split", pa.array(split, pa.string())).filter(pa.array(dropped == ""))
            sums.append(_sum_users(_user_evidence(_decay(kept, newest, settings), settings), rejected))
    return pa.concat_tables(sums)


def finish_pairs(
    partial: pa.Table, song_ids: pa.Array, popularity: npt.NDArray[np.float64], settings: PairSettings
) -> tuple[pa.Table, dict[str, int]]:
    """Compute the pairs of some trigger songs and count the dropped ones by reason.

    The pairs have schema PAIRS and are sorted by trigger and song.

    `partial`: every row of PARTIAL_PAIRS for these trigger songs. `popularity`: float64 [len(song_ids)], the sum of
    `positives` over all users.
    """
    pairs, dropped = _supported(partial.filter(pc.invert(partial["rejected"])), settings)
    return _capped(_correct_popularity(pairs, song_ids, popularity, settings), dropped, settings)


def finish_negatives(partial: pa.Table, settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """Compute the explicit negatives of some trigger songs, in the form of `finish_pairs`.

    The weight is the evidence of the rejections after shrinkage. It is not divided by popularity, which is 0 for songs
    without positive events. A pair of one user may be an explicit negative of another; training leaves such negatives
    out.
    """
    return _capped(*_supported(partial.filter(partial["rejected"]), settings), settings)


def draws_by_support(pairs: pa.Table) -> dict[str, float]:
    """Sum the weights of training pairs in each of SUPPORT_BANDS.

    Training samples pairs in proportion to their weights, so the sums are the shares of the draws.
    """
    training = pairs.filter(pc.equal(pairs["split"], Split.TRAIN.value))
    bands = np.searchsorted(list(SUPPORT_BANDS.values()), training["support"].to_numpy(), side="right") - 1
    totals = np.bincount(bands, training["weight"].to_numpy(), len(SUPPORT_BANDS))
    return dict(zip(SUPPORT_BANDS, totals.tolist(), strict=True))


def _supported(partial: pa.Table, settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """Keep pairs with enough support, apply shrinkage to their evidence, and count the dropped ones.

    Shrinkage is absolute discounting: `support_discount` times the evidence of a typical user (Σe² / Σe) is subtracted
    from the sum. With equal evidence e of n users, (n − discount) · e remains.
    """
    counts = partial.filter(pc.is_valid(partial["dropped"])).group_by("dropped").aggregate([("support", "sum")])
    dropped = dict(zip(counts["dropped"].to_pylist(), counts["support_sum"].to_pylist(), strict=True))
    pairs = _sum_partials(partial.filter(pc.is_null(partial["dropped"])))
    supported = pairs.filter(pc.greater_equal(pairs["support"], settings.min_support))
    evidence = supported["weight"].to_numpy()
    supported = _with_weight(
        supported, evidence - settings.support_discount * supported["squares"].to_numpy() / evidence
    )
    supported = supported.filter(pc.greater(supported["weight"], 1e-12))
    return supported, dropped | {Dropped.BELOW_SUPPORT: pairs.num_rows - supported.num_rows}


def _capped(pairs: pa.Table, dropped: dict[str, int], settings: PairSettings) -> tuple[pa.Table, dict[str, int]]:
    """Keep the heaviest pairs of each trigger song, sorted, and count the dropped ones."""
    kept = pairs if settings.max_pairs_per_song is None else _heaviest(pairs, settings.max_pairs_per_song)
    dropped = dropped | {Dropped.ABOVE_CAP: pairs.num_rows - kept.num_rows}
    ordered = kept.sort_by([("trigger_song_id", "ascending"), ("song_id", "ascending")])
    return ordered.select(PAIRS.names).cast(PAIRS), {reason: count for reason, count in dropped.items() if count}


def positives(events: pa.Table, songs: pa.Table, settings: PairSettings) -> npt.NDArray[np.float64]:
    """Measure the popularity of each song, float64 [songs], for the popularity correction.

    Sums over users the number of positive events with a song, with diminishing returns for repetitions as in pairs.
    `events`: all events of some users; results of disjoint sets of users add up. The trigger of positive feedback
    counts, too. Only events that may form pairs count: for training songs, events of the training period by users that
    are not held out.
    """
    good = events.filter(pc.greater(events["value"], 0))
    total = np.zeros(songs.num_rows, dtype=np.float64)
    if not good.num_rows:
        return total
    is_train = pc.equal(songs["split"], Split.TRAIN.value).to_numpy()
    may_train = pc.and_(pc.equal(good["period"], Split.TRAIN.value), pc.invert(good["held_out_user"])).to_numpy()
    users, counted = user_codes(good), []
    for name in ("song_id", "trigger_song_id"):
        rows = pc.index_in(good[name], value_set=songs["song_id"].combine_chunks())
        known = pc.is_valid(rows).to_numpy()
        index = rows.fill_null(0).to_numpy().astype(np.int64)
        counts = known & (may_train | ~is_train[index])
        counted.append(users[counts] * songs.num_rows + index[counts])
    codes, times = np.unique(np.concatenate(counted), return_counts=True)
    np.add.at(
        total, codes % songs.num_rows, _rounded(_saturated(times.astype(np.float64), settings.repetition_saturation))
    )
    return total


def _whole_users(events: pa.Table, settings: PairSettings) -> Iterator[pa.Table]:
    """Slice events sorted by user into parts of whole users and at most about OCCURRENCES_AT_ONCE occurrences."""
    codes = user_codes(events)
    affinity = pc.is_null(events["timestamp"]).to_numpy()
    liked = np.minimum(np.bincount(codes, affinity), settings.max_songs_per_user)
    expected = np.cumsum(np.bincount(codes) + liked**2)
    piece_of_user = (expected // OCCURRENCES_AT_ONCE).astype(np.int64)
    edges = (
        np.flatnonzero(np.diff(piece_of_user[codes], prepend=-1, append=-1)) if codes.size else np.zeros(1, np.int64)
    )
    for start, end in itertools.pairwise(edges):
        yield events.slice(start, end - start)


def _drop_reasons(seen: pa.Table, songs: pa.Table) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.str_]]:
    """Return the split of each occurrence, and its reason in Dropped, or "" for an occurrence that stays."""
    ids, splits = songs["song_id"].combine_chunks(), songs["split"].to_numpy()
    trigger, song = (
        splits[pc.index_in(seen[name], value_set=ids).to_numpy()] for name in ("trigger_song_id", "song_id")
    )
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
_SUMS = ["weight", "squares", "support", "first_timestamp", "last_timestamp"]


def _user_evidence(kept: pa.Table, settings: PairSettings) -> pa.Table:
    """Aggregate to one row for each user and pair, with `evidence` and the first and the last time.

    Repetitions have diminishing returns (`_saturated`). The evidence of a user with more occurrences than
    `max_occurrences_per_user` is scaled down in every pair. Affinity logs, which have no times, are capped by
    `max_songs_per_user` instead.
    """
    by_user = kept.group_by([*_KEYS, "user_id"], use_threads=False).aggregate(
        [("strength", "sum"), ("timestamp", "min"), ("timestamp", "max"), ("timestamp", "count")]
    )
    evidence = _saturated(by_user["strength_sum"].to_numpy(), settings.repetition_saturation)
    if settings.max_occurrences_per_user is not None and by_user.num_rows:
        users = user_codes(by_user)
        occurrences_of = np.bincount(users, by_user["timestamp_count"].to_numpy())
        evidence = evidence * np.minimum(1.0, settings.max_occurrences_per_user / np.maximum(occurrences_of, 1))[users]
    evidence = _rounded(evidence)
    return by_user.append_column("evidence", pa.array(evidence)).append_column(
        "square", pa.array(_rounded(evidence**2))
    )


def _rounded(evidence: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Round to multiples of EVIDENCE_STEP, at least one."""
    return np.maximum(np.rint(evidence / EVIDENCE_STEP), 1.0) * EVIDENCE_STEP


def _saturated(strength: npt.NDArray[np.float64], saturation: float) -> npt.NDArray[np.float64]:
    """Apply the term-frequency saturation of BM25: a strength of 1 maps to 1, and the limit is 1 + `saturation`."""
    return strength * (1 + saturation) / (strength + saturation)


def _sum_users(by_user: pa.Table, rejected: bool) -> pa.Table:
    sums = by_user.group_by(_KEYS, use_threads=False).aggregate(
        [
            ("evidence", "sum"),
            ("square", "sum"),
            ("user_id", "count"),
            ("timestamp_min", "min"),
            ("timestamp_max", "max"),
        ]
    )
    renamed = sums.rename_columns([*_KEYS, *_SUMS])
    marked = renamed.append_column("dropped", pa.nulls(sums.num_rows, pa.string()))
    return (
        marked.append_column("rejected", pa.repeat(rejected, sums.num_rows))
        .select(PARTIAL_PAIRS.names)
        .cast(PARTIAL_PAIRS)
    )


def _sum_partials(partial: pa.Table) -> pa.Table:
    """Add up partial sums over users; exact, see EVIDENCE_STEP."""
    sums = partial.group_by(_KEYS, use_threads=False).aggregate(
        [
            ("weight", "sum"),
            ("squares", "sum"),
            ("support", "sum"),
            ("first_timestamp", "min"),
            ("last_timestamp", "max"),
        ]
    )
    return sums.rename_columns([*_KEYS, *_SUMS])


def _dropped_count(reason: str, count: int, rejected: bool) -> pa.Table:
    row = {"trigger_song_id": "", "song_id": "", "weight": 0.0, "squares": 0.0, "support": count, "split": ""}
    row |= {"dropped": reason, "rejected": rejected}
    return pa.Table.from_pylist([row], schema=PARTIAL_PAIRS)


def _correct_popularity(
    pairs: pa.Table, song_ids: pa.Array, popularity: npt.NDArray[np.float64], settings: PairSettings
) -> pa.Table:
    trigger, song = (
        popularity[pc.index_in(pairs[name], value_set=song_ids).to_numpy()] for name in ("trigger_song_id", "song_id")
    )
    expected = (trigger + settings.popularity_offset) * (song + settings.popularity_offset)
    return _with_weight(pairs, pairs["weight"].to_numpy() / expected**settings.popularity_exponent)


def _with_weight(pairs: pa.Table, weight: npt.NDArray[np.float64]) -> pa.Table:
    return pairs.set_column(pairs.schema.get_field_index("weight"), "weight", pa.array(weight, pa.float64()))


def _heaviest(pairs: pa.Table, most: int) -> pa.Table:
    """Keep the `most` heaviest pairs of each trigger song; ties are broken by song id."""
    ordered = pairs.sort_by([("trigger_song_id", "ascending"), ("weight", "descending"), ("song_id", "ascending")])
    codes = ordered["trigger_song_id"].combine_chunks().dictionary_encode().indices.to_numpy(zero_copy_only=False)
    rows = np.arange(codes.size)
    first = np.maximum.accumulate(np.where(np.diff(codes, prepend=-1) != 0, rows, 0)) if codes.size else rows
    return ordered.filter(pa.array(rows - first < most))
