"""Groups of rows of similar length within a batch, which are encoded apart so that little padding is computed.

The rows of a batch stay as they were drawn: which songs are each other's negatives does not depend on their length, as
it would if batches were made of songs of one length.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LEVELS = 32
"""Lengths are compared after rounding up to multiples of 1/32 of the longest."""
GROUP_COST = {"cuda": 12.0, "cpu": 2.0}
"""Time of one more group, as a number of rows of the longest length: of the calls of a tower's layers, whatever their
size. On an H100, with the `paper` tower, about 6 ms against 0.5 ms a song."""
SHORT = 64
"""Longest rows that are never split: calls of layers take as long as so few positions, so that song texts and window
vectors, unlike lyrics and log-mel frames, would gain little."""
ACCEPTED_PADDING = 0.05
"""Share of padding that is not worth a second group."""


def length_groups(lengths: Tensor, cost: float) -> list[Tensor]:
    """Split rows of these lengths, int64 [n] on the CPU and at least 1, into groups; returns the row numbers of each.

    Minimises Σ (rows · longest) over groups plus `cost` · (longest of all) a group, among groups of neighbouring
    levels; exact, by dynamic programming. The group of the longest rows is first. One group, of all rows in their
    order, if its padding is at most ACCEPTED_PADDING or its rows are SHORT.
    """
    longest, rows = int(lengths.max()), len(lengths)
    if longest <= SHORT or padded_share(lengths, [torch.arange(rows)]) <= ACCEPTED_PADDING:
        return [torch.arange(rows)]
    level = -(-lengths * LEVELS // longest)
    # By level, from 0: rows of at most that level, and the longest of them.
    counts = torch.bincount(level, minlength=LEVELS + 1).cumsum(0).tolist()
    ends = [int(lengths[level <= end].max()) if counts[end] else 0 for end in range(LEVELS + 1)]
    best, before = [0.0] * (LEVELS + 1), [0] * (LEVELS + 1)
    for end in range(1, LEVELS + 1):
        costs = [
            best[start]
            + ((counts[end] - counts[start]) * ends[end] + cost * longest if counts[end] > counts[start] else 0)
            for start in range(end)
        ]
        before[end] = min(range(end), key=costs.__getitem__)
        best[end] = costs[before[end]]
    groups, end = [], LEVELS
    while end:
        groups.append(((level > before[end]) & (level <= end)).nonzero()[:, 0])
        end = before[end]
    return [group for group in groups if len(group)]


def padded_share(lengths: Tensor, groups: list[Tensor]) -> float:
    """Share of the computed positions that are padding, when each group is padded to its longest row: 0 to 1."""
    computed = sum(len(group) * int(lengths[group].max()) for group in groups)
    return 1 - int(lengths.sum()) / computed


def encode_by_length(encode: Callable[[Tensor | None, int], Tensor], lengths: Tensor, device: torch.device) -> Tensor:
    """Encode rows of these lengths [n] in groups: [n, dim], in the order of the rows.

    `encode(rows, longest)` encodes the rows of those numbers, on the CPU (None: all of them), none longer than
    `longest`, as [rows, dim] on `device`.
    """
    groups = length_groups(lengths, GROUP_COST[device.type])
    if len(groups) == 1:
        return encode(None, int(lengths.max()))
    encoded = torch.cat([encode(group, int(lengths[group].max())) for group in groups])
    return encoded[torch.cat(groups).argsort().to(device)]
