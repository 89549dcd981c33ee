"""Queries of the recommendation tasks: histories, targets and candidates of users, read from an interaction log.

Sets of songs are sparse bool matrices [users, songs], so that a log of millions of events takes a few passes over its
columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import sparse

from htcl_ray.config.sections import EvaluateSettings
from htcl_ray.evaluation.evaluated_songs import EvaluatedSongs
from htcl_ray.interactions.splits import hash_fraction
from htcl_ray.schemas import Split
from htcl_ray.workspace.manifest import fingerprint


@dataclass(frozen=True)
class UserActivity:
    """Songs that the users of a log met and liked before and in the evaluated period.

    Matrices: bool csr [users, catalogue].
    """

    songs: np.ndarray
    """str [catalogue]: ids."""
    users: np.ndarray
    """str [users]: ids, sorted."""
    held_out: np.ndarray
    """bool [users]: no training pair contains events of the user."""
    history: sparse.csr_matrix
    """Positive events before the period, outside the held-out split."""
    met: sparse.csr_matrix
    """Events before the period, as song or as trigger; empty when the log has no times."""
    liked: sparse.csr_matrix
    """Positive events in the period."""
    exposed: sparse.csr_matrix
    """Events in the period on the song, positive or not."""
    has_feedback: bool
    """Whether any event of the log is not positive."""
    events_of_unknown_songs: int


@dataclass(frozen=True)
class UserQueries:
    """One query for each user, sorted by user id."""

    users: list[str]
    candidates: np.ndarray
    """int [candidates], catalogue rows, sorted."""
    history: sparse.csr_matrix
    """bool [users, catalogue]."""
    targets: sparse.csr_matrix
    """bool [users, candidates]."""
    met: sparse.csr_matrix
    """bool [users, candidates]: excluded from the user's candidates."""
    counts: dict[str, int]
    """Numbers of queries, candidates and excluded users."""
    population: str
    """Fingerprint of users, histories, candidates, targets and excluded candidates by id; two models are comparable
    only when it is equal."""


def periods_before(events: pd.DataFrame, split: str) -> list[str] | None:
    """Periods that end before the evaluated one begins; None when the log has no times."""
    if events["timestamp"].isna().all():
        return None
    order = [Split.TRAIN, Split.VALIDATION, Split.TEST]
    return [str(period) for period in order[: order.index(Split(split))]]


def training_positives(songs: EvaluatedSongs, events: pd.DataFrame, split: str) -> pd.DataFrame:
    """Positive events of training users on songs of the train split, in the periods before that of `split`."""
    training = {song for song, of in zip(songs.ids, songs.splits, strict=True) if of == Split.TRAIN}
    counted = (events["value"] > 0) & ~events["held_out_user"].astype(bool) & events["song_id"].isin(training)
    earlier = periods_before(events, split)
    if earlier is not None:
        counted &= events["period"].isin(earlier)
    return events[counted]


def hot_songs(songs: EvaluatedSongs, events: pd.DataFrame, split: str) -> np.ndarray:
    """Songs with training positives; bool [songs].

    None of them when the log has no times, because no event is then known to follow the training period.
    """
    if periods_before(events, split) is None:
        return np.zeros(len(songs.ids), dtype=bool)
    return pd.Index(songs.ids).isin(training_positives(songs, events, split)["song_id"])


def user_activity(songs: Sequence[str], cold: np.ndarray, events: pd.DataFrame, split: str) -> UserActivity:
    """Read the activity of users on the songs of the catalogue.

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
        which = which & (columns >= 0)  # -1 is a song outside the catalogue
        pairs = (number[which], columns[which])
        return sparse.csr_matrix((np.ones(len(pairs[0]), dtype=bool), pairs), shape=(len(users), len(places)))

    known_before = before if earlier is not None else np.zeros_like(before)
    return UserActivity(
        np.asarray(songs, dtype=object),
        np.asarray(users, dtype=str),
        held_out,
        history=marks(before & positive & ~cold[row], row),
        met=marks(known_before, row) + marks(known_before, trigger),
        liked=marks(during & positive, row),
        exposed=marks(during, row),
        has_feedback=not positive.all(),
        events_of_unknown_songs=int((row < 0).sum()),
    )


def user_queries(
    activity: UserActivity, candidates: np.ndarray, settings: EvaluateSettings, *, known_users: bool = False
) -> UserQueries:
    """Queries of new users (held out) or known users over `candidates`, bool [catalogue].

    Users with fewer than `evaluate.min_history` history songs or without a target are excluded and counted, and so are
    users beyond `evaluate.max_users`.
    """
    eligible = np.flatnonzero(activity.held_out != known_users)
    rows = np.flatnonzero(candidates)
    history, met = activity.history[eligible], activity.met[eligible][:, rows]
    targets = exclude(activity.liked[eligible][:, rows], met)
    enough, wanted = row_counts(history) >= settings.min_history, row_counts(targets) > 0
    kept = np.flatnonzero(enough & wanted)
    sampled = kept[sample_users(activity.users[eligible][kept].tolist(), settings.max_users)]
    history, targets, met = history[sampled], targets[sampled], met[sampled]
    counts = {
        "users": len(sampled),
        "candidates": len(rows),
        "targets": targets.nnz,
        "history_songs": history.nnz,
        "users_with_short_history": int((~enough).sum()),
        "users_without_target": int((enough & ~wanted).sum()),
        "users_not_drawn": len(kept) - len(sampled),
        "events_of_unknown_songs": activity.events_of_unknown_songs,
    }
    users = activity.users[eligible][sampled].tolist()
    songs = activity.songs[rows]
    population = fingerprint(
        users, songs.tolist(), by_id(history, activity.songs), by_id(targets, songs), by_id(met, songs)
    )
    return UserQueries(users, rows, history, targets, met, counts, population)


def sample_users(users: Sequence[str], limit: int | None) -> list[int]:
    """Rows of at most `limit` users, chosen by a hash of their ids, in the order given."""
    if limit is None or len(users) <= limit:
        return list(range(len(users)))
    place = np.argsort([hash_fraction(user, "evaluated user") for user in users], kind="stable")
    return sorted(place[:limit].tolist())


def exclude(marks: sparse.csr_matrix, excluded: sparse.csr_matrix) -> sparse.csr_matrix:
    """The entries of one bool matrix that another does not have."""
    remaining = (marks > excluded).tocsr()
    remaining.eliminate_zeros()
    return remaining


def by_id(marks: sparse.csr_matrix, columns: np.ndarray) -> tuple[list[int], list[str]]:
    """A matrix as the ids of its columns, for a fingerprint that does not depend on other songs of the catalogue."""
    ordered = marks.tocsr().sorted_indices()
    return ordered.indptr.tolist(), columns[ordered.indices].tolist()


def row_counts(marks: sparse.csr_matrix) -> np.ndarray:
    """Number of entries in each row; int [rows]."""
    return np.diff(marks.indptr)
