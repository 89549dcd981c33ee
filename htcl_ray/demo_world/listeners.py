"""Simulate users with tastes for named and hidden traits, and the feedback log of an imperfect recommender.

A visit starts with a song that the user picks, the trigger. A recommender then offers a few songs at random, and the
user gives feedback to each. Each user is served by one of several recommenders, which differ in how much they follow
popularity, the trigger's genre and the user's taste, so that exposure depends on the recommender. Popularity grows with
positive feedback, tastes drift, and some songs are never offered.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np

from htcl_ray.demo_world.world import GENRES, HIDDEN_TRAITS, LEADS, MOODS, World, random_stream
from htcl_ray.schemas import Feedback

FIRST_DAY = datetime(2025, 1, 6, tzinfo=UTC)
DAYS = 180
VISITS = 40
RECOMMENDED = 5
"""Number of songs recommended after one trigger."""

POPULARITY_EXPONENT = 0.6
"""Recommendations of the song of popularity rank r are proportional to r to the power of minus this, at first."""
GROWTH = 0.01
"""Growth of a song's popularity with each positive feedback, as a share of its first value."""
SILENT_SHARE = 0.05
"""Share of songs that are neither offered nor picked, and so have no pairs."""


@dataclass(frozen=True)
class Recommender:
    """What determines the songs that a recommender offers."""

    popularity: float
    """Exponent of the popularity."""
    same_genre: float
    """Factor on the probability of songs that share the trigger's genre, before normalisation."""
    hint: float
    """Weight of a user's true utility, from 0 (unknown) to 1."""


RECOMMENDERS = (Recommender(1.4, 1.0, 0.4), Recommender(0.8, 2.5, 0.5), Recommender(0.8, 1.2, 0.8))
"""Charts, radio of the trigger's genre, and personal recommendations; users are divided among them at random."""

HIDDEN_WEIGHT, GENRE_WEIGHT, MOOD_WEIGHT, LEAD_WEIGHT = 2.8, 1.1, 0.7, 0.4
FLIP_SHARE = 0.2
"""Share of users whose taste for one hidden trait changes to the opposite at some time of the period."""
NAMED_DRIFT = 0.5
"""Share of a user's tastes for named traits that drifts over the period."""
PICKINESS = 4.0
"""Utility at which positive feedback has probability 0.5."""
CARELESS_SHARE = 0.08
"""Share of feedback that is independent of taste."""

POSITIVE = (Feedback.COMPLETE, Feedback.LIKE, Feedback.COLLECT, Feedback.SHARE)
POSITIVE_SHARES = (0.5, 0.3, 0.15, 0.05)
OTHER = (Feedback.SKIP, Feedback.PLAY, Feedback.DISLIKE)
OTHER_SHARES = (0.5, 0.38, 0.12)


@dataclass(frozen=True)
class Tastes:
    """Tastes of all users at the start of the period, as weights, float64 [users, options], and their drift."""

    hidden: np.ndarray
    genre: np.ndarray
    mood: np.ndarray
    lead: np.ndarray
    genre_drift: np.ndarray
    flipped: np.ndarray
    """int [users]: the hidden trait for which the user's taste changes to the opposite."""
    flip_time: np.ndarray
    """float64 [users]: when it does, as a share of the period; infinite for users whose taste does not."""

    def named_utility(self, world: World, when: np.ndarray | float = 0.0) -> np.ndarray:
        """Utility of the traits that the text names at a time, a share of the period: [users, songs]."""
        genre = _one_hot([song.genre for song in world.songs], GENRES)
        mood = _one_hot([song.mood for song in world.songs], MOODS)
        lead = _one_hot([song.lead for song in world.songs], LEADS)
        of_genre = self.genre + np.reshape(when, (-1, 1)) * self.genre_drift
        return np.asarray(of_genre @ genre.T + self.mood @ mood.T + self.lead @ lead.T)

    def hidden_at(self, when: np.ndarray | float) -> np.ndarray:
        """Weights of the hidden traits at a time: [users, traits]."""
        signs = np.ones_like(self.hidden)
        signs[np.arange(len(signs)), self.flipped] = np.where(self.flip_time <= when, -1.0, 1.0)
        return np.asarray(self.hidden * signs)

    def utility(self, world: World, when: np.ndarray | float = 0.0) -> np.ndarray:
        """Utility of each song to each user, on which feedback depends: [users, songs].

        `when`: one time, or one for each user, from 0 (start of the period) to 1.
        """
        return np.asarray(self.named_utility(world, when) + self.hidden_at(when) @ world.hidden.T)


@dataclass(frozen=True)
class Log:
    """The feedback log: one row for each recommendation, by user and visit. Songs are indexes into `World.songs`."""

    user: np.ndarray
    trigger: np.ndarray
    song: np.ndarray
    feedback: list[str]
    timestamp: list[datetime]


