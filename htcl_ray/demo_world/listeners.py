"""Simulate users with tastes for named and hidden traits, and the feedback log of an imperfect recommender.

A visit starts with a song that the user picks, the trigger. The recommender then offers a few songs at random,
weighted towards popular songs, songs of the trigger's genre and, slightly, songs that match the user's taste. The user
gives feedback to each.
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
"""Recommendations of the song of popularity rank r are proportional to r to the power of minus this."""
SAME_GENRE_LIFT = 1.5
"""Factor on the probability of songs that share the trigger's genre, before normalisation."""
HINT = 0.6
"""Weight of a user's true utility in the recommender, from 0 (unknown) to 1."""
HIDDEN_WEIGHT, GENRE_WEIGHT, MOOD_WEIGHT, LEAD_WEIGHT = 2.2, 1.1, 0.7, 0.4
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
    """Tastes of all users: weights, float64 [users, options]."""

    hidden: np.ndarray
    genre: np.ndarray
    mood: np.ndarray
    lead: np.ndarray

    def named_utility(self, world: World) -> np.ndarray:
        """Utility of the traits that the text names: [users, songs]."""
        genre = _one_hot([song.genre for song in world.songs], GENRES)
        mood = _one_hot([song.mood for song in world.songs], MOODS)
        lead = _one_hot([song.lead for song in world.songs], LEADS)
        return np.asarray(self.genre @ genre.T + self.mood @ mood.T + self.lead @ lead.T)

    def utility(self, world: World) -> np.ndarray:
        """Utility of each song to each user, on which feedback depends: [users, songs]."""
        return np.asarray(self.named_utility(world) + self.hidden @ world.hidden.T)


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
    )


def popularity(world: World) -> np.ndarray:
    """Return the share of recommendations of each song by popularity alone, [songs], independent of every trait."""
    rank = 1 + random_stream(world.seed, "popularity").permutation(len(world.songs))
    weight = rank**-POPULARITY_EXPONENT
    return np.asarray(weight / weight.sum())


def simulate(world: World, tastes: Tastes) -> Log:
    """Simulate the log of all users. No song is recommended twice to a user, nor after itself as the trigger."""
    rng = random_stream(world.seed, "log")
    utility = tastes.utility(world)
    users, songs = utility.shape
    per_visit = min(RECOMMENDED, songs - 1)
    visits = min(VISITS, (songs - 1) // per_visit)
    log_popularity = np.log(popularity(world))
    genre = np.array([GENRES.index(song.genre) for song in world.songs])
    seen = np.zeros((users, songs), bool)
    everyone = np.arange(users)
    days = np.sort(rng.uniform(0, DAYS, (users, visits)), axis=1)
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    for visit in range(visits):
        trigger = _draw(utility + log_popularity, 1, rng)[:, 0]
        lift = np.log(SAME_GENRE_LIFT) * (genre[None, :] == genre[trigger][:, None])
        blocked = seen.copy()
        blocked[everyone, trigger] = True
        offered = _draw(np.where(blocked, -np.inf, log_popularity + lift + HINT * utility), per_visit, rng)
        seen[everyone[:, None], offered] = True
        seconds = days[:, visit, None] * 86400 + 210 * np.arange(1, per_visit + 1)
        columns.append((everyone[:, None] + 0 * offered, trigger[:, None] + 0 * offered, offered, seconds))
    user, trigger, song, seconds = (np.stack(part, axis=1).reshape(-1) for part in zip(*columns, strict=True))
    liked = rng.random(len(user)) < 1 / (1 + np.exp(-2 * (utility[user, song] - PICKINESS)))
    careless = rng.random(len(user)) < CARELESS_SHARE
    liked = np.where(careless, rng.random(len(user)) < 0.5, liked)
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
