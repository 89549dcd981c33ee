"""The simulated listeners: what they like is partly named and mostly heard, and the log is one that a service could
have."""

from __future__ import annotations

import numpy as np
import pytest

from htcl_ray.demo_world.listeners import (
    DAYS,
    FIRST_DAY,
    POSITIVE,
    RECOMMENDED,
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


def test_the_seed_determines_the_log(world: World, tastes: Tastes, log: Log) -> None:
    again = simulate(world, make_tastes(world, USERS))
    assert again.feedback == log.feedback
    assert again.timestamp == log.timestamp
    assert np.array_equal(again.song, log.song)
    assert simulate(make_world(songs=1000, artists=200, seed=1), tastes).feedback != log.feedback


def test_every_user_answers_every_recommendation_of_every_visit(log: Log) -> None:
    assert len(log.user) == len(log.song) == len(log.feedback) == len(log.timestamp) == USERS * VISITS * RECOMMENDED
    assert set(log.feedback) == {str(feedback) for feedback in Feedback}


def test_nothing_is_recommended_twice_or_from_itself(log: Log) -> None:
    assert (log.song != log.trigger).all()
    assert len(set(zip(log.user.tolist(), log.song.tolist(), strict=True))) == len(log.user)


def test_a_small_world_still_has_a_log() -> None:
    world = make_world(songs=4, artists=2, seed=0)
    log = simulate(world, make_tastes(world, 3))
    assert len(log.user) == 9
    assert (log.song != log.trigger).all()


def test_every_user_is_there_from_the_first_days_to_the_last(log: Log) -> None:
    day = np.array([(moment - FIRST_DAY).total_seconds() / 86400 for moment in log.timestamp])
    assert day.min() >= 0
    assert day.max() < DAYS + 1
    for user in range(USERS):
        late = day[log.user == user] > 0.8 * DAYS
        assert 0.03 < late.mean() < 0.5


def test_popularity_is_skewed_and_tells_nothing_about_traits(world: World, log: Log) -> None:
    share = np.sort(popularity(world))[::-1]
    assert share.sum() == pytest.approx(1)
    assert share[:100].sum() > 3 * 0.1
    offered = np.bincount(log.song, minlength=len(world.songs))
    assert np.corrcoef(offered, popularity(world))[0, 1] > 0.4
    assert np.abs(np.corrcoef(np.vstack([popularity(world), world.hidden.T]))[0, 1:]).max() < 0.1


def test_positive_answers_follow_taste_with_noise(world: World, tastes: Tastes, log: Log) -> None:
    utility = tastes.utility(world)[log.user, log.song]
    positive = is_positive(log)
    assert 0.3 < positive.mean() < 0.7
    assert positive[utility > np.quantile(utility, 0.9)].mean() > 0.85
    unloved = positive[utility < np.quantile(utility, 0.1)].mean()
    assert 0.01 < unloved < 0.15


def test_pairs_agree_in_hidden_traits_far_more_than_by_chance(world: World, log: Log) -> None:
    """What stage 2 learns from: a trigger and a song that was received well are alike in what no text says."""
    side, positive = np.sign(world.hidden), is_positive(log)
    agreement = (side[log.trigger[positive]] == side[log.song[positive]]).mean(axis=0)
    assert (agreement > 0.72).all()


def test_taste_ranks_better_than_what_the_text_says_and_that_better_than_popularity(
    world: World, tastes: Tastes, log: Log
) -> None:
    """The oracles that bound every model: true taste ≫ its named part > popularity ≈ chance, among songs that a fifth
    of artists made."""
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
