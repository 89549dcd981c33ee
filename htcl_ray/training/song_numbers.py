"""Songs and pairs of the training and validation splits, as integers. Needs no torch."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.errors import WorkspaceError
from htcl_ray.schemas import TAG_COLUMNS, Split
from htcl_ray.workspace.storage import Workspace

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Songs:
    """Songs of the train and validation splits, sorted by id; a song's position is its number in training."""

    song_ids: list[str]
    texts: list[str]
    ids: Rows
    """[songs, 3]: song, duplicate group, normalised text. Equal numbers in a column are never each other's
    negatives."""
    train: Rows
    """Numbers of the training songs."""
    validation: Rows
    tags: Sequence[tuple[str, ...]] = ()
    """Tags of each song for short training texts; empty where they were not read."""


@dataclass(frozen=True)
class Pairs:
    """Preference pairs as song numbers, sorted."""

    train: Rows
    """[pairs, 2]: trigger, recalled."""
    weights: npt.NDArray[np.float64]
    """[pairs], above 0."""
    validation: Rows
    """[pairs, 2]."""
    missing: int
    """Training and validation pairs left out because a song has no features in that split."""
    rejected: Rows
    """[k, 2]: trigger, song rejected after it; sorted, never a training pair. Empty unless requested."""
    rejected_weights: npt.NDArray[np.float64]
    """[k], above 0."""
    rejected_left_out: int
    """Rejected songs of training triggers left out: a song has no features in the training split, or the two are a
    training pair."""


def read_songs(workspace: Workspace, path: str, text_columns: Sequence[str] = ()) -> Songs:
    """The songs of a features artifact. Raises WorkspaceError when fewer than two are for training.

    `text_columns`: columns of the songs' text; the values of those that are tag columns become the songs' `tags`.
    """
    tag_columns = [name for name in text_columns if name in TAG_COLUMNS]
    table = workspace.read_tables(path, ["song_id", "text", "split", "duplicate_group", *tag_columns])
    table = table.filter(pc.is_in(table["split"], pa.array([Split.TRAIN, Split.VALIDATION]))).sort_by("song_id")
    song_ids, texts = table["song_id"].to_pylist(), table["text"].to_pylist()
    ids = np.stack(
        [
            np.arange(len(song_ids)),
            _numbered(table["duplicate_group"].to_pylist()),
            _numbered([normalized_text(text) for text in texts]),
        ],
        axis=1,
    ).astype(np.int64)
    split = np.array(table["split"].to_pylist())
    train, validation = (np.flatnonzero(split == name).astype(np.int64) for name in (Split.TRAIN, Split.VALIDATION))
    if len(train) < 2:
        raise WorkspaceError(
            f"{workspace.uri_of(path)} has {len(train)} song(s) in the training split; expected at least 2: "
            "add songs or change data.split_shares"
        )
    of_columns = [[value or () for value in table[name].to_pylist()] for name in tag_columns]
    tags = [
        tuple(dict.fromkeys(tag for values in of_song for tag in values)) for of_song in zip(*of_columns, strict=True)
    ]
    return Songs(song_ids, texts, ids, train, validation, tags)


def read_pairs(workspace: Workspace, path: str, songs: Songs, *, rejected: bool = False) -> Pairs:
    """The pairs of a pairs artifact whose songs both have features in the pair's split.

    `rejected`: also read the negatives that were mined with them; WorkspaceError without any.
    """
    columns = ["trigger_song_id", "song_id", "weight", "split"]
    table = workspace.read_tables(path, columns)
    train, weights, missing = _usable(table, Split.TRAIN, songs, songs.train)
    validation, _, more = _usable(table, Split.VALIDATION, songs, songs.validation)
    if not rejected:
        return Pairs(train, weights, validation, missing + more, train[:0], weights[:0], 0)
    negatives = f"negatives/{path.rpartition('/')[2]}"
    if workspace.manifest(negatives) is None:
        raise WorkspaceError(
            f"{workspace.uri_of(negatives)}, which finetune.explicit_negatives needs, does not exist; "
            "run 'htcl preprocess'"
        )
    apart, apart_weights, unknown = _usable(workspace.read_tables(negatives, columns), Split.TRAIN, songs, songs.train)
    known = np.isin(_codes(apart), known_pair_codes(train))
    if known.all():
        raise WorkspaceError(
            f"{workspace.uri_of(negatives)} has no song that was only rejected after its trigger, "
            "which finetune.explicit_negatives needs: give a log with skips or dislikes "
            "(pairs.negative_feedback), or set it to false"
        )
    left_out = unknown + int(known.sum())
    return Pairs(train, weights, validation, missing + more, apart[~known], apart_weights[~known], left_out)


