"""The ground truth of the sample world: distribution and independence of its traits."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from htcl_ray.demo_world.world import GENRES, HIDDEN_TRAITS, LEADS, MOODS, TextStyle, World, make_world, random_stream

pytestmark = pytest.mark.unit

NAMED = ("genre", "mood", "lead", "backing")


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(songs=1000, artists=200, seed=0)


def test_make_world_depends_only_on_its_arguments(world: World) -> None:
    assert make_world(songs=1000, artists=200, seed=0) == world
    assert {song.song_id for song in make_world(songs=1000, artists=200, seed=1).songs}.isdisjoint(
        song.song_id for song in world.songs
    )


def test_random_streams_are_independent() -> None:
    drawn = {
        tuple(random_stream(*key).integers(0, 2**62, 2))
        for key in ((0, "a"), (1, "a"), (0, "b"), (0, "a", 1), (0, "ab"))
    }
    assert len(drawn) == 5


@pytest.mark.parametrize(("songs", "artists"), [(3, 4), (3, 0)])
def test_make_world_rejects_impossible_sizes(songs: int, artists: int) -> None:
    with pytest.raises(ValueError, match=f"{artists} artists for {songs} songs"):
        make_world(songs=songs, artists=artists, seed=0)


def test_ids_are_unique_and_artists_have_few_songs(world: World) -> None:
    assert len({song.song_id for song in world.songs}) == len(world.songs) == 1000
    assert len({artist.name for artist in world.artists}) == 200
    songs_of = [sum(song.artist is artist for song in world.songs) for artist in world.artists]
    assert min(songs_of) == max(songs_of) == 5


def test_every_named_trait_is_common(world: World) -> None:
    for field, options in (("genre", GENRES), ("mood", MOODS), ("lead", LEADS)):
        values = [getattr(song, field) for song in world.songs]
        assert min(values.count(option) for option in options) > 0.5 * len(values) / len(options)
    texts = {tuple(getattr(song, field) for field in NAMED) for song in world.songs}
    assert len(texts) > 600  # of 1,600 possible ones


def test_an_artist_has_one_genre(world: World) -> None:
    assert all(song.genre == song.artist.genre for song in world.songs)


def test_duplicate_recordings_have_the_same_artist_and_another_id(world: World) -> None:
    copies = [(song, world.songs[song.recording]) for i, song in enumerate(world.songs) if song.recording != i]
    assert 5 <= len(copies) <= 10
    assert not {original.recording for _, original in copies} & {world.songs.index(copy) for copy, _ in copies}
    for copy, original in copies:
        assert copy.song_id != original.song_id
        assert copy.album != original.album
        assert world.songs[original.recording] is original
        for field in ("title", "artist", "hidden", *NAMED):
            assert getattr(copy, field) == getattr(original, field)


def test_remasters_share_everything_but_the_recording_and_covers_the_composition_only(world: World) -> None:
    versions = [
        (song, world.songs[song.work]) for i, song in enumerate(world.songs) if song.work != i and song.recording == i
    ]
    remasters = [(song, original) for song, original in versions if song.artist is original.artist]
    covers = [(song, original) for song, original in versions if song.artist is not original.artist]
    assert len(remasters) >= 15
    assert len(covers) >= 25
    for remaster, original in remasters:
        assert remaster.title == f"{original.title} (remastered)"
        assert remaster.hidden == original.hidden
        assert remaster.nuisance != original.nuisance
    for cover, original in covers:
        assert (cover.title, cover.mood) == (original.title, original.mood)
        assert cover.genre == cover.artist.genre
    agreement = np.mean([np.sign(cover.hidden) == np.sign(original.hidden) for cover, original in covers])
    assert 0.35 < agreement < 0.65


def test_collaborations_are_between_artists_of_a_genre_in_pairs(world: World) -> None:
    collaborations = [song for song in world.songs if song.guest is not None]
    assert 20 < len(collaborations) < 150
    partners: dict[str, set[str]] = {}
    for song in collaborations:
        assert song.guest is not None
        assert song.guest.genre == song.artist.genre
        for one, other in ((song.artist, song.guest), (song.guest, song.artist)):
            partners.setdefault(one.name, set()).add(other.name)
    assert {len(names) for names in partners.values()} == {1}


def test_publishers_write_texts_in_several_styles(world: World) -> None:
    styles = [artist.text_style for artist in world.artists]
    assert all(styles.count(style) >= 5 for style in TextStyle)


def test_hidden_traits_have_two_balanced_modes(world: World) -> None:
    assert world.hidden.shape == (1000, len(HIDDEN_TRAITS))
    assert ((np.abs(world.hidden) >= 0.5) & (np.abs(world.hidden) <= 1)).all()
    assert (np.abs((world.hidden > 0).mean(axis=0) - 0.5) < 0.06).all()


def test_hidden_traits_cannot_be_predicted_from_the_text(world: World) -> None:
    fields = (*NAMED, "year", "text_style", "guest")
    text = OneHotEncoder().fit_transform([[str(getattr(song, field)) for field in fields] for song in world.songs])
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert accuracy(text, values > 0) < 0.56, trait


def test_hidden_traits_are_independent_of_each_other_and_of_the_artist(world: World) -> None:
    nuisance = np.array([song.nuisance for song in world.songs])
    both = np.hstack([world.hidden, nuisance])
    assert np.abs(np.corrcoef(both.T) - np.eye(both.shape[1])).max() < 0.1
    artist = OneHotEncoder().fit_transform([[song.artist.name] for song in world.songs])
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert accuracy(artist, values > 0) < 0.56, trait


def test_no_trait_can_be_predicted_from_ids_names_or_row_order(world: World) -> None:
    features = np.hstack([opaque_features(world), np.linspace(0, 1, len(world.songs))[:, None] ** (1, 2, 3)])
    genre = np.array([song.genre for song in world.songs])
    mood = np.array([song.mood for song in world.songs])
    assert accuracy(features, genre) < 1 / len(GENRES) + 0.05
    assert accuracy(features, mood) < 1 / len(MOODS) + 0.05
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert accuracy(features, values > 0) < 0.56, trait


def opaque_features(world: World) -> np.ndarray:
    """Bytes of the id and letter counts of the names, float64 [songs, features]."""
    rows = []
    for song in world.songs:
        letters = f"{song.title} {song.album}".lower()
        rows.append(
            [
                *bytes.fromhex(song.song_id),
                len(song.title),
                *(letters.count(letter) for letter in "abdefghiklmnoprstuvz"),
            ]
        )
    return np.array(rows, dtype=float)


def accuracy(features: np.ndarray, labels: np.ndarray) -> float:
    """Cross-validated accuracy of a linear classifier."""
    model = make_pipeline(StandardScaler(with_mean=False), LogisticRegression(C=0.1, max_iter=500))
    return float(cross_val_score(model, features, labels, cv=4).mean())
