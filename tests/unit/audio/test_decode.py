"""Decoding of untrusted audio files."""

from __future__ import annotations

import importlib
import io
import os
import struct
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import soxr

from htcl_ray.audio import check_audible, decode, decode_clip
from htcl_ray.audio.readers import AudioStream
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError
from htcl_ray.schemas import Reason

pytestmark = pytest.mark.unit

RECIPE = AudioRecipe(clip_seconds=3.0)


def tone(seconds: float, rate: int, hertz: float = 440.0, channels: int = 1) -> np.ndarray:
    """A sine, [samples, channels]; each channel is 10 % quieter than the previous one."""
    wave = 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
    return np.stack([wave * 0.9**channel for channel in range(channels)], axis=1).astype(np.float32)


def encoded(samples: np.ndarray, rate: int, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def float_wav(samples: np.ndarray, rate: int = 16000) -> bytes:
    return encoded(samples.astype(np.float32), rate, subtype="FLOAT")


def reason_of(source: object, recipe: AudioRecipe = RECIPE) -> Reason:
    with pytest.raises(AudioError) as caught:
        decode(source, recipe)  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000, 192000])
@pytest.mark.parametrize("channels", [1, 2, 8])
def test_decode_equals_reading_averaging_and_resampling_at_once(rate: int, channels: int) -> None:
    samples = tone(1.7, rate, channels=channels)
    expected = samples.mean(axis=1)
    if rate != 16000:
        expected = soxr.resample(expected, rate, 16000, "HQ")
    decoded = decode(float_wav(samples, rate), RECIPE)
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, expected, atol=1e-6)


def test_decode_uses_only_the_first_seconds() -> None:
    samples = np.concatenate([tone(3.0, 44100), np.ones((44100, 1), np.float32)])
    decoded = decode(float_wav(samples, 44100), RECIPE)
    assert decoded.size == RECIPE.max_samples
    assert np.abs(decoded).max() < 0.6