def make_tastes(world: World, users: int) -> Tastes:
    """Draw the users of a world; a pure function of the world's seed and their number."""
    rng = random_stream(world.seed, "tastes")
    sides = rng.choice((-1.0, 1.0), (users, len(HIDDEN_TRAITS)))
    return Tastes(
        hidden=HIDDEN_WEIGHT * sides * rng.uniform(0.8, 1.2, sides.shape),
        genre=GENRE_WEIGHT * rng.standard_normal((users, len(GENRES))),
        mood=MOOD_WEIGHT * rng.standard_normal((users, len(MOODS))),
        lead=LEAD_WEIGHT * rng.standard_normal((users, len(LEADS))),
        genre_drift=NAMED_DRIFT * GENRE_WEIGHT * rng.standard_normal((users, len(GENRES))),
        flipped=rng.integers(len(HIDDEN_TRAITS), size=users),
        flip_time=np.where(rng.random(users) < FLIP_SHARE, rng.random(users), np.inf),
    )


def popularity(world: World) -> np.ndarray:
    """Return the share of recommendations of each song by popularity alone, [songs], independent of every trait.

    Songs without any recommendation have 0.
    """
    rng = random_stream(world.seed, "popularity")
    rank = 1 + rng.permutation(len(world.songs))
    weight = rank**-POPULARITY_EXPONENT
    weight[rng.permutation(len(world.songs))[: int(SILENT_SHARE * len(world.songs))]] = 0
    return np.asarray(weight / weight.sum())


def simulate(world: World, tastes: Tastes) -> Log:
    """Simulate the log of all users. No song is recommended twice to a user, nor after itself as the trigger."""
    rng = random_stream(world.seed, "log")
    users, songs = len(tastes.hidden), len(world.songs)
    first_popularity = popularity(world)
    offered_songs = int((first_popularity > 0).sum())
    per_visit = min(RECOMMENDED, offered_songs - 1)
    visits = min(VISITS, (offered_songs - 1) // per_visit)
    with np.errstate(divide="ignore"):
        log_popularity = np.log(first_popularity)
    recommenders = [RECOMMENDERS[i] for i in rng.integers(len(RECOMMENDERS), size=users)]
    exponent, same_genre, hint = (
        np.array([[getattr(of_user, name)] for of_user in recommenders])
        for name in ("popularity", "same_genre", "hint")
    )
    genre = np.array([GENRES.index(song.genre) for song in world.songs])
    seen, praise = np.zeros((users, songs), bool), np.zeros(songs)
    everyone = np.arange(users)
    days = np.sort(rng.uniform(0, DAYS, (users, visits)), axis=1)
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for visit in range(visits):
        utility = tastes.utility(world, days[:, visit] / DAYS)
        current = log_popularity + np.log1p(GROWTH * praise)
        trigger = _draw(utility + current, 1, rng)[:, 0]
        lift = np.log(same_genre) * (genre[None, :] == genre[trigger][:, None])
        blocked = seen.copy()
        blocked[everyone, trigger] = True
        offered = _draw(np.where(blocked, -np.inf, exponent * current + lift + hint * utility), per_visit, rng)
        seen[everyone[:, None], offered] = True
        value = np.take_along_axis(utility, offered, axis=1)
        liked = rng.random(offered.shape) < 1 / (1 + np.exp(-2 * (value - PICKINESS)))
        liked = np.where(rng.random(offered.shape) < CARELESS_SHARE, rng.random(offered.shape) < 0.5, liked)
        praise += np.bincount(offered[liked], minlength=songs)
        seconds = days[:, visit, None] * 86400 + 210 * np.arange(1, per_visit + 1)
        columns.append((everyone[:, None] + 0 * offered, trigger[:, None] + 0 * offered, offered, liked, seconds))
    user, trigger, song, liked, seconds = (np.stack(part, axis=1).reshape(-1) for part in zip(*columns, strict=True))
    yes = rng.choice(np.array(POSITIVE), len(user), p=POSITIVE_SHARES)
    no = rng.choice(np.array(OTHER), len(user), p=OTHER_SHARES)
    moments = [FIRST_DAY + timedelta(seconds=float(round(s))) for s in seconds]
    return Log(user, trigger, song, np.where(liked, yes, no).tolist(), moments)


def _draw(log_weight: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Sample `count` columns of each row without replacement (Gumbel top-k): int64 [rows, count], in drawn order."""
    noisy = log_weight + rng.gumbel(size=log_weight.shape)
    top = np.argpartition(-noisy, count - 1, axis=1)[:, :count]
    order = np.argsort(-np.take_along_axis(noisy, top, axis=1), axis=1)
    return np.take_along_axis(top, order, axis=1)


def _one_hot(values: list[str], options: tuple[str, ...]) -> np.ndarray:
    return np.eye(len(options))[[options.index(value) for value in values]]
