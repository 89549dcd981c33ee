"""The sample's audio: clean, deterministic, and with every trait present in the log-mel spectrogram."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import GroupKFold, cross_val_predict, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from htcl_ray.audio import log_mel
from htcl_ray.config import resolve
from htcl_ray.demo_world.score import compose
from htcl_ray.demo_world.synthesis import SAMPLE_RATE, _cycle, perform, produce, render
from htcl_ray.demo_world.world import (
    GENRES,
    HIDDEN_TRAITS,
    NUISANCE_TRAITS,
    SampleSong,
    World,
    make_world,
    random_stream,
)

pytestmark = pytest.mark.unit

RECIPE = resolve("demo").audio


@pytest.fixture(scope="module")
def world() -> World:
    return make_world(songs=240, artists=60, seed=0)


def recording(song: SampleSong, seconds: float = 6.0, take: int = 0) -> np.ndarray:
    return render(song, seconds, random_stream(0, "composition", song.work), random_stream(0, "take", take))


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


def skewness(levels: np.ndarray, steps: int) -> float:
    """Skewness of the change of a level curve in `steps` of 50 ms: negative for slow rises and fast falls."""
    smooth = np.convolve(levels, np.ones(steps) / steps, "valid")
    change = smooth[steps:] - smooth[:-steps]
    return float((change**3).mean() / (change**2).mean() ** 1.5)


def rate_of(levels: np.ndarray) -> float:
    """Centre, in Hz, of the power of a level curve between 0.45 and 1.65 Hz, around which the pulse is."""
    rates = np.linspace(0.45, 1.65, 25)
    window = np.hanning(len(levels))
    waves = np.exp(-2j * np.pi * rates[:, None] * 0.05 * np.arange(len(levels)))
    power = np.abs((waves * window * (levels - levels.mean())).sum(axis=1)) ** 2
    return float((rates * power).sum() / power.sum())


def tilt(waveform: np.ndarray) -> np.ndarray:
    """Level above 1.5 kHz relative to the level below 500 Hz in each 50 ms, in decibels."""
    return band_levels(waveform, 1500, 7000) - band_levels(waveform, 60, 500)


def level(waveform: np.ndarray) -> np.ndarray:
    """Level between 60 Hz and 4 kHz in each 50 ms, in decibels."""
    return band_levels(waveform, 60, 4000)


MEASURES: dict[str, tuple[Callable[[np.ndarray, np.ndarray], float], float]] = {
    "sweep": (lambda waveform, mix: -skewness(tilt(waveform) - tilt(mix), 8), 1.0),
    "rate": (lambda waveform, mix: rate_of(level(waveform) - level(mix)), 0.3),
    "shape": (lambda waveform, mix: skewness(level(waveform) - level(mix), 4), 1.0),
    "brightness": (lambda waveform, mix: high_level(waveform), 1.5),
    "presence": (lambda waveform, mix: middle_level(waveform), 1.5),
}
"""Acoustic measure of each trait in a recording and its mix without effects, and the least difference of its sides."""


Produced = Callable[[dict[str, float]], np.ndarray]
"""Traits → recording."""


def producers(world: World) -> Iterator[tuple[str, np.ndarray, Produced]]:
    """For one song of each genre, its genre, its mix of 12 s, and its recording as a function of the traits."""
    for song in one_of_each_genre(world):
        rng = random_stream(0, "test")
        mix = perform(song, compose(song, 12.0, rng), 12 * SAMPLE_RATE, rng)

        def produced(traits: dict[str, float], mix: np.ndarray = mix, rng: np.random.Generator = rng) -> np.ndarray:
            return produce(mix, traits, copy.deepcopy(rng))

        yield song.genre, mix, produced


def test_each_trait_is_audible_in_every_genre(world: World) -> None:
    """Recordings that differ in a single trait differ in the acoustic measure of that trait."""
    for genre, mix, produced in producers(world):
        neutral = dict.fromkeys(HIDDEN_TRAITS + NUISANCE_TRAITS, 0.0)
        for trait, (measure, least) in MEASURES.items():
            low, high = (measure(produced({**neutral, trait: side}), mix) for side in (-0.75, 0.75))
            assert high > low + least, (trait, genre, low, high)


@pytest.mark.parametrize("rising", [0.05, 0.3, 0.95])
def test_a_cycle_has_the_same_mean_and_deviation_whatever_its_shape_and_rate(rising: float) -> None:
    for hertz in (0.4, 1.3):
        curve = _cycle(5 * SAMPLE_RATE, hertz, rising, random_stream(0, "cycle"))
        assert curve.mean() == pytest.approx(0, abs=1e-5)
        assert curve.std() == pytest.approx(1, abs=1e-5)
        assert (np.diff(curve[::800]) > 0).mean() == pytest.approx(rising, abs=0.15 * hertz + 0.02)  # it is smoothed


def test_a_reversed_cycle_is_one_of_the_opposite_shape() -> None:
    up, down = (_cycle(8 * SAMPLE_RATE, 0.5, rising, random_stream(0, "cycle")) for rising in (0.9, 0.1))
    assert np.allclose(np.sort(up), np.sort(down), atol=0.05)
    lags = [np.corrcoef(up[::400][::-1][lag : lag + 240], down[::400][:240])[0, 1] for lag in range(80)]
    assert max(lags) > 0.98


@pytest.fixture(scope="module")
def spectrograms(world: World) -> list[np.ndarray]:
    return [log_mel(recording(song, 8.0, take=i), SAMPLE_RATE, RECIPE) for i, song in enumerate(world.songs)]


def test_named_traits_of_unknown_artists_can_be_predicted_from_the_spectrogram(
    world: World, spectrograms: list[np.ndarray]
) -> None:
    """Linear discriminant analysis with shrinkage, cross-validated over artists: accuracy on songs of other artists."""
    features = np.stack([summary(mel) for mel in spectrograms])
    artists = [song.artist.name for song in world.songs]

    def accuracy(labels: list[str]) -> float:
        probe = make_pipeline(StandardScaler(), LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"))
        return float(cross_val_score(probe, features, labels, groups=artists, cv=GroupKFold(5)).mean())

    assert accuracy([song.genre for song in world.songs]) > 0.75  # chance 0.125
    assert accuracy([song.mood for song in world.songs]) > 0.75  # chance 0.2
    assert accuracy([song.backing for song in world.songs]) > 0.5  # chance 0.2
    assert accuracy([song.lead for song in world.songs]) > 0.25  # chance 0.125


def test_hidden_traits_are_in_the_order_of_frames_and_not_in_the_statistics_of_bands(
    world: World, spectrograms: list[np.ndarray]
) -> None:
    """Ridge regression of each trait, by cross-validation over artists: the mean and the deviation of each band tell
    nothing, nor does the set of all frames; a few numbers made for the trait tell most."""
    bands = np.stack([np.r_[mel.mean(axis=0), mel.std(axis=0)] for mel in spectrograms])
    temporal = np.stack([temporal_summary(mel) for mel in spectrograms])
    shuffled = np.stack(
        [temporal_summary(random_stream(0, "shuffle", i).permutation(mel)) for i, mel in enumerate(spectrograms)]
    )
    artists = [song.artist.name for song in world.songs]
    for trait, values in zip(HIDDEN_TRAITS, world.hidden.T, strict=True):
        assert explained(bands, values, artists) < 0.05, trait
        assert explained(shuffled, values, artists) < 0.05, trait
        assert explained(temporal, values, artists) > 0.6, trait
    for trait, values in zip(NUISANCE_TRAITS, np.array([song.nuisance for song in world.songs]).T, strict=True):
        assert explained(bands, values, artists) > 0.5, trait


def explained(features: np.ndarray, values: np.ndarray, groups: list[str]) -> float:
    """Share of the variance that a cross-validated ridge regression explains; below 0 for less than the mean."""
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
    predicted = cross_val_predict(model, features, values, groups=groups, cv=GroupKFold(5))
    return float(1 - ((values - predicted) ** 2).mean() / values.var())


def temporal_summary(mel: np.ndarray) -> np.ndarray:
    """Features matched to the hidden traits: asymmetry of the course of level and tilt, and rates of the level."""
    low, high = mel[:, :28].astype(np.float64).mean(axis=1), mel[:, 40:].astype(np.float64).mean(axis=1)
    features = []
    for curve in (high - low, low):
        smooth = np.convolve(curve, np.ones(3) / 3, "valid")
        for lag in (1, 2, 4, 6):
            change = smooth[lag:] - smooth[:-lag]
            features.append((change**3).mean() / (change**2).mean() ** 1.5)
    power = np.abs(np.fft.rfft((low - low.mean()) * np.hanning(len(low)), n=1024)) ** 2
    rate = np.fft.rfftfreq(1024, RECIPE.hop_length / SAMPLE_RATE)
    edges = (0.3, 0.5, 0.65, 0.8, 1.0, 1.2, 1.4, 1.65)
    for start, stop in itertools.pairwise(edges):
        features.append(np.log(power[(rate >= start) & (rate < stop)].mean() + 1e-3))
    return np.array(features)


def summary(mel: np.ndarray) -> np.ndarray:
    """Statistics of a log-mel [frames, bands] for a linear classifier, after the models' normalisation of each clip."""
    z = (mel - mel.mean()) / mel.std()
    bands = z.reshape(len(z), 16, -1).mean(axis=2)
    change = np.abs(np.fft.rfft(bands - bands.mean(axis=0), n=80, axis=0))[1:41].reshape(40, 4, 4).mean(axis=2)
    return np.concatenate([z.mean(axis=0), z.std(axis=0), np.quantile(z, 0.1, axis=0), np.log(change + 0.1).ravel()])
