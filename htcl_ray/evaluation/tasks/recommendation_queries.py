"""Who is asked about which songs: users' histories, targets and candidates, read from a log.

Lists of songs are sparse bool matrices [users, songs], so that a log of millions of events is a few passes over its
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.tasks.periods import periods_before
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.workspace.manifest import fingerprint


@dataclass(frozen=True)
class Listening:
    """What the users of a log met and liked before the evaluated period, and in it. Matrices: bool csr [users,
    catalogue].
    """

    songs: np.ndarray
    """str [catalogue]: ids."""
    users: np.ndarray
    """str [users], sorted."""
    held_out: np.ndarray
    """bool [users]: no training pair has events of theirs."""
    history: sparse.csr_matrix
    """Received positively before the period, outside the held-out split."""
    met: sparse.csr_matrix
    """Met before the period, as song or as trigger; nothing when the log has no times."""
    liked: sparse.csr_matrix
    """Received positively in the period."""
    exposed: sparse.csr_matrix
    """Met in the period as song, whatever came of it."""
    has_feedback: bool
    """Whether any event of the log is not positive."""
    events_of_unknown_songs: int


@dataclass(frozen=True)
class Questions:
    """One question for each user, in order of user id."""

    users: list[str]
    candidates: np.ndarray
    """int [candidates], catalogue rows, sorted."""
    history: sparse.csr_matrix
    """bool [users, catalogue]."""
    targets: sparse.csr_matrix
    """bool [users, candidates]."""
    met: sparse.csr_matrix
    """bool [users, candidates]: those that are none of the user's."""
    counts: dict[str, int]
    """What the task is made of, and who is left out."""
    asked: str
    """Fingerprint of users, histories, candidates, targets and left-out candidates, by id: what two models must share
    to be compared."""


def listening(songs: Sequence[str], cold: np.ndarray, events: pd.DataFrame, split: str) -> Listening:
    """What a log says of the catalogue's songs.

    `songs`: ids of the catalogue rows; `cold`: bool [catalogue], the held-out songs; `events`: columns of
    schemas.EVENTS; `split`: the evaluated period. A song is positive for a user when any of their events on it is.
    """
    number, users = pd.factorize(events["user_id"], sort=True)
    held_out = np.zeros(len(users), dtype=bool)
    held_out[number[events["held_out_user"].to_numpy(dtype=bool)]] = True
    places = pd.Index(list(songs))
    row = places.get_indexer(pd.Index(events["song_id"]))
    trigger = places.get_indexer(pd.Index(events["trigger_song_id"]))
    positive = (events["value"] > 0).to_numpy()
    earlier = periods_before(events, split)
    before = during = np.ones(len(events), dtype=bool)
    if earlier is not None:
        before, during = events["period"].isin(earlier).to_numpy(), (events["period"] == split).to_numpy()

    def marks(which: np.ndarray, columns: np.ndarray) -> sparse.csr_matrix:
        which = which & (columns >= 0)  # −1 is a song outside the catalogue
        pairs = (number[which], columns[which])
        return sparse.csr_matrix((np.ones(len(pairs[0]), dtype=bool), pairs), shape=(len(users), len(places)))

    heard = before if earlier is not None else np.zeros_like(before)
    return Listening(
        np.asarray(songs, dtype=object),
        np.asarray(users, dtype=str),
        held_out,
        history=marks(before & positive & ~cold[row], row),
        met=marks(heard, row) + marks(heard, trigger),
        liked=marks(during & positive, row),
        exposed=marks(during, row),
        has_feedback=not positive.all(),
        events_of_unknown_songs=int((row < 0).sum()),
    )


def questions(
    heard: Listening, candidates: np.ndarray, settings: EvaluateSettings, *, known_users: bool = False
) -> Questions:
    """What to ask new users (held out) or known ones about the candidates, bool [catalogue].

    Users with fewer than `evaluate.min_history` history songs or without a target are left out and counted; of more
    than `evaluate.max_users` the rest.
    """
    ours = np.flatnonzero(heard.held_out != known_users)
    rows = np.flatnonzero(candidates)
    history, met = heard.history[ours], heard.met[ours][:, rows]
    targets = without(heard.liked[ours][:, rows], met)
    enough, wanted = lengths(history) >= settings.min_history, lengths(targets) > 0
    kept = np.flatnonzero(enough & wanted)
    drawn = kept[chosen_users(heard.users[ours][kept].tolist(), settings.max_users)]
    history, targets, met = history[drawn], targets[drawn], met[drawn]
    counts = {
        "users": len(drawn),
        "candidates": len(rows),
        "targets": targets.nnz,
        "history_songs": history.nnz,
        "users_with_short_history": int((~enough).sum()),
        "users_without_target": int((enough & ~wanted).sum()),
        "users_not_drawn": len(kept) - len(drawn),
        "events_of_unknown_songs": heard.events_of_unknown_songs,
    }
    users = heard.users[ours][drawn].tolist()
    candidates = heard.songs[rows]
    asked = fingerprint(
        users, candidates.tolist(), named(history, heard.songs), named(targets, candidates), named(met, candidates)
    )
    return Questions(users, rows, history, targets, met, counts, asked)


def chosen_users(users: Sequence[str], most: int | None) -> list[int]:
    """Rows of at most `most` users, by a hash of their ids, in the order given."""
    if most is None or len(users) <= most:
        return list(range(len(users)))
    place = np.argsort([hash_fraction(user, "evaluated user") for user in users], kind="stable")
    return sorted(place[:most].tolist())


def without(those: sparse.csr_matrix, left_out: sparse.csr_matrix) -> sparse.csr_matrix:
    """The marks of one bool matrix that another does not have."""
    found = (those > left_out).tocsr()
    found.eliminate_zeros()
    return found


def named(marks: sparse.csr_matrix, columns: np.ndarray) -> tuple[list[int], list[str]]:
    """A matrix by the ids of its columns, for a fingerprint that does not depend on the other songs of the
    catalogue.
    """
    ordered = marks.tocsr().sorted_indices()
    return ordered.indptr.tolist(), columns[ordered.indices].tolist()


def lengths(marks: sparse.csr_matrix) -> np.ndarray:
    """Int [rows]: marks in each row."""
    return np.diff(marks.indptr)
