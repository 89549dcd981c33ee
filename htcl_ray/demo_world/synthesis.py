"""Render a song to a waveform with wavetable instruments, synthetic drums and studio effects."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy.fft

from htcl_ray.demo_world.score import GENRE_STYLES, MOOD_STYLES, Note, Score, compose
from htcl_ray.demo_world.world import HIDDEN_TRAITS, NUISANCE_TRAITS, SampleSong

SAMPLE_RATE = 16000
SWEEP_HERTZ = (0.42, 0.52)
SWEEP_DECIBELS = 8.0
"""Deviation of the gain above 700 Hz."""
PULSE_HERTZ = 0.95
PULSE_RATIO = 1.6
"""Rate of the pulse at the highest value of the trait / that at 0."""
PULSE_DECIBELS = 7.0
"""Deviation of the level."""
SKEW = 0.95
"""Difference of the rising and the falling share of a cycle at the highest value of a trait."""
BLUR_SAMPLES = SAMPLE_RATE * 64 // 1000
_TABLE = 4096
_TOP_HERTZ = 7600.0


@dataclass(frozen=True)
class Timbre:
    """An instrument: the spectrum of one period and how it changes over a note."""

    partials: tuple[float, ...]
    """Amplitudes of the first partials; `slope` determines the others."""
    slope: float
    """Partial k beyond the given ones has amplitude last · (last index / k) ** slope; 0 means no further partials."""
    attack: float
    """Seconds."""
    decay: float
    """Seconds to 1/e; infinite for a sustained note."""
    release: float = 0.06
    """Seconds."""
    dulling: float = 0.0
    """Additional decay of the upper partials, in units of 1 / `decay`."""
    vibrato: float = 0.0
    """Semitones."""
    breath: float = 0.0
    """Level of added noise."""
    octave: int = 0
    ratios: tuple[float, ...] = ()
    """Frequencies of inharmonic partials as multiples of the pitch, in steps of 0.25."""
    gain: float = 1.0


TIMBRES = {
    "flute": Timbre((1.0, 0.2, 0.03), 0, 0.06, np.inf, breath=0.2, octave=1, gain=1.1),
    "violin": Timbre((0.6, 1.0, 0.8, 0.9, 0.5, 0.55, 0.4), 1.0, 0.10, np.inf, vibrato=0.7, release=0.12, gain=0.65),
    "piano": Timbre((1.0, 0.6, 0.4, 0.25, 0.2, 0.1), 1.5, 0.004, 0.7, dulling=3.0, gain=1.3),
    "trumpet": Timbre((0.2, 0.5, 0.9, 1.0, 1.0, 0.9, 0.7, 0.5, 0.3), 0.6, 0.03, np.inf, gain=0.6),
    "vibraphone": Timbre(
        (1.0, 0.7, 0.5), 0, 0.003, 0.9, ratios=(1, 4, 9.75), octave=1, release=0.4, dulling=1.0, gain=1.3
    ),
    "organ": Timbre((0.8, 1.0, 0.0, 0.9, 0.0, 0.0, 0.0, 0.8), 0, 0.015, np.inf, octave=-1, gain=0.75),
    "guitar": Timbre((0.7, 1.0, 0.6, 0.15, 0.4, 0.3, 0.2, 0.15), 1.2, 0.003, 0.28, dulling=4.0, octave=-1, gain=1.4),
    "synthesizer": Timbre((1.0, 0.0, 0.7, 0.0, 0.6, 0.0, 0.5, 0.0, 0.4, 0.0, 0.35), 0.7, 0.005, np.inf, gain=0.5),
    "strings": Timbre((1.0, 0.7, 0.5, 0.4, 0.3), 1.2, 0.15, np.inf, release=0.2, vibrato=0.15, gain=0.42),
    "electric piano": Timbre((1.0, 0.12, 0.05, 0.0, 0.0, 0.0, 0.25), 0, 0.004, 0.8, dulling=5.0, gain=0.8),
    "choir": Timbre(
        (1.0, 0.9, 0.35, 0.05, 0.04, 0.1, 0.16, 0.1), 0, 0.12, np.inf, vibrato=0.3, breath=0.05, release=0.2, gain=0.42
    ),
    "harp": Timbre((1.0, 0.5, 0.15, 0.1, 0.05), 0, 0.003, 0.35, dulling=2.0, octave=1, gain=0.95),
    "accordion": Timbre((0.5, 1.0, 0.6, 0.8, 0.5, 0.7, 0.4, 0.5, 0.3), 0.8, 0.03, np.inf, gain=0.27),
    "glass": Timbre((1.0, 0.3, 0.0, 0.4), 0, 0.4, np.inf, release=0.5, vibrato=0.2, breath=0.3, gain=0.3),
    "stab": Timbre((1.0, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4), 1.0, 0.003, 0.12, gain=0.9),
    "distorted guitar": Timbre((1.0, 0.95, 0.9, 0.85, 0.8, 0.8, 0.75, 0.7), 0.5, 0.004, np.inf, breath=0.15, gain=0.7),
    "comping piano": Timbre((1.0, 0.35, 0.15), 0, 0.004, 0.25, gain=0.9),
    "muted guitar": Timbre((0.3, 0.5, 0.9, 1.0, 0.9, 0.5, 0.3), 0, 0.002, 0.06, gain=1.5),
    "banjo": Timbre((0.6, 0.9, 1.0, 0.8, 0.7, 0.6, 0.4, 0.3), 1.0, 0.002, 0.12, gain=1.1),
    "muffled keys": Timbre((1.0, 0.15), 0, 0.01, 0.5, vibrato=0.3, gain=1.0),
    "harpsichord": Timbre((0.5, 0.6, 0.8, 0.9, 1.0, 0.9, 0.8, 0.8, 0.7, 0.7), 0.8, 0.002, 0.2, gain=0.8),
    "whistle": Timbre((1.0,), 0, 0.02, np.inf, breath=0.05, vibrato=0.3, gain=0.7),
    "soft pad": Timbre((1.0, 0.2), 0, 0.8, np.inf, release=0.8, vibrato=0.3, gain=0.9),
    "growl": Timbre((1.0, 0.9, 0.8, 0.9, 0.6, 0.4, 0.2), 0, 0.2, np.inf, vibrato=0.6, gain=0.8),
    "sequencer": Timbre((1.0, 0.0, 0.6, 0.0, 0.4, 0.0, 0.3), 0, 0.002, 0.08, gain=1.0),
    "drone": Timbre((1.0, 0.5, 0.3, 0.2), 0, 0.5, np.inf, release=0.5, gain=0.5),
    "saw bass": Timbre((1.0, 0.5, 0.33, 0.25, 0.2, 0.16, 0.14, 0.12), 1.0, 0.005, 0.25, dulling=2.0, gain=0.9),
    "picked bass": Timbre((1.0, 0.7, 0.5, 0.3, 0.2, 0.1), 0, 0.004, 0.4, dulling=2.0, gain=0.8),
    "upright bass": Timbre((1.0, 0.5, 0.2, 0.05), 0, 0.01, 0.45, gain=0.9),
    "dub bass": Timbre((1.0, 0.25), 0, 0.012, 0.9, gain=1.3),
    "sub bass": Timbre((1.0, 0.08), 0, 0.005, 1.2, octave=-1, gain=1.6),
    "cello": Timbre((0.9, 1.0, 0.6, 0.4, 0.3, 0.2, 0.1), 0, 0.07, np.inf, vibrato=0.2, gain=0.5),
}


def render(song: SampleSong, seconds: float, composition: np.random.Generator, take: np.random.Generator) -> np.ndarray:
    """Render a recording of a song: float32 [samples] in (-1, 1) at SAMPLE_RATE, determined by the arguments.

    `composition` determines the score, `take` everything else.
    """
    samples = round(seconds * SAMPLE_RATE)
    mix = perform(song, compose(song, seconds, composition), samples, take)
    names, values = HIDDEN_TRAITS + NUISANCE_TRAITS, song.hidden + song.nuisance
    return produce(mix, dict(zip(names, values, strict=True)), take)


def perform(song: SampleSong, score: Score, samples: int, rng: np.random.Generator) -> np.ndarray:
    """Mix all parts without effects: float32 [samples]."""
    genre = GENRE_STYLES[song.genre]
    mix = np.zeros(samples, np.float32)
    for instrument, notes, gain in (
        (genre.bass_timbre, score.bass, 0.8),
        (genre.rhythm_timbre, score.rhythm, 0.75),
        (song.backing, score.backing, 0.6),
        (song.lead, score.melody, 1.6 * song.artist.lead_gain),
        (MOOD_STYLES[song.mood].colour_timbre, score.colour, 0.45),
    ):
        for note in notes:
            _add(mix, note.start, _tone(TIMBRES[instrument], instrument, note, rng), gain * note.velocity)
    for name, hits in score.drums.items():
        drum = _drum(genre.kit, name)
        for start, loudness in hits:
            _add(mix, start, drum, loudness)
    return mix


def produce(mix: np.ndarray, traits: dict[str, float], rng: np.random.Generator) -> np.ndarray:
    """Apply room, equaliser, sweep and pulse as the traits determine, then a soft limiter and short fades.

    `traits`: one value for each of HIDDEN_TRAITS and NUISANCE_TRAITS. Hidden traits change the course of two gains over
    time and neither their mean nor their deviation (`_cycle`): the gain of everything above 700 Hz (sweep), and the
    overall level (pulse).
    """
    samples = len(mix)
    size = scipy.fft.next_fast_len(samples + len(_room()), real=True)
    spectrum = scipy.fft.rfft(mix, size) * scipy.fft.rfft(_room(), size)
    octaves = np.log2(np.maximum(np.fft.rfftfreq(size, 1 / SAMPLE_RATE), 60) / 700).astype(np.float32)
    spectrum *= 10 ** (np.float32(2.2 / 20 * traits["brightness"]) * octaves)
    bell = np.exp(-2 * (octaves - np.float32(1.2)) ** 2)  # around 1600 Hz
    spectrum *= 10 ** (np.float32(8 / 20 * traits["presence"]) * bell)
    below = 1 / (1 + 2 ** (4 * octaves))  # 700 Hz, 24 dB per octave
    low, high = (scipy.fft.irfft(part, size)[:samples] for part in (spectrum * below, spectrum * (1 - below)))
    sweep = _cycle(samples, rng.uniform(*SWEEP_HERTZ), (1 + SKEW * traits["sweep"]) / 2, rng)
    mix = low + high * _gain(SWEEP_DECIBELS * sweep)
    hertz = rng.uniform(0.95, 1.05) * PULSE_HERTZ * PULSE_RATIO ** traits["rate"]
    mix *= _gain(PULSE_DECIBELS * _cycle(samples, hertz, (1 - SKEW * traits["shape"]) / 2, rng))
    mix = np.tanh(np.float32(0.4) * mix / (np.sqrt(np.mean(mix**2)) + np.float32(1e-9)))
    time = np.arange(samples, dtype=np.float32) / np.float32(SAMPLE_RATE)
    fade = np.minimum(1, np.minimum(time, time[::-1]) / np.float32(0.03))
    return np.asarray(np.float32(0.9) * mix * fade)


def _cycle(samples: int, hertz: float, rising: float, rng: np.random.Generator) -> np.ndarray:
    """A repeated rise and fall with a random phase, of mean 0 and deviation 1 in this clip: float32 [samples].

    `rising`: share of a cycle in which it rises, at constant speed. A cycle that rises for a share of 0.8 is one that
    rises for 0.2 with time reversed, so nothing that ignores the order of frames tells them apart. The curve is as
    smooth as a frame of the model's features, 128 ms, because a frame would blur fast changes and show a smaller
    deviation.
    """
    phase = (np.arange(-BLUR_SAMPLES, samples + BLUR_SAMPLES) * (hertz / SAMPLE_RATE) + rng.uniform()) % 1.0
    curve = np.cumsum(np.where(phase < rising, phase / rising, (1 - phase) / (1 - rising)))
    curve = (curve[2 * BLUR_SAMPLES :] - curve[: -2 * BLUR_SAMPLES]) / (2 * BLUR_SAMPLES)
    return np.asarray((curve - curve.mean()) / curve.std(), dtype=np.float32)


def _gain(decibels: np.ndarray) -> np.ndarray:
    return np.asarray(np.float32(10) ** (decibels / np.float32(20)))


def _add(mix: np.ndarray, start: float, samples: np.ndarray, gain: float) -> None:
    first = round(start * SAMPLE_RATE)
    if first < len(mix):
        part = mix[first : first + len(samples)]
        part += np.float32(gain) * samples[: len(part)]


@lru_cache(maxsize=1024)
def _tables(instrument: str, semitone: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Wavetables of lower and upper partials, and the number of periods in a table (4 for inharmonic partials)."""
    timbre = TIMBRES[instrument]
    hertz = _hertz(semitone)
    amplitudes = list(timbre.partials)
    count = int(_TOP_HERTZ / hertz)
    if timbre.slope:
        last = len(amplitudes)
        amplitudes += [amplitudes[-1] * (last / k) ** timbre.slope for k in range(last + 1, count + 1)]
    periods = 4 if timbre.ratios else 1
    ratios = np.array(timbre.ratios or range(1, len(amplitudes) + 1), dtype=float)
    spectra = np.zeros((2, _TABLE // 2 + 1), complex)
    for ratio, amplitude in zip(ratios, amplitudes, strict=True):
        if ratio * hertz < _TOP_HERTZ:
            upper = 1 - 1 / ratio
            phase = np.exp(2j * np.pi * 0.618 * ratio**2)  # spread phases avoid a sharp peak
            spectra[:, round(ratio * periods)] += amplitude * phase * np.array([1 - upper, upper])
    low, high = (np.fft.irfft(spectra, _TABLE) * _TABLE / 2).astype(np.float32)
    norm = np.float32(np.sqrt(np.mean((low + high) ** 2)) + 1e-9)
    return low / norm, high / norm, periods


def _hertz(pitch: float) -> float:
    return 440.0 * 2 ** ((pitch - 69) / 12)


def _tone(timbre: Timbre, instrument: str, note: Note, rng: np.random.Generator) -> np.ndarray:
    pitch = note.pitch + 12 * timbre.octave
    low, high, periods = _tables(instrument, round(pitch))
    held = max(note.length, timbre.attack + 0.02)
    time = np.arange(round((held + timbre.release) * SAMPLE_RATE), dtype=np.float32) / np.float32(SAMPLE_RATE)
    cycles = time * np.float32(_hertz(pitch) / periods)
    if timbre.vibrato:
        rate = 5.2
        depth = _hertz(pitch) / periods * (2 ** (timbre.vibrato / 12) - 1) / (2 * np.pi * rate)
        cycles += np.float32(depth) * np.sin(np.float32(2 * np.pi * rate) * time)
    place = (cycles * _TABLE).astype(np.int32) & (_TABLE - 1)
    envelope = np.minimum(1, time / np.float32(timbre.attack)) * np.clip(
        (held + timbre.release - time) / timbre.release, 0, 1
    )
    if np.isfinite(timbre.decay):
        envelope *= np.exp(-time / np.float32(timbre.decay))
    fading = np.exp(-time * np.float32(timbre.dulling / timbre.decay)) if timbre.dulling else np.float32(1)
    samples = low[place] + high[place] * fading
    if timbre.breath:
        samples += np.float32(timbre.breath) * rng.standard_normal(len(time), np.float32)
    return np.asarray(np.float32(0.3 * timbre.gain) * envelope * samples, dtype=np.float32)


@lru_cache(maxsize=64)
def _drum(kit: str, name: str) -> np.ndarray:
    """Synthesise one hit: float32 [samples]."""
    rng = np.random.default_rng([11, *name.encode()])

    def noise(length: float, decay: float, low: float, high: float) -> np.ndarray:
        """Decaying noise between two frequencies in Hz; length and decay in seconds."""
        count = round(length * SAMPLE_RATE)
        spectrum = np.fft.rfft(rng.standard_normal(count))
        frequency = np.fft.rfftfreq(count, 1 / SAMPLE_RATE)
        band = np.fft.irfft(spectrum / (1 + (low / (frequency + 1)) ** 4 + (frequency / high) ** 6), count)
        return np.asarray(band / np.std(band) * np.exp(-np.arange(count) / SAMPLE_RATE / decay))

    def thump(length: float, start: float, end: float, decay: float) -> np.ndarray:
        """Decaying sine that falls from one frequency to another, in Hz."""
        time = np.arange(round(length * SAMPLE_RATE)) / SAMPLE_RATE
        phase = 2 * np.pi * (end * time + (start - end) * 0.03 * (1 - np.exp(-time / 0.03)))
        return np.asarray(np.sin(phase) * np.exp(-time / decay))

    electronic = kit == "electronic"
    if name == "kick":
        hit = 1.1 * thump(0.35, 220, 48, 0.14) if electronic else 0.9 * thump(0.25, 150, 60, 0.08)
    elif name == "snare":
        hit = 0.28 * noise(0.25, 0.07, 900, 7000)
        hit[: round(0.15 * SAMPLE_RATE)] += 0.4 * thump(0.15, 240, 185, 0.05)
    else:
        level, length, decay, low, high = {
            "clap": (0.33, 0.22, 0.06, 1100, 3500),
            "open_hat": (0.16, 0.25, 0.09, 5000, 9000),
            "hat": (0.12, 0.08, 0.025, 5500, 9000),
            "ride": (0.10, 0.5, 0.25, 3500, 6000),
            "brush": (0.14, 0.25, 0.10, 1500, 6000),
            "foot_hat": (0.07, 0.06, 0.02, 4000, 9000),
            "rim": (0.30, 0.06, 0.015, 1500, 2500),
            "crash": (0.14, 0.3, 0.15, 3000, 9000),
            "wind": (0.05, 4.0, 3.0, 300, 900),
            "tambourine": (0.16, 0.18, 0.06, 5000, 9000),
        }[name]
        hit = level * noise(length, decay, low, high)
    return hit.astype(np.float32)


@lru_cache(maxsize=1)
def _room() -> np.ndarray:
    """Impulse response of a small room, shared by all songs: float32 [samples]."""
    time = np.arange(round(0.5 * SAMPLE_RATE), dtype=np.float32) / SAMPLE_RATE
    tail = np.random.default_rng(5).standard_normal(len(time), np.float32) * np.exp(np.float32(-6.9 / 0.45) * time)
    tail *= np.float32(0.35) / np.sqrt(np.sum(tail**2))
    tail[0] += 1
    return tail
