"""The order of rows in batches: pure functions of seed, epoch and step, so that a resumed run gets the same batches."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from htcl_ray.errors import WorkspaceError

Rows = npt.NDArray[np.int64]


def global_batch(rows: int, batch_size: int, workers: int) -> int:
    """Rows of a global batch: `batch_size`, or fewer if the data has fewer, divisible by the number of workers.

    Raises WorkspaceError for fewer than 2.
    """
    size = min(batch_size, rows - rows % workers)
    if size < 2:
        raise WorkspaceError(
            f"training has {rows} rows for {workers} workers; expected at least 2 rows and one for each worker"
        )
    return size


def steps_per_epoch(rows: int, batch: int) -> int:
    """Full batches in an epoch. The rest of the epoch's order is left out; another epoch has another rest."""
    return rows // batch


def song_order(seed: int, epoch: int, songs: Rows, length: int | None = None, *, stream: tuple[int, ...] = ()) -> Rows:
    """The songs of an epoch of stage 1, [length, 1].

    Epochs are consecutive parts of one endless order, in which every song comes once before any comes again; a length
    of None is all songs. Each `stream` has its own order.
    """
    length = length or len(songs)
    rounds = range(epoch * length // len(songs), -(-(epoch + 1) * length // len(songs)))
    order = np.concatenate([np.random.default_rng([seed, number, *stream]).permutation(songs) for number in rounds])
    start = epoch * length - rounds.start * len(songs)
    return order[start : start + length, None]


def pair_order(seed: int, epoch: int, pairs: Rows, weights: npt.NDArray[np.float64], draws: int) -> Rows:
    """The pairs of an epoch of stage 2, drawn by weight with replacement, [draws, 2]."""
    chosen = np.random.default_rng([seed, epoch]).choice(len(pairs), size=draws, p=weights / weights.sum())
    return pairs[chosen]


def with_rejected(seed: int, epoch: int, drawn: Rows, rejected: Rows, weights: npt.NDArray[np.float64]) -> Rows:
    """Append an explicit negative, drawn by weight, to each of the drawn pairs [draws, 2], [draws, 3].

    `rejected` [k, 2], sorted: trigger, rejected song; `weights` [k], above 0. For a trigger without
    one, the recalled song is repeated.
    """
    trigger, recalled = drawn.T
    first, behind = (np.searchsorted(rejected[:, 0], trigger, side=side) for side in ("left", "right"))
    passed = np.append(0.0, np.cumsum(weights))
    share = np.random.default_rng([seed, epoch, 1]).random(len(drawn))
    position = np.searchsorted(passed, passed[first] + share * (passed[behind] - passed[first]), side="right") - 1
    chosen = np.append(rejected[:, 1], -1)[np.clip(position, first, np.maximum(first, behind - 1))]
    return np.stack([trigger, recalled, np.where(behind > first, chosen, recalled)], axis=1)


def with_rehearsed(seed: int, epoch: int, drawn: Rows, songs: Rows, count: int) -> Rows:
    """Append `count` songs of the whole training catalogue to each of the drawn rows [draws, c], [draws, c + count].

    Over the epochs every one of `songs` comes once before any comes again, however rarely pairs draw it.
    """
    return np.hstack(
        [drawn, song_order(seed, epoch, songs, len(drawn) * count, stream=(2,)).reshape(len(drawn), count)]
    )


def worker_rows(order: Rows, step: int, batch: int, rank: int, workers: int) -> Rows:
    """One worker's part of one global batch: consecutive rows of the epoch's order."""
    own = batch // workers
    start = step * batch + rank * own
    return order[start : start + own]
