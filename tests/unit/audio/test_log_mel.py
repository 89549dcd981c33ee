"""Log-mel spectrograms, compared with librosa."""

from __future__ import annotations

import librosa
import numpy as np
import pytest

from htcl_ray.audio import log_mel
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError, InputError
from htcl_ray.schemas import Reason

pytestmark = pytest.mark.unit

RECIPES = [
    AudioRecipe(),
    AudioRecipe(sample_rate=22050, n_fft=1024, hop_length=256, n_mels=64, f_min=30.0, f_max=8000.0, top_db=60.0),
    AudioRecipe(sample_rate=8000, n_fft=512, hop_length=512, n_mels=40),
]


def music_like(samples: int, sample_rate: int, seed: int = 0) -> np.ndarray:
    """Decaying partials with noise, so that quiet and loud cells occur."""
    random = np.random.default_rng(seed)
    t = np.arange(samples) / sample_rate
    tone = sum(0.2 / k * np.sin(2 * np.pi * 110 * k * t) for k in range(1, 6))
    return (tone * np.exp(-0.3 * t) + 1e-3 * random.standard_normal(samples)).astype(np.float32)


def librosa_log_mel(waveform: np.ndarray, recipe: AudioRecipe) -> np.ndarray:
    power = librosa.feature.melspectrogram(
        y=waveform,
        sr=recipe.sample_rate,
        n_fft=recipe.n_fft,
        hop_length=recipe.hop_length,
        n_mels=recipe.n_mels,
        fmin=recipe.f_min,
        fmax=recipe.f_max,
        power=2.0,
        pad_mode="constant",
    )
    return librosa.power_to_db(power, ref=1.0, amin=1e-10, top_db=recipe.top_db).T


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("seconds", [0.3, 1.0, 7.3])
def test_log_mel_equals_librosa(recipe: AudioRecipe, seconds: float) -> None:
    waveform = music_like(int(seconds * recipe.sample_rate), recipe.sample_rate)
    mel = log_mel(waveform, recipe.sample_rate, recipe)
    assert mel.dtype == np.float32
    assert mel.shape == (1 + waveform.size // recipe.hop_length, recipe.n_mels)
    np.testing.assert_allclose(mel, librosa_log_mel(waveform, recipe), atol=1e-3)  # dB


def test_a_full_clip_has_the_published_number_of_frames() -> None:
    recipe = AudioRecipe()
    assert log_mel(np.zeros(recipe.max_samples), 16000, recipe).shape == (1251, 128)
    assert recipe.max_frames == 1251


def test_silence_has_the_smallest_power() -> None:
    np.testing.assert_allclose(log_mel(np.zeros(16000), 16000, AudioRecipe()), -100.0, atol=1e-4)


def test_values_span_at_most_top_db() -> None:
    mel = log_mel(music_like(16000, 16000), 16000, AudioRecipe(top_db=30))
    assert mel.max() - mel.min() == pytest.approx(30, abs=1e-4)


def test_channels_are_averaged_before_resampling() -> None:
    recipe = AudioRecipe()
    left, right = music_like(44100, 44100, seed=1), music_like(44100, 44100, seed=2)
    stereo = log_mel(np.stack([left, right]), 44100, recipe)
    np.testing.assert_array_equal(stereo, log_mel((left + right) / 2, 44100, recipe))
    np.testing.assert_allclose(log_mel(np.stack([left, -left]), 44100, recipe), -100.0, atol=1e-4)  # they cancel


def test_resampling_keeps_frequencies() -> None:
    recipe = AudioRecipe()
    tone = {rate: 0.5 * np.sin(2 * np.pi * 1000 * np.arange(2 * rate) / rate) for rate in (16000, 44100)}
    middle = slice(2, -3)
    native, resampled = (log_mel(tone[rate], rate, recipe)[middle] for rate in (16000, 44100))
    loud = native > native.max() - 40
    np.testing.assert_allclose(resampled[loud], native[loud], atol=0.05)


@pytest.mark.parametrize("wrong", [np.zeros(100, np.int16), np.zeros((1, 2, 3)), np.float32(1.0)])
def test_log_mel_rejects_other_types_and_shapes(wrong: np.ndarray) -> None:
    with pytest.raises(InputError, match="expected floats"):
        log_mel(wrong, 16000, AudioRecipe())


def test_log_mel_rejects_nan() -> None:
    with pytest.raises(AudioError) as caught:
        log_mel(np.array([0.0, np.nan]), 16000, AudioRecipe())
    assert caught.value.reason is Reason.NOT_FINITE
