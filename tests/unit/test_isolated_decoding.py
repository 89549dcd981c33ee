"""Decoding in processes of its own: the same numbers, and no upload that takes more than its process along."""

from __future__ import annotations

import io
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htcl_ray.audio import decode, log_mel
from htcl_ray.audio.isolated import Decoders
from htcl_ray.audio.worker import log_mels
from htcl_ray.errors import AudioError, StepError
from htcl_ray.schemas import Reason
from htcl_ray.settings import AudioRecipe

pytestmark = pytest.mark.unit

RECIPE = AudioRecipe(clip_seconds=2.0)
LIMITS = {"memory_bytes": 600_000_000, "max_seconds": 9.0, "max_channels": 2, "max_sample_rate": 48_000}


def noise(seconds: float, rate: int = 16_000, channels: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, (round(seconds * rate), channels)).astype(np.float32)


def encoded(samples: np.ndarray, rate: int = 16_000, format: str = "WAV", subtype: str | None = None) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=format, subtype=subtype)
    return file.getvalue()


def resident(pid: int | str = "self") -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def reason_of(decoders: Decoders, data: bytes) -> Reason:
    with pytest.raises(AudioError) as caught:
        decoders.decode(data)
    return caught.value.reason


@pytest.fixture(scope="module")
def shared() -> Iterator[Decoders]:
    os.environ["HTCL_API_KEYS"] = "secret"
    decoders = Decoders(RECIPE, processes=2, seconds=30.0, **LIMITS)
    del os.environ["HTCL_API_KEYS"]
    yield decoders
    decoders.close()


@pytest.fixture
def patient() -> Iterator[Decoders]:
    """One process and a long sound, so that there is time to interfere."""
    decoders = Decoders(AudioRecipe(clip_seconds=1_000.0), processes=1, seconds=60.0, **{**LIMITS, "max_seconds": 4_000.0})
    yield decoders
    decoders.close()


LONG = encoded(np.zeros((48_000 * 500, 1), dtype=np.float32), 48_000, format="FLAC")


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.999, 2.0])
@pytest.mark.parametrize(("rate", "format"), [(16_000, "WAV"), (44_100, "FLAC"), (48_000, "OGG"), (44_100, "MP3")])
def test_a_sound_within_a_clip_gives_the_numbers_of_the_pipeline(shared: Decoders, seconds: float, rate: int, format: str):
    data = encoded(noise(seconds, rate, 2), rate, format)
    (found,) = shared.decode(data)
    expected = log_mel(decode(data, RECIPE), RECIPE.sample_rate, RECIPE)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_a_longer_sound_is_heard_whole_in_windows(shared: Decoders):
    samples = noise(5.0)
    found = shared.decode(encoded(samples, subtype="FLOAT"))
    starts = [0, 24_000, 48_000]  # three windows of 2 s over 5 s
    assert len(found) == 3
    for window, start in zip(found, starts, strict=True):
        np.testing.assert_array_equal(window, log_mel(samples[start : start + 32_000, 0], 16_000, RECIPE))


def test_a_rest_too_short_to_be_a_sound_makes_no_window(shared: Decoders):
    assert len(shared.decode(encoded(noise(2.09)))) == 1
    assert len(shared.decode(encoded(noise(2.11)))) == 2


def test_reasons_are_those_of_the_pipeline(shared: Decoders):
    for data in (
        b"",
        b"text",
        b"\0" * 4_096,
        encoded(noise(0.05)),
        encoded(noise(1))[:50],
        encoded(np.full((16_000, 1), np.nan), subtype="FLOAT"),
    ):
        with pytest.raises(AudioError) as expected:
            decode(data, RECIPE)
        with pytest.raises(AudioError) as found:
            shared.decode(data)
        assert (found.value.reason, found.value.detail) == (expected.value.reason, expected.value.detail)


def riff(rate: int, channels: int, data: bytes, claimed: int) -> bytes:
    head = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2 % 2**32, channels * 2 % 2**16, 16)
    return (
        b"RIFF" + struct.pack("<I", 0xFFFFFFFF) + b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + struct.pack("<I", claimed) + data
    )


