"""The sample's audio: clean, deterministic, and with every trait present in the log-mel spectrogram."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from htcl_ray.audio import log_mel
from htcl_ray.config import resolve
from htcl_ray.demo_world.score import compose
from htcl_ray.demo_world.synthesis import SAMPLE_RATE, perform, produce, render
from htcl_ray.demo_world.world import GENRES, HIDDEN_TRAITS, SampleSong, World, make_world, random_stream

pytestmark = pytest.mark.unit

RECIPE = resolve("demo").audio


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(songs=240, artists=60, seed=0)


def recording(song: SampleSong, seconds: float = 6.0, take: int = 0) -> np.ndarray:
    return render(song, seconds, random_stream(0, "test", take))


def one_of_each_genre(world: World) -> list[SampleSong]:
    return [next(song for song in world.songs if song.genre == genre) for genre in GENRES]


def test_a_recording_is_clean_and_deterministic(world: World) -> None:
    for song in one_of_each_genre(world):
        waveform = recording(song, 3.0)
        assert waveform.dtype == np.float32
        assert waveform.shape == (3 * SAMPLE_RATE,)
        assert np.isfinite(waveform).all()
        assert 0.3 < np.abs(waveform).max() < 1
        assert 0.05 < waveform.std() < 0.4
        assert max(abs(waveform[0]), abs(waveform[-1])) < 1e-3  # faded
        assert np.array_equal(waveform, recording(song, 3.0))
        assert not np.array_equal(waveform, recording(song, 3.0, take=1))


def test_every_part_has_notes_in_the_whole_clip(world: World) -> None:
    for song in one_of_each_genre(world):
        score = compose(song, 8.0, random_stream(0, "test"))
        for part in (score.bass, score.rhythm, score.backing, score.melody, score.colour):
            starts = [note.start for note in part]
            assert part
            assert min(starts) < 4
            assert max(starts) >= 4
            assert all(20 < note.pitch < 110 and note.length > 0 and 0 < note.velocity < 1.5 for note in part)


def high_level(waveform: np.ndarray) -> float:
    """Level above 700 Hz relative to the level below, in decibels."""
    power = np.abs(np.fft.rfft(waveform)) ** 2
    split = round(700 * len(waveform) / SAMPLE_RATE)
    return 10 * np.log10(power[split:].sum() / power[:split].sum())


def band_levels(waveform: np.ndarray, low: float, high: float) -> np.ndarray:
    """Level between two frequencies in each 50 ms, in decibels."""
    spectrum = np.fft.rfft(waveform)
    frequency = np.fft.rfftfreq(len(waveform), 1 / SAMPLE_RATE)
    band = np.fft.irfft(np.where((frequency >= low) & (frequency < high), spectrum, 0), len(waveform))
    frames = band[: len(band) // 800 * 800].reshape(-1, 800)
    return 10 * np.log10((frames**2).mean(axis=1) + 1e-12)


def middle_level(waveform: np.ndarray) -> float:
    """Level around 1,600 Hz relative to the bands below and above it, in decibels."""
    middle, below, above = (
        band_levels(waveform, low, high).mean() for low, high in ((1200, 2100), (300, 600), (4000, 7000))
    )
    return float(middle - (below + above) / 2)


def swing_at(levels: np.ndarray, low: float, high: float) -> float:
    """Strongest periodic change of a level curve between two rates in Hz, in decibels."""
    window = np.hanning(len(levels))
    rate = np.linspace(low, high, 9)
    time = 0.05 * np.arange(len(levels))
    waves = np.exp(-2j * np.pi * rate[:, None] * time)
    return float(4 * np.abs((waves * window * (levels - levels.mean())).sum(axis=1)).max() / window.sum())


MEASURES: dict[str, Callable[[np.ndarray], float]] = {
    "brightness": high_level,
    "sweep": lambda waveform: swing_at(band_levels(waveform, 1500, 7000) - band_levels(waveform, 60, 500), 0.33, 0.42),
    "pulse": lambda waveform: swing_at(band_levels(waveform, 60, 4000), 1.1, 1.5),
    "presence": middle_level,
}


def producers(world: World) -> Iterator[tuple[str, Callable[[dict[str, float]], np.ndarray]]]:
    """For one song of each genre, its genre, and its recording of 12 s as a function of the hidden traits."""
    for song in one_of_each_genre(world):
        rng = random_stream(0, "test")
        mix = perform(song, compose(song, 12.0, rng), 12 * SAMPLE_RATE, rng)

        def produced(hidden: dict[str, float], mix: np.ndarray = mix, rng: np.random.Generator = rng) -> np.ndarray:
            return produce(mix, hidden, copy.deepcopy(rng))

        yield song.genre, produced


def test_each_hidden_trait_is_audible_in_every_genre(world: World) -> None:
    """Recordings that differ in a single trait differ in the acoustic measure of the trait by more than 1.5 dB."""
    for genre, produced in producers(world):
        without = dict.fromkeys(HIDDEN_TRAITS, -0.75)
        baseline = produced(without)
        for trait, measure in MEASURES.items():
            low, high = measure(baseline), measure(produced({**without, trait: 0.75}))
            assert high > low + 1.5, (trait, genre, low, high)


def test_traits_of_unknown_artists_can_be_predicted_from_the_spectrogram(world: World) -> None:
    features = np.stack(
        [summary(log_mel(recording(song, 4.0, take=i), SAMPLE_RATE, RECIPE)) for i, song in enumerate(world.songs)]
    )
    known = np.array([world.artists.index(song.artist) // len(GENRES) % 4 != 0 for song in world.songs])

    def accuracy(labels: list[str] | np.ndarray) -> float:
        labels = np.array(labels)
        probe = make_pipeline(
            StandardScaler(), PCA(100, random_state=0), StandardScaler(), LogisticRegression(C=0.02, max_iter=500)
        )
        return float(probe.fit(features[known], labels[known]).score(features[~known], labels[~known]))

    assert accuracy([song.genre for song in world.songs]) > 0.75  # chance 0.125
    assert accuracy([song.mood for song in world.songs]) > 0.75  # chance 0.2
    assert accuracy([song.backing for song in world.songs]) > 0.5  # chance 0.2
    assert accuracy([song.lead for song in world.songs]) > 0.25  # chance 0.125
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert accuracy(values > 0) > 0.7, trait  # chance 0.5


def summary(mel: np.ndarray) -> np.ndarray:
    """Statistics of a log-mel [frames, bands] for a linear classifier, after the models' normalisation of each clip."""
    z = (mel - mel.mean()) / mel.std()
    bands = z.reshape(len(z), 16, -1).mean(axis=2)
    change = np.abs(np.fft.rfft(bands - bands.mean(axis=0), n=80, axis=0))[1:41].reshape(40, 4, 4).mean(axis=2)
    return np.concatenate([z.mean(axis=0), z.std(axis=0), np.quantile(z, 0.1, axis=0), np.log(change + 0.1).ravel()])
