"""Which part of the data a song, a user or a moment belongs to.

Membership is a hash of the name alone, so it stays when songs and users are added, needs no pass over the data, and is
the same on every machine.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from htcl_ray.schemas import Split

SPLITS = tuple(Split)


def hash_fraction(key: str, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but its arguments; different purposes give independent numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def group_split(group: str, shares: Sequence[float]) -> Split:
    """Split of a group of songs that must not be divided, by a hash of its name (see
    `catalog.artists.artist_groups`).
    """
    position = hash_fraction(group, "song split")
    if position < shares[0]:
        return Split.TRAIN
    return Split.VALIDATION if position < shares[0] + shares[1] else Split.TEST


def group_splits(groups: pa.Array, shares: Sequence[float]) -> pa.Array:
    """Split of each song from its group; null stays null. A group that holds more than half of the songs is for
    training.
    """
    coded = groups.dictionary_encode()
    songs = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary))
    of_group = [
        Split.TRAIN if 2 * count > len(groups) else group_split(group, shares)
        for group, count in zip(coded.dictionary.to_pylist(), songs.tolist(), strict=True)
    ]
    return pa.array(of_group, pa.string()).take(coded.indices)


def normal_name(name: str) -> str:
    """Equal for names that differ only in case, white space or Unicode form."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def is_held_out(user_id: str, share: float) -> bool:
    """Whether a user's events stay out of training."""
    return hash_fraction(user_id, "held-out user") < share


def period_ends(
    timestamps: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], shares: Sequence[float]
) -> tuple[float, float]:
    """Times at which the training and the validation period end, so that the events divide as `shares` says.

    `timestamps`, epoch seconds, each stand for `weights` events. An event belongs to a period when it is not later than
    its end. Without events both ends are infinite.
    """
    if not timestamps.size:
        return float("inf"), float("inf")
    order = np.argsort(timestamps, kind="stable")
    passed = np.cumsum(weights[order])
    wanted = np.array([shares[0], shares[0] + shares[1]]) * passed[-1]
    at = np.minimum(np.searchsorted(passed, wanted - 1e-9 * passed[-1]), timestamps.size - 1)
    train, validation = timestamps[order][at]
    return float(train), float(validation)


def periods(timestamps: npt.NDArray[np.float64], ends: tuple[float, float]) -> npt.NDArray[np.object_]:
    """Period of each time; NaN (no time) is train."""
    late = (timestamps > ends[0]).astype(int) + (timestamps > ends[1])
    return np.array(SPLITS, dtype=object)[late]


def thin_out(seconds: npt.NDArray[np.float64], most: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """At most `most` of the times, NaN left out, each with the number of times that it stands for: those up to it from
    the one before.
    """
    ordered = np.sort(seconds[~np.isnan(seconds)])
    if ordered.size <= most:
        return ordered, np.ones(ordered.size)
    last = np.ceil(np.arange(1, most + 1) * ordered.size / most).astype(np.int64) - 1
    return ordered[last], np.diff(last, prepend=-1).astype(np.float64)