def with_replayed(pairs: Pairs, earlier: Pairs, share: float) -> Pairs:
    """Add the training pairs of an earlier table, which are drawn with probability `share`; from 0 to below 1.

    Within each table a pair keeps its share of the weight. A song that was rejected after a trigger is no negative when
    the two were a pair earlier. Without training pairs in one of the tables, the other has the whole weight.
    """
    if not len(earlier.train) or not len(pairs.train):
        chosen = pairs if len(pairs.train) else earlier
        return replace(pairs, train=chosen.train, weights=chosen.weights)
    train = np.concatenate([pairs.train, earlier.train])
    weights = np.concatenate(
        [(1 - share) * pairs.weights / pairs.weights.sum(), share * earlier.weights / earlier.weights.sum()]
    )
    known = np.isin(_codes(pairs.rejected), known_pair_codes(train))
    return replace(
        pairs,
        train=train,
        weights=weights,
        rejected=pairs.rejected[~known],
        rejected_weights=pairs.rejected_weights[~known],
        rejected_left_out=pairs.rejected_left_out + int(known.sum()),
    )


def _usable(table: pa.Table, split: Split, songs: Songs, members: Rows) -> tuple[Rows, npt.NDArray[np.float64], int]:
    """Pairs of a split as sorted song numbers, their weights, and the number of pairs with a song not in the split."""
    part = table.filter(pc.equal(table["split"], split))
    number = {songs.song_ids[row]: row for row in members.tolist()}
    rows = np.array(
        [[number.get(song, -1) for song in part[name].to_pylist()] for name in ("trigger_song_id", "song_id")],
        dtype=np.int64,
    ).T.reshape(-1, 2)
    weights = part["weight"].to_numpy().astype(np.float64)
    usable = (rows >= 0).all(axis=1) & (weights > 0)
    order = np.lexsort((rows[usable][:, 1], rows[usable][:, 0]))
    return rows[usable][order], weights[usable][order], int((~usable).sum())


def known_pair_codes(pairs: Rows) -> Rows:
    """Sorted, unique codes of unordered pairs, as `losses.false_negatives` takes them."""
    codes: Rows = np.unique(_codes(pairs))
    return codes


def directed_pair_codes(pairs: Rows) -> Rows:
    """Sorted, unique codes of pairs (trigger, recalled), as `losses.false_negatives.directed_matches` takes them."""
    codes: Rows = np.unique((pairs[:, 0] << 32) | pairs[:, 1])
    return codes


def _codes(pairs: Rows) -> Rows:
    codes: Rows = (pairs.min(axis=1) << 32) | pairs.max(axis=1)
    return codes


def log_draw_probability(pairs: Rows, weights: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Log of the probability that a song is drawn as trigger and as recalled song: [songs, 2].

    Pairs are drawn by weight. The result has a row for each song up to the largest number in `pairs`; −inf marks songs
    that are never drawn.
    """
    count = int(pairs.max()) + 1
    drawn = np.stack([np.bincount(songs, weights, count) for songs in pairs.T], axis=1) / weights.sum()
    logs: npt.NDArray[np.float64] = np.log(drawn, out=np.full_like(drawn, -np.inf), where=drawn > 0)
    return logs


def normalized_text(text: str) -> str:
    """Normalise a text for comparison: NFKC, case folding, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _numbered(values: Sequence[str]) -> Rows:
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values], dtype=np.int64)
