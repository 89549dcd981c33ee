"""Assign songs, users and times to the training, validation and test parts of the data.

Songs and users are assigned by a hash of a name, which needs no pass over the data, is equal on every machine, and does
not change when songs and users are added.
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
    """Hash a key to a number in [0, 1); different purposes give independent numbers."""
    digest = hashlib.blake2b(key.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def group_split(group: str, shares: Sequence[float]) -> Split:
    """Assign a group of songs (see `catalog.artists.artist_groups`) to a split, by a hash of the group's name."""
    position = hash_fraction(group, "song split")
    if position < shares[0]:
        return Split.TRAIN
    return Split.VALIDATION if position < shares[0] + shares[1] else Split.TEST


def group_splits(groups: pa.Array, shares: Sequence[float]) -> pa.Array:
    """Assign each song to the split of its group; null stays null.

    A group with more than half of the songs goes to training.
    """
    coded = groups.dictionary_encode()
    songs = np.bincount(coded.indices.drop_null().to_numpy(), minlength=len(coded.dictionary))
    of_group = [
        Split.TRAIN if 2 * count > len(groups) else group_split(group, shares)
        for group, count in zip(coded.dictionary.to_pylist(), songs.tolist(), strict=True)
    ]
    return pa.array(of_group, pa.string()).take(coded.indices)


def normal_name(name: str) -> str:
    """Normalise case, white space and Unicode form of a name."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def is_held_out(user_id: str, share: float) -> bool:
    """Whether a user's events stay out of training."""
    return hash_fraction(user_id, "held-out user") < share


def period_ends(
    timestamps: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], shares: Sequence[float]
) -> tuple[float, float]:
    """Compute the ends of the training and the validation period that divide the events by `shares`.

    Each of `timestamps`, epoch seconds, stands for `weights` events. An event belongs to a period if it is not later
    than the period's end. Without events both ends are infinite.
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
    """Assign each time to a period; NaN (no time) belongs to training."""
    index = (timestamps > ends[0]).astype(int) + (timestamps > ends[1])
    names: npt.NDArray[np.object_] = np.array(SPLITS, dtype=object)
    return np.asarray(names[index])


def thin_out(seconds: npt.NDArray[np.float64], most: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Reduce times to at most `most` quantiles, without NaN, each with the number of times that it stands for.

    A quantile stands for the times up to it, from the previous quantile.
    """
    ordered = np.sort(seconds[~np.isnan(seconds)])
    if ordered.size <= most:
        return ordered, np.ones(ordered.size)
    last = np.ceil(np.arange(1, most + 1) * ordered.size / most).astype(np.int64) - 1
    return ordered[last], np.diff(last, prepend=-1).astype(np.float64)