def with_declared_frames(flac: bytes, frames: int) -> bytes:
    """The 36 bits of STREAMINFO that count samples."""
    info = bytearray(flac)
    info[21] = info[21] & 0xF0 | frames >> 32
    info[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(info)


class TestLimits:
    def test_a_header_that_declares_hours_is_refused_undecoded(self, shared: Decoders):
        data = with_declared_frames(encoded(noise(1), format="FLAC"), 100 * 3_600 * 16_000)
        with pytest.raises(AudioError, match="declares 360,000 s"):
            shared.decode(data)
        assert reason_of(shared, data) is Reason.TOO_LONG

    def test_a_header_that_leaves_the_length_open_is_refused_at_the_limit(self, shared: Decoders):
        data = with_declared_frames(encoded(np.zeros((2 * 3_600 * 16_000, 1), dtype=np.float32), format="FLAC"), 0)
        assert len(data) < 500_000
        started = time.monotonic()
        with pytest.raises(AudioError, match="holds more than 9 s"):
            shared.decode(data)
        assert time.monotonic() - started < 1

    def test_a_header_that_declares_a_second_is_heard_no_longer_than_the_limit(self, shared: Decoders):
        data = with_declared_frames(encoded(np.zeros((20 * 16_000, 1), dtype=np.float32), format="FLAC"), 16_000)
        assert len(shared.decode(data)) == 1  # libsndfile believes it

    def test_an_mp3_has_no_declared_length_to_trust(self, shared: Decoders):
        """Cut behind its Xing header, so that nothing tells how long it is."""
        data = encoded(noise(20), format="MP3")
        assert reason_of(shared, data[data.index(data[:2], 2_000) :]) is Reason.TOO_LONG

    def test_exactly_the_limit_passes(self, shared: Decoders):
        assert len(shared.decode(encoded(noise(9)))) == 5
        assert reason_of(shared, encoded(noise(9.01))) is Reason.TOO_LONG

    def test_channels_and_rates(self, shared: Decoders):
        assert reason_of(shared, encoded(noise(0.2, channels=3))) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, encoded(noise(0.2, 96_000), 96_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(48_001, 1, b"\0" * 20_000, 20_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(16_000, 1_000, b"\0" * 20_000, 20_000)) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, riff(16_000, 60_000, b"\0" * 20_000, 20_000)) in (Reason.TOO_MANY_CHANNELS, Reason.UNDECODABLE)

    def test_the_same_limits_hold_for_ffmpeg(self):
        av = pytest.importorskip("av")
        from htcl_ray.audio.decode import Limits

        def m4a(seconds: float, rate: int, layout: str) -> bytes:
            file = io.BytesIO()
            with av.open(file, "w", format="mp4") as container:
                stream = container.add_stream("aac", rate=rate, layout=layout)
                count = len(stream.layout.channels)
                frame = av.AudioFrame.from_ndarray(np.zeros((count, round(seconds * rate)), dtype=np.float32), "fltp", layout)
                frame.rate = rate
                for packet in [*stream.encode(frame), *stream.encode(None)]:
                    container.mux(packet)
            return file.getvalue()

        limits = Limits(9.0, 2, 48_000)
        assert len(log_mels(m4a(3, 44_100, "stereo"), RECIPE, limits)) == 2
        for data, reason in (
            (m4a(10, 16_000, "mono"), Reason.TOO_LONG),
            (m4a(1, 96_000, "mono"), Reason.SAMPLE_RATE_TOO_HIGH),
            (m4a(1, 16_000, "5.1"), Reason.TOO_MANY_CHANNELS),
        ):
            with pytest.raises(AudioError) as caught:
                log_mels(data, RECIPE, limits)
            assert caught.value.reason is reason


class TestProcesses:
    def test_are_kept_from_file_to_file(self, shared: Decoders):
        before = shared.pids
        assert len(before) == 2
        for _ in range(20):
            shared.decode(encoded(noise(0.2)))
        assert (shared.pids, shared.restarts) == (before, 0)

    def test_know_no_secret_and_hold_no_file_of_the_parent(self, shared: Decoders):
        for pid in shared.pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"PYTHONPATH" in environment
            assert b"secret" not in environment
            links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert all(link == "/dev/null" or link.startswith("pipe:") for link in links), links

    def test_cannot_open_files_nor_write_them_nor_grow(self, shared: Decoders):
        for pid in shared.pids:
            limits = Path(f"/proc/{pid}/limits").read_text()
            for name in ("Max open files", "Max file size", "Max core file size"):
                assert re.search(rf"^{name} +0 +0 ", limits, re.M), limits
            size = int(re.search(r"^Max address space +(\d+) ", limits, re.M)[1])  # type: ignore[index]
            assert 600_000_000 < size < 4_000_000_000
            assert re.search(r"^Max cpu time +\d+ ", limits, re.M)

    def test_a_file_that_takes_too_long_is_ended_with_its_process(self):
        decoders = Decoders(AudioRecipe(clip_seconds=1_000.0), processes=1, seconds=0.05, **{**LIMITS, "max_seconds": 4_000.0})
        try:
            before, started = decoders.pids, time.monotonic()
            assert reason_of(decoders, LONG) is Reason.DECODER_TIMED_OUT
            assert time.monotonic() - started < 3
            assert (len(decoders.pids), decoders.restarts) == (1, 1)
            assert decoders.pids != before
            assert not Path(f"/proc/{before[0]}").exists()
        finally:
            decoders.close()

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
    def test_a_file_that_ends_its_process_fails_alone(self, patient: Decoders, number: signal.Signals):
        (pid,) = patient.pids
        threading.Timer(0.3, os.kill, (pid, number)).start()
        assert reason_of(patient, LONG) is Reason.DECODER_CRASHED
        assert len(patient.decode(encoded(noise(0.2)))) == 1
        assert patient.restarts == 1

    def test_one_that_was_ended_between_files_costs_nobody_an_answer(self, patient: Decoders):
        (pid,) = patient.pids
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert len(patient.decode(encoded(noise(0.2)))) == 1

    def test_one_that_does_not_answer_is_replaced_and_serves_the_next(self):
        decoders = Decoders(RECIPE, processes=1, seconds=0.5, **LIMITS)
        try:
            os.kill(decoders.pids[0], signal.SIGSTOP)
            assert reason_of(decoders, encoded(noise(0.2)) + bytes(1_000_000)) is Reason.DECODER_TIMED_OUT
            assert len(decoders.decode(encoded(noise(0.2)))) == 1
        finally:
            decoders.close()

    def test_who_comes_first_is_served_first(self, patient: Decoders):
        order: list[int] = []

        def ask(number: int) -> None:
            patient.decode(LONG if number == 0 else encoded(noise(0.2)))
            order.append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
            time.sleep(0.02)
        for thread in threads:
            thread.join()
        assert order == list(range(8))

    def test_waiting_ends_too(self):
        decoders = Decoders(RECIPE, processes=1, seconds=0.5, **LIMITS)
        try:
            os.kill(decoders.pids[0], signal.SIGSTOP)
            with ThreadPoolExecutor(3) as threads:
                answers = [threads.submit(decoders.decode, encoded(noise(0.2))) for _ in range(3)]
                kinds = sorted(type(answer.exception()).__name__ for answer in answers)
            assert kinds[0] == "AudioError"
            assert "TimeoutError" in kinds
            assert len(decoders.decode(encoded(noise(0.2)))) == 1
        finally:
            decoders.close()

    def test_closing_ends_them_and_whoever_waits(self, patient: Decoders):
        (pid,) = patient.pids
        with ThreadPoolExecutor(3) as threads:
            answers = [threads.submit(patient.decode, LONG) for _ in range(3)]
            time.sleep(0.2)
            patient.close()
            assert {type(answer.exception()) for answer in answers} <= {AudioError, StepError}
        assert not Path(f"/proc/{pid}").exists()
        assert patient.pids == []
        with pytest.raises(StepError, match="closed"):
            patient.decode(b"")

    def test_end_with_their_parent(self, tmp_path: Path):
        import subprocess
        import sys

        code = (
            "import os; from htcl_ray.audio.isolated import Decoders; from htcl_ray.settings import AudioRecipe\n"
            f"d = Decoders(AudioRecipe(clip_seconds=2.0), processes=1, seconds=30.0, **{LIMITS})\n"
            "print(d.pids[0], flush=True); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        )
        pid = int(done.stdout)
        for _ in range(50):
            if not Path(f"/proc/{pid}").exists() or "State:\tZ" in Path(f"/proc/{pid}/status").read_text():
                return
            time.sleep(0.1)
        pytest.fail(f"decoding process {pid} outlived its parent")

    def test_what_cannot_start_says_so(self):
        with pytest.raises(StepError, match="does not start"):
            Decoders(RECIPE, processes=1, seconds=1.0, **{**LIMITS, "memory_bytes": "none"})  # type: ignore[arg-type]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        damaged[rng.integers(0, min(len(damaged), 10 ** rng.integers(2, 6)))] = rng.integers(256)
    return bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)])


def test_memory_stays_flat_over_damaged_files(shared: Decoders):
    originals = [encoded(noise(3, 44_100, 2), 44_100, format) for format in ("WAV", "FLAC", "OGG", "MP3", "AIFF")]
    rng = np.random.default_rng(0)

    def some(count: int) -> None:
        for number in range(count):
            try:
                windows = shared.decode(mutated(rng, originals[number % len(originals)]))
                assert 1 <= len(windows) <= 5
            except AudioError:
                pass

    some(100)
    before = [resident(), *map(resident, shared.pids)]
    some(300)
    after = [resident(), *map(resident, shared.pids)]
    assert shared.restarts == 0
    assert max(now - then for now, then in zip(after, before, strict=True)) < 16_000_000
