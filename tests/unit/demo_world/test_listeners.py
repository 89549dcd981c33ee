"""The simulated listeners: tastes for named and hidden traits, and a plausible feedback log."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.demo_world import listeners
from htcl_ray.demo_world.listeners import (
    DAYS,
    FIRST_DAY,
    FLIP_SHARE,
    POSITIVE,
    RECOMMENDED,
    RECOMMENDERS,
    SILENT_SHARE,
    VISITS,
    Log,
    Tastes,
    make_tastes,
    popularity,
    simulate,
)
from htcl_ray.demo_world.world import World, make_world
from htcl_ray.evaluation.metrics import ndcg_at_k
from htcl_ray.schemas import Feedback

pytestmark = pytest.mark.unit

USERS = 150


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(songs=1000, artists=200, seed=0)


@pytest.fixture(scope="module")
def tastes(world: World) -> Tastes:
    return make_tastes(world, USERS)


@pytest.fixture(scope="module")
def log(world: World, tastes: Tastes) -> Log:
    return simulate(world, tastes)


def test_the_seed_determines_the_log() -> None:
    first, again, other = (
        simulate(world, make_tastes(world, 20))
        for world in (make_world(songs=300, artists=60, seed=seed) for seed in (0, 0, 1))
    )
    assert again.feedback == first.feedback
    assert again.timestamp == first.timestamp
    assert np.array_equal(again.song, first.song)
    assert other.feedback != first.feedback


def test_every_user_gives_feedback_to_every_recommendation(log: Log) -> None:
    assert len(log.user) == len(log.song) == len(log.feedback) == len(log.timestamp) == USERS * VISITS * RECOMMENDED
    assert set(log.feedback) == {str(feedback) for feedback in Feedback}


def test_no_song_is_recommended_twice_or_after_itself(log: Log) -> None:
    assert (log.song != log.trigger).all()
    assert len(set(zip(log.user.tolist(), log.song.tolist(), strict=True))) == len(log.user)


def test_a_small_world_has_a_log() -> None:
    world = make_world(songs=4, artists=2, seed=0)
    log = simulate(world, make_tastes(world, 3))
    assert len(log.user) == 9
    assert (log.song != log.trigger).all()


def test_every_user_is_active_in_the_whole_period(log: Log) -> None:
    day = np.array([(moment - FIRST_DAY).total_seconds() / 86400 for moment in log.timestamp])
    assert day.min() >= 0
    assert day.max() < DAYS + 1
    for user in range(USERS):
        late = day[log.user == user] > 0.8 * DAYS
        assert 0.03 < late.mean() < 0.5


def test_popularity_is_skewed_and_independent_of_traits(world: World, log: Log) -> None:
    share = np.sort(popularity(world))[::-1]
    assert share.sum() == pytest.approx(1)
    assert share[:100].sum() > 3 * 0.1
    offered = np.bincount(log.song, minlength=len(world.songs))
    assert np.corrcoef(offered, popularity(world))[0, 1] > 0.4
    assert np.abs(np.corrcoef(np.vstack([popularity(world), world.hidden.T]))[0, 1:]).max() < 0.1


def test_some_songs_are_neither_offered_nor_picked(world: World, log: Log) -> None:
    silent = np.flatnonzero(popularity(world) == 0)
    assert len(silent) == SILENT_SHARE * len(world.songs)
    assert not set(silent) & (set(log.song.tolist()) | set(log.trigger.tolist()))


def test_exposure_depends_on_the_recommender(
    world: World, tastes: Tastes, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Users of one kind of recommender alone are offered more popular songs, more of the trigger's genre, or more of
    their taste."""
    genre = np.array([song.genre for song in world.songs])
    measured = []
    for recommender in RECOMMENDERS:
        monkeypatch.setattr(listeners, "RECOMMENDERS", (recommender,))
        of_one = simulate(world, tastes)
        measured.append(
            (
                popularity(world)[of_one.song].mean(),
                (genre[of_one.song] == genre[of_one.trigger]).mean(),
                tastes.utility(world)[of_one.user, of_one.song].mean(),
            )
        )
    assert np.argmax(measured, axis=0).tolist() == [0, 1, 2]


def test_popular_songs_become_more_popular(world: World, tastes: Tastes, monkeypatch: pytest.MonkeyPatch) -> None:
    def concentration() -> float:
        offered = np.sort(np.bincount(simulate(world, tastes).song, minlength=len(world.songs)))
        return float(offered[-50:].sum() / offered.sum())

    grown = concentration()
    monkeypatch.setattr(listeners, "GROWTH", 0.0)
    assert grown > concentration()


def test_tastes_drift(world: World, tastes: Tastes) -> None:
    first, last = tastes.hidden_at(0.0), tastes.hidden_at(1.0)
    flipped = (np.sign(first) != np.sign(last)).sum(axis=1)
    assert set(flipped) == {0, 1}
    assert FLIP_SHARE - 0.1 < flipped.mean() < FLIP_SHARE + 0.1
    correlation = np.corrcoef(tastes.named_utility(world, 0.0).ravel(), tastes.named_utility(world, 1.0).ravel())[0, 1]
    assert 0.7 < correlation < 0.98
    when = np.linspace(0, 1, len(first))
    assert np.array_equal(tastes.utility(world, when)[3], tastes.utility(world, when[3])[3])


def test_positive_feedback_follows_taste_with_noise(world: World, tastes: Tastes, log: Log) -> None:
    utility = tastes.utility(world)[log.user, log.song]
    positive = is_positive(log)
    assert 0.3 < positive.mean() < 0.7
    assert positive[utility > np.quantile(utility, 0.9)].mean() > 0.85
    unloved = positive[utility < np.quantile(utility, 0.1)].mean()
    assert 0.01 < unloved < 0.15


def test_pairs_share_hidden_traits_more_often_than_by_chance(world: World, log: Log) -> None:
    """The signal of stage 2: a trigger and a song with positive feedback agree in traits that no text names."""
    side, positive = np.sign(world.hidden), is_positive(log)
    agreement = (side[log.trigger[positive]] == side[log.song[positive]]).mean(axis=0)
    assert (agreement > 0.72).all()


def test_ranking_by_taste_exceeds_named_traits_and_those_exceed_popularity(
    world: World, tastes: Tastes, log: Log
) -> None:
    """The oracles that bound every model: true taste ≫ its named part > popularity ≈ chance.

    The candidates are the songs of a fifth of the artists.
    """
    cold = np.flatnonzero([world.artists.index(song.artist) % 5 == 0 for song in world.songs])
    positive = is_positive(log)
    liked = [set(log.song[positive & (log.user == user)].tolist()) & set(cold.tolist()) for user in range(USERS)]

    def quality(scores: np.ndarray) -> float:
        ranked = [cold[np.argsort(-row[cold])].tolist() for row in scores]
        return float(np.nanmean(ndcg_at_k(ranked, liked, 10)))

    genres = [song.genre for song in world.songs]
    offered = {genre: sum(genres[song] == genre for song in log.song[positive]) for genre in set(genres)}
    random = quality(np.random.default_rng(0).random((USERS, len(world.songs))))
    of_genre = quality(
        np.tile([offered[genre] for genre in genres], (USERS, 1)) + 1e-6 * np.random.default_rng(1).random(len(genres))
    )
    named, true = quality(tastes.named_utility(world)), quality(tastes.utility(world))
    assert true > 2.5 * named
    assert named > 1.3 * max(random, of_genre)


def is_positive(log: Log) -> np.ndarray:
    return np.isin(log.feedback, [str(feedback) for feedback in POSITIVE])
