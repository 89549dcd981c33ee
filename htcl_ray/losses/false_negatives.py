"""False negatives: entries of a matrix of logits that must not be pushed apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Excluded = Callable[[int, int], Tensor]
"""`excluded(start, stop)` → bool [stop − start, m]: keys that are no negatives of these query rows."""


def exclude_negatives(excluded: Excluded | None, start: int, stop: int, positives: Tensor) -> Tensor | None:
    """Mask of the keys excluded for query rows `start` to `stop`, without their positives [stop − start]."""
    return None if excluded is None else excluded(start, stop).scatter(1, positives[:, None], False)


def false_negatives(row_ids: Tensor, column_ids: Tensor, known_pairs: Tensor | None = None) -> Tensor:
    """Mask of the (row, column) entries that must not be pushed apart: bool [n, m].

    row_ids [n, k] and column_ids [m, k], int64: true where any kind of id is equal (song, duplicate group, normalised
    text). The first kind is the song; `known_pairs` are sorted `pair_codes` of songs that belong together, true in
    either order.
    """
    related = torch.zeros(len(row_ids), len(column_ids), dtype=torch.bool, device=row_ids.device)
    for kind in range(row_ids.shape[1]):
        related |= row_ids[:, None, kind] == column_ids[None, :, kind]
    if known_pairs is not None and len(known_pairs):
        low = torch.minimum(row_ids[:, None, 0], column_ids[None, :, 0])
        codes = pair_codes(low, torch.maximum(row_ids[:, None, 0], column_ids[None, :, 0]))
        position = torch.searchsorted(known_pairs, codes).clamp(max=len(known_pairs) - 1)
        related |= known_pairs[position] == codes
    return related


def directed_matches(rows: Tensor, columns: Tensor, pairs: Tensor, among: Tensor, *, reverse: bool = False) -> Tensor:
    """Entries (row, column) of bool `among` [n, m] whose songs are one of the directed pairs: bool [n, m].

    rows [n] and columns [m], int64 songs; `pairs`: sorted `pair_codes(trigger, recalled)`. Rows are triggers, or with
    `reverse` recalled songs. Only the marked entries are looked up, which are few.
    """
    row, column = among.nonzero(as_tuple=True)
    first, second = rows[row], columns[column]
    codes = pair_codes(second, first) if reverse else pair_codes(first, second)
    position = torch.searchsorted(pairs, codes).clamp(max=len(pairs) - 1)
    matches = torch.zeros_like(among)
    matches[row, column] = pairs[position] == codes
    return matches


def pair_codes(low: Tensor, high: Tensor) -> Tensor:
    """One int64 for each pair of song ids below 2³¹: unordered where low ≤ high, else (trigger, recalled)."""
    return (low << 32) | high