@pytest.mark.parametrize(
    ("format", "subtype"),
    [("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("AIFF", None), ("AU", None)],
)
def test_decode_reads_formats_of_libsndfile(format: str, subtype: str | None) -> None:
    samples = tone(1.0, 48000)
    decoded = decode(encoded(samples, 48000, format, subtype), RECIPE)
    assert decoded.size == pytest.approx(16000, rel=0.1)  # lossy codecs add some at the edges
    middle = decoded[4000:12000]
    assert np.sqrt(np.mean(middle**2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.02)
    assert np.argmax(np.abs(np.fft.rfft(middle))) == 220  # bins of 2 Hz


def test_decode_gives_the_same_for_every_kind_of_source(tmp_path: Path) -> None:
    data = encoded(tone(0.5, 16000), 16000)
    path = tmp_path / "ünï çødé 名.wav"
    path.write_bytes(data)
    expected = decode(data, RECIPE)
    file = io.BytesIO(data)
    file.seek(100)  # decode starts at the beginning of the file anyway
    for source in (path, str(path), f"file://{path}", file):
        np.testing.assert_array_equal(decode(source, RECIPE), expected)
    assert not file.closed


def test_isolated_samples_that_are_not_finite_become_zero() -> None:
    samples = tone(1.0, 16000)
    samples[[10, 20, 30, 40]] = np.array([np.nan, np.inf, -np.inf, 1e30])[:, None]
    decoded = decode(float_wav(samples), RECIPE)
    assert np.all(decoded[[10, 20, 30, 40]] == 0)
    untouched = np.setdiff1d(np.arange(16000), [10, 20, 30, 40])
    np.testing.assert_array_equal(decoded[untouched], samples[untouched, 0])


def test_audio_without_a_finite_sample_is_rejected() -> None:
    assert reason_of(float_wav(np.full((8000, 2), np.nan))) is Reason.NOT_FINITE


def test_min_seconds_is_the_shortest_accepted_length() -> None:
    assert reason_of(encoded(tone(0.0999, 16000), 16000)) is Reason.TOO_SHORT
    assert decode(encoded(tone(0.1, 16000), 16000), RECIPE).size == 1600
    assert reason_of(encoded(tone(0.0, 16000), 16000)) is Reason.TOO_SHORT


def test_missing_and_empty_files_have_a_reason(tmp_path: Path) -> None:
    assert reason_of(tmp_path / "missing.wav") is Reason.AUDIO_NOT_FOUND
    assert reason_of(tmp_path) is Reason.AUDIO_NOT_FOUND
    assert reason_of("nowhere://bucket/x.wav") is Reason.UNSUPPORTED_URI
    assert reason_of("bad\0name") is Reason.AUDIO_NOT_FOUND
    os.mkfifo(tmp_path / "pipe.wav")
    assert reason_of(tmp_path / "pipe.wav") is Reason.AUDIO_NOT_FOUND  # without waiting for a writer
    empty = tmp_path / "empty.wav"
    empty.touch()
    assert reason_of(empty) is Reason.AUDIO_EMPTY
    assert reason_of(b"") is Reason.AUDIO_EMPTY


@pytest.mark.parametrize(
    "data", [b"<html>not found</html>", bytes(4096), b"version https://git-lfs.github.com/spec/v1\n", b"RIFF"]
)
def test_files_without_audio_are_undecodable(data: bytes, tmp_path: Path) -> None:
    assert reason_of(data) is Reason.UNDECODABLE
    for name in ("x.mp3", "x.raw", "x.wav"):
        (tmp_path / name).write_bytes(data)
        assert reason_of(tmp_path / name) is Reason.UNDECODABLE


def riff(rate: int, channels: int, data: bytes, claimed: int) -> bytes:
    head = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, 0, 2 * channels & 0xFFFF, 16)
    return b"RIFF" + struct.pack("<I", claimed) + b"WAVE" + head + b"data" + struct.pack("<I", claimed) + data


def test_false_header_values_are_not_trusted() -> None:
    quarter = (tone(0.25, 16000)[:, 0] * 32767).astype("<i2").tobytes()
    for claimed in (0xFFFFFFFF, 0x7FFFFFFF, 10**9):
        assert decode(riff(16000, 1, quarter, claimed), RECIPE).size == 4000
    for rate in (0, 1, 999, 768_001, 2**31 - 1):  # 2³¹ Hz for three seconds would be 24 GB
        assert reason_of(riff(rate, 1, quarter, len(quarter))) is Reason.UNDECODABLE
    assert reason_of(riff(16000, 0, quarter, len(quarter))) is Reason.UNDECODABLE
    assert reason_of(riff(16000, 0xFFFF, quarter, len(quarter))) in (Reason.UNDECODABLE, Reason.TOO_SHORT)


def test_a_clip_is_never_longer_than_max_samples() -> None:
    recipe = AudioRecipe(clip_seconds=0.33333)  # 334 whole frames of 1 ms would be 5344 samples
    assert decode(float_wav(tone(1, 1000), 1000), recipe).size == recipe.max_samples


def test_a_truncated_file_keeps_its_audio() -> None:
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (5 * 48000, 1)).astype(np.float32)
    whole = encoded(noise, 48000, "FLAC", "PCM_16")
    recipe = AudioRecipe(clip_seconds=10)
    cut = decode(whole[: len(whole) // 2], recipe)
    assert 16000 < cut.size < 48000
    np.testing.assert_allclose(cut[:16000], decode(whole, recipe)[:16000], atol=1e-6)


def break_off_after(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace libsndfile's reader by one that yields a tone of this length and then fails."""

    def read_sndfile(file: object) -> AudioStream:
        def blocks() -> Iterator[np.ndarray]:
            yield tone(seconds, 16000)
            raise RuntimeError("bad frame")

        return AudioStream(16000, 1, None, blocks())

    module = importlib.import_module("htcl_ray.audio.decode")  # the package exports a function of that name
    monkeypatch.setattr(module, "read_sndfile", read_sndfile)


@pytest.mark.parametrize(("seconds", "kept"), [(0.05, False), (0.5, True)])
def test_audio_before_an_error_is_kept_if_long_enough(
    seconds: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_off_after(seconds, monkeypatch)
    if kept:
        np.testing.assert_array_equal(decode(b"RIFF", RECIPE), tone(seconds, 16000)[:, 0])
    else:
        with pytest.raises(AudioError, match="libsndfile: bad frame") as caught:
            decode(b"RIFF", RECIPE)
        assert caught.value.reason is Reason.UNDECODABLE


def m4a(samples: np.ndarray, rate: int, layout: str) -> bytes:
    av = pytest.importorskip("av")
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout=layout)
        for start in range(0, len(samples) - 1023, 1024):
            frame = av.AudioFrame.from_ndarray(
                samples[start : start + 1024].reshape(1, -1), format="flt", layout=layout
            )
            frame.sample_rate, frame.pts = rate, start
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return file.getvalue()


@pytest.mark.parametrize(("layout", "channels"), [("mono", 1), ("stereo", 2), ("7.1", 8)])
def test_decode_reads_formats_of_ffmpeg(layout: str, channels: int) -> None:
    samples = np.repeat(tone(1.5, 44100), channels, axis=1)
    if channels == 8:
        samples[:, 3] = 0  # AAC keeps only the lowest tones of the bass channel
    decoded = decode(m4a(samples, 44100, layout), RECIPE)
    assert decoded.size == pytest.approx(1.5 * 16000, abs=0.1 * 16000)
    expected = 0.5 / np.sqrt(2) * samples.any(axis=0).mean()
    assert np.sqrt(np.mean(decoded[4000:16000] ** 2)) == pytest.approx(expected, rel=0.05)


def test_a_missing_decoder_is_reported_with_the_package_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    file = m4a(tone(0.5, 44100), 44100, "mono")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(AudioError, match=r"MP4/M4A needs FFmpeg: pip install 'htcl-ray\[ffmpeg\]'") as caught:
        decode(file, RECIPE)
    assert caught.value.reason is Reason.DECODER_MISSING
    assert reason_of(b"fLaC" + bytes(100)) is Reason.UNDECODABLE  # libsndfile reads FLAC


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "secret.wav").write_bytes(encoded(tone(1, 16000), 16000))
    for text in (
        f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret.wav\n",
        f"ffconcat version 1.0\nfile '{tmp_path}/secret.wav'\n",
    ):
        assert reason_of(text.encode()) is Reason.UNDECODABLE


def test_damaged_files_give_valid_audio_or_an_audio_error() -> None:
    random = np.random.default_rng(0)
    samples = tone(0.6, 22050, channels=2)
    files = [
        encoded(samples, 22050, *kind)
        for kind in (("WAV", None), ("FLAC", None), ("OGG", "VORBIS"), ("MP3", None), ("AIFF", None))
    ]
    files.append(m4a(samples, 22050, "stereo"))
    outcomes = {True: 0, False: 0}
    for trial in range(300):
        data = bytearray(files[trial % len(files)])
        for _ in range(random.integers(1, 15)):
            data[random.integers(min(len(data), 200 if trial % 2 else len(data)))] = random.integers(256)
        if trial % 5 == 0:
            data = data[: random.integers(1, len(data))]
        try:
            decoded = decode(bytes(data), RECIPE)
            assert decoded.dtype == np.float32
            assert np.isfinite(decoded).all()
            assert 0 < decoded.size <= RECIPE.max_samples
            outcomes[True] += 1
        except AudioError:
            outcomes[False] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_decode_equals_the_wave_module(tmp_path: Path) -> None:
    path = tmp_path / "x.wav"
    path.write_bytes(encoded(tone(0.3, 16000), 16000, subtype="PCM_16"))
    with wave.open(str(path)) as file:
        expected = np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32768
    np.testing.assert_allclose(decode(path, RECIPE), expected, atol=1e-7)


def music(seconds: float, rate: int = 44100) -> np.ndarray:
    return np.random.default_rng(1).uniform(-0.5, 0.5, round(seconds * rate)).astype(np.float32) * np.float32(0.8)


class TestDecodedShare:
    """The share of the declared audio that a damaged file still gives."""

    @pytest.mark.parametrize(
        ("format", "subtype", "exact"),
        [
            ("WAV", None, True),
            ("AIFF", None, True),
            ("FLAC", None, True),
            ("MP3", None, True),
            ("OGG", "VORBIS", False),
            ("OGG", "OPUS", False),
        ],
    )
    def test_truncated_files(self, format: str, subtype: str | None, exact: bool) -> None:
        rate = 48000 if subtype == "OPUS" else 44100
        whole = encoded(music(6, rate)[:, None], rate, format, subtype)
        long = AudioRecipe(clip_seconds=10)
        assert decode_clip(whole, long).decoded_share == 1
        cut = decode_clip(whole[: len(whole) // 2], long)
        seconds = cut.waveform.size / 16000
        assert 1 < seconds < 4
        # An Ogg file does not declare its length, so the share is relative to the clip.
        assert cut.decoded_share == pytest.approx(seconds / (6 if exact else 10), abs=0.01)
        assert decode_clip(whole[: len(whole) // 2], AudioRecipe(clip_seconds=1)).decoded_share == 1, (
            "the clip is shorter than the remaining audio"
        )

    def test_aac_with_a_damaged_middle(self) -> None:
        pytest.importorskip("av")
        whole = m4a(np.repeat(music(6)[:, None], 2, axis=1), 44100, "stereo")
        assert decode_clip(whole, AudioRecipe(clip_seconds=10)).decoded_share == 1
        start = whole.index(b"mdat")
        damaged = bytearray(whole)
        middle = start + 4 + (len(whole) - start) // 3
        damaged[middle : middle + 20_000] = bytes(20_000)
        clip = decode_clip(bytes(damaged), AudioRecipe(clip_seconds=10))
        assert clip.decoded_share < 1
        assert clip.decoded_share == pytest.approx(clip.waveform.size / 16000 / 6, abs=0.05)

    def test_lost_packets_of_a_stream_without_a_length(self) -> None:
        av = pytest.importorskip("av")
        file = io.BytesIO()
        with av.open(file, "w", format="adts") as container:
            stream = container.add_stream("aac", rate=44100, layout="mono")
            frame = av.AudioFrame.from_ndarray(music(6)[None], format="fltp", layout="mono")
            frame.sample_rate = 44100
            for packet in [*stream.encode(frame), *stream.encode(None)]:
                container.mux(packet)
        whole = file.getvalue()
        long = AudioRecipe(clip_seconds=10)
        assert decode_clip(whole, long).decoded_share == 1
        damaged, frames, at = bytearray(whole), 0, 0
        while at < len(whole):  # keep the header of each ADTS frame
            length = (whole[at + 3] & 3) << 11 | whole[at + 4] << 3 | whole[at + 5] >> 5
            if 60 <= frames < 140:
                damaged[at + 7 : at + length] = bytes(length - 7)
            at, frames = at + length, frames + 1
        clip = decode_clip(bytes(damaged), long)
        assert clip.waveform.size < 5.9 * 16000
        assert clip.decoded_share == pytest.approx(clip.waveform.size / 16000 / 6, abs=0.05)

    def test_an_error_in_a_file_without_a_length(self, monkeypatch: pytest.MonkeyPatch) -> None:
        break_off_after(1.5, monkeypatch)
        assert decode_clip(b"RIFF", RECIPE).decoded_share == pytest.approx(1.5 / 3)

    def test_lengths_left_open_by_programs_that_write_to_a_pipe(self) -> None:
        data = (tone(0.5, 16000)[:, 0] * 32767).astype("<i2").tobytes()
        for claimed in (0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000):
            assert decode_clip(riff(16000, 1, data, claimed), RECIPE).decoded_share == 1
        assert decode_clip(riff(16000, 1, data, 2 * len(data)), RECIPE).decoded_share == pytest.approx(0.5, abs=0.01)


class TestSilence:
    @pytest.mark.parametrize("rate", [16000, 44100])
    @pytest.mark.parametrize(
        "samples",
        {
            "digital": lambda n: np.zeros(n),
            "constant": lambda n: np.full(n, 0.25),
            "dither": lambda n: np.random.default_rng(0).integers(-2, 3, n) / 32768,
        }.items(),
        ids=lambda item: item[0] if isinstance(item, tuple) else str(item),
    )
    def test_silent_clips_are_rejected(self, samples: Any, rate: int) -> None:
        clip = decode(float_wav(samples[1](2 * rate)[:, None], rate), RECIPE)
        with pytest.raises(AudioError, match="are silent") as caught:
            check_audible(clip, RECIPE)
        assert caught.value.reason is Reason.SILENT

    def test_channels_that_cancel_are_silent(self) -> None:
        side = tone(1, 16000)
        with pytest.raises(AudioError, match="every sample is equal"):
            check_audible(decode(float_wav(np.hstack([side, -side])), RECIPE), RECIPE)

    @pytest.mark.parametrize("peak", [0.001, 0.01, 1.0])
    def test_quiet_music_is_audible(self, peak: float) -> None:
        check_audible(decode(float_wav(tone(0.1, 16000) * 2 * peak), RECIPE), RECIPE)
        late = np.concatenate([np.zeros((40_000, 1)), tone(0.2, 16000) * peak])
        check_audible(decode(float_wav(late), RECIPE), RECIPE)
