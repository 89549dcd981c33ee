"""The sample's sound: playable, deterministic, and saying what it should to anyone who looks at its log-mel
spectrogram."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from htcl_ray.audio import log_mel
from htcl_ray.config import resolve
from htcl_ray.demo_world.score import compose
from htcl_ray.demo_world.synthesis import SAMPLE_RATE, render
from htcl_ray.demo_world.world import GENRES, HIDDEN_TRAITS, SampleSong, World, make_world, random_stream

pytestmark = pytest.mark.unit

RECIPE = resolve("demo").audio


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(songs=320, artists=80, seed=0)


def play(song: SampleSong, seconds: float = 6.0, take: int = 0) -> np.ndarray:
    return render(song, seconds, random_stream(0, "test", take))


def one_of_each_genre(world: World) -> list[SampleSong]:
    return [next(song for song in world.songs if song.genre == genre) for genre in GENRES]


def test_a_recording_is_clean_and_repeatable(world: World) -> None:
    for song in one_of_each_genre(world):
        sound = play(song)
        assert sound.dtype == np.float32
        assert sound.shape == (6 * SAMPLE_RATE,)
        assert np.isfinite(sound).all()
        assert 0.3 < np.abs(sound).max() < 1
        assert 0.05 < sound.std() < 0.4
        assert max(abs(sound[0]), abs(sound[-1])) < 1e-3  # faded
        assert np.array_equal(sound, play(song))
        assert not np.array_equal(sound, play(song, take=1))


def test_every_part_plays_throughout(world: World) -> None:
    for song in one_of_each_genre(world):
        score = compose(song, 8.0, random_stream(0, "test"))
        for part in (score.bass, score.rhythm, score.backing, score.melody, score.colour):
            starts = [note.start for note in part]
            assert part
            assert min(starts) < 4
            assert max(starts) >= 4
            assert all(20 < note.pitch < 110 and note.length > 0 and 0 < note.velocity < 1.5 for note in part)


def high_share(sound: np.ndarray) -> float:
    """Decibels above 700 Hz over those below."""
    power = np.abs(np.fft.rfft(sound)) ** 2
    split = round(700 * len(sound) / SAMPLE_RATE)
    return 10 * np.log10(power[split:].sum() / power[:split].sum())


def band_levels(sound: np.ndarray, low: float, high: float) -> np.ndarray:
    """Level between two frequencies in every 50 ms, in decibels."""
    spectrum = np.fft.rfft(sound)
    frequency = np.fft.rfftfreq(len(sound), 1 / SAMPLE_RATE)
    band = np.fft.irfft(np.where((frequency >= low) & (frequency < high), spectrum, 0), len(sound))
    frames = band[: len(band) // 800 * 800].reshape(-1, 800)
    return 10 * np.log10((frames**2).mean(axis=1) + 1e-12)


def middle_share(sound: np.ndarray) -> float:
    """Level around 1,600 Hz against the bands below and above it, in decibels."""
    middle, below, above = (
        band_levels(sound, low, high).mean() for low, high in ((1200, 2100), (300, 600), (4000, 7000))
    )
    return float(middle - (below + above) / 2)


def swing_at(levels: np.ndarray, low: float, high: float) -> float:
    """Strongest periodic change of a level curve between two rates in Hz, in decibels."""
    window = np.hanning(len(levels))
    rate = np.linspace(low, high, 9)
    time = 0.05 * np.arange(len(levels))
    waves = np.exp(-2j * np.pi * rate[:, None] * time)
    return float(4 * np.abs((waves * window * (levels - levels.mean())).sum(axis=1)).max() / window.sum())


MEASURES = {
    "brightness": high_share,
    "sweep": lambda sound: swing_at(band_levels(sound, 1500, 7000) - band_levels(sound, 60, 500), 0.33, 0.42),
    "pulse": lambda sound: swing_at(band_levels(sound, 60, 4000), 1.1, 1.5),
    "presence": middle_share,
}


@pytest.mark.parametrize("trait", HIDDEN_TRAITS)
def test_a_hidden_trait_is_heard_in_every_genre(world: World, trait: str) -> None:
    """The same performance with only this trait turned differs in the trait's own acoustic measure, by decibels."""
    measure, position = MEASURES[trait], HIDDEN_TRAITS.index(trait)
    for song in one_of_each_genre(world):
        sides = [
            replace(song, hidden=tuple(side * 0.75 if i == position else -0.75 for i in range(len(HIDDEN_TRAITS))))
            for side in (-1, 1)
        ]
        without, with_it = (measure(play(side, seconds=12.0)) for side in sides)
        assert with_it > without + 1.5, (song.genre, without, with_it)


def test_named_and_hidden_traits_can_be_read_from_the_spectrogram_of_unknown_artists(world: World) -> None:
    features = np.stack(
        [summary(log_mel(play(song, take=i), SAMPLE_RATE, RECIPE)) for i, song in enumerate(world.songs)]
    )
    known = np.array([world.artists.index(song.artist) // len(GENRES) % 4 != 0 for song in world.songs])

    def read(labels: list[str] | np.ndarray) -> float:
        labels = np.array(labels)
        probe = make_pipeline(
            StandardScaler(), PCA(100, random_state=0), StandardScaler(), LogisticRegression(C=0.02, max_iter=500)
        )
        return float(probe.fit(features[known], labels[known]).score(features[~known], labels[~known]))

    assert read([song.genre for song in world.songs]) > 0.75  # chance 0.125
    assert read([song.mood for song in world.songs]) > 0.75  # chance 0.2
    assert read([song.backing for song in world.songs]) > 0.5  # chance 0.2
    assert read([song.lead for song in world.songs]) > 0.25  # chance 0.125
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert read(values > 0) > 0.7, trait  # chance 0.5


def summary(mel: np.ndarray) -> np.ndarray:
    """Statistics of a log-mel [frames, bands] that a linear classifier can use, after the per-clip normalisation that
    models do."""
    z = (mel - mel.mean()) / mel.std()
    bands = z.reshape(len(z), 16, -1).mean(axis=2)
    change = np.abs(np.fft.rfft(bands - bands.mean(axis=0), n=80, axis=0))[1:41].reshape(40, 4, 4).mean(axis=2)
    return np.concatenate([z.mean(axis=0), z.std(axis=0), np.quantile(z, 0.1, axis=0), np.log(change + 0.1).ravel()])
