"""Decoding in processes of its own: the same numbers, and no upload that takes more than its process along."""

from __future__ import annotations

import functools
import io
import os
import re
import signal
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile

from htcl_ray.audio import decode, log_mel
from htcl_ray.audio.decode import Limits
from htcl_ray.audio.sandbox import Decoders
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError, StepError
from htcl_ray.schemas import Reason

pytestmark = pytest.mark.unit

RECIPE = AudioRecipe(clip_seconds=2.0)
LIMITS = {
    "cpu_seconds": 30.0,
    "memory_bytes": 600_000_000,
    "max_seconds": 9.0,
    "max_channels": 2,
    "max_sample_rate": 48_000,
}


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
    decoders = Decoders(
        AudioRecipe(clip_seconds=1_000.0), processes=1, seconds=60.0, **{**LIMITS, "max_seconds": 4_000.0}
    )
    yield decoders
    decoders.close()


LONG = encoded(np.zeros((48_000 * 500, 1), dtype=np.float32), 48_000, format="FLAC")


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.999, 2.0, 2.09, 2.11, 5.0, 9.0])
@pytest.mark.parametrize(("rate", "format"), [(16_000, "WAV"), (44_100, "FLAC"), (48_000, "OGG"), (44_100, "MP3")])
def test_a_file_of_any_length_gives_the_numbers_of_the_pipeline(
    shared: Decoders, seconds: float, rate: int, format: str
):
    data = encoded(noise(seconds, rate, 2), rate, format)
    found = shared.decode(data)
    expected = log_mel(decode(data, RECIPE), RECIPE.sample_rate, RECIPE)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_what_comes_after_the_first_clip_changes_nothing(shared: Decoders):
    samples = noise(5.0)
    found = shared.decode(encoded(samples, subtype="FLOAT"))
    np.testing.assert_array_equal(found, log_mel(samples[:32_000, 0], 16_000, RECIPE))
    np.testing.assert_array_equal(found, shared.decode(encoded(samples[:32_000], subtype="FLOAT")))


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
        b"RIFF"
        + struct.pack("<I", 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + head
        + b"data"
        + struct.pack("<I", claimed)
        + data
    )


def with_declared_frames(flac: bytes, frames: int) -> bytes:
    """The 36 bits of STREAMINFO that count samples."""
    info = bytearray(flac)
    info[21] = info[21] & 0xF0 | frames >> 32
    info[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(info)


@functools.cache
def costly(case: str) -> bytes:
    """A small file inside all other limits that takes long to decode."""
    if case == "many samples":  # 8 channels of 192 kHz for 10 minutes, of which a constant takes next to nothing
        file = io.BytesIO()
        with soundfile.SoundFile(file, "w", 192_000, 8, format="FLAC", subtype="PCM_16") as sound:
            for _ in range(600):
                sound.write(np.full((192_000, 8), 1_000, dtype=np.int16))
        assert len(file.getvalue()) < 1_000_000
        return file.getvalue()
    av = pytest.importorskip("av")
    if case == "a long header":  # of empty boxes, which FFmpeg reads within one call
        return b"\0\0\0\x18ftypM4A \0\0\0\0M4A mp42" + b"\0\0\0\x08free" * 1_000_000
    if case == "broken packets":  # ADTS headers that declare frames of 8 bytes
        return (b"\xff\xf1\x50\x80\x01\x1f\xfc" + b"\0") * 50_000
    file = io.BytesIO()
    with av.open(file, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=16_000, layout="mono")
        for number in range(100_000):
            packet = av.Packet(b"\1\1")
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 16_000)
            container.mux_one(packet)
    return file.getvalue()


class TestLimits:
    def test_a_header_that_declares_hours_is_refused_undecoded(self, shared: Decoders):
        data = with_declared_frames(encoded(noise(1), format="FLAC"), 100 * 3_600 * 16_000)
        with pytest.raises(AudioError, match="declares 360,000 s"):
            shared.decode(data)
        assert reason_of(shared, data) is Reason.TOO_LONG

    def test_nothing_is_decoded_behind_the_first_clip(self, shared: Decoders):
        """Neither two hours whose header leaves the length open, nor a file that is damaged there."""
        silence = with_declared_frames(encoded(np.zeros((2 * 3_600 * 16_000, 1), dtype=np.float32), format="FLAC"), 0)
        assert len(silence) < 500_000
        assert len(shared.decode(silence)) == RECIPE.max_frames
        broken = bytearray(encoded(noise(8), format="FLAC"))
        broken[len(broken) // 2 :] = bytes(len(broken) // 2)
        np.testing.assert_array_equal(shared.decode(bytes(broken)), shared.decode(encoded(noise(8), format="FLAC")))

    def test_a_header_that_declares_less_than_there_is_is_believed(self, shared: Decoders):
        data = with_declared_frames(encoded(np.zeros((20 * 16_000, 1), dtype=np.float32), format="FLAC"), 16_000)
        assert len(shared.decode(data)) == RECIPE.frames_of(1)  # libsndfile's reading

    def test_exactly_the_limit_passes(self, shared: Decoders):
        assert len(shared.decode(encoded(noise(9)))) == RECIPE.max_frames
        assert reason_of(shared, encoded(noise(9.01))) is Reason.TOO_LONG

    def test_channels_and_rates(self, shared: Decoders):
        assert reason_of(shared, encoded(noise(0.2, channels=3))) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, encoded(noise(0.2, 96_000), 96_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(48_001, 1, b"\0" * 20_000, 20_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(16_000, 1_000, b"\0" * 20_000, 20_000)) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, riff(16_000, 60_000, b"\0" * 20_000, 20_000)) in (
            Reason.TOO_MANY_CHANNELS,
            Reason.UNDECODABLE,
        )

    @pytest.mark.parametrize("case", ["many samples", "packets of one sample", "broken packets", "a long header"])
    def test_cpu_time_is_bounded_whatever_a_file_holds(self, case: str):
        """Its refusal costs no process. Without the bound, each of these files takes a multiple of it."""
        data = costly(case)
        recipe, wide = (
            AudioRecipe(),
            {**LIMITS, "max_seconds": 600.0, "max_channels": 8, "max_sample_rate": 192_000, "cpu_seconds": 0.2},
        )
        decoders = Decoders(recipe, processes=1, seconds=60.0, **wide)
        try:
            with pytest.raises(AudioError, match=r"decoding it took more than 0\.2 s of CPU time") as caught:
                decoders.decode(data)
            assert caught.value.reason is Reason.DECODER_TIMED_OUT
            assert len(decoders.decode(encoded(noise(5.0, 44_100, 2), 44_100, "MP3"))) == recipe.frames_of(5.0)
            assert decoders.restarts == 0
        finally:
            decoders.close()

    def test_ten_minutes_cost_what_their_first_clip_costs(self):
        """A twentieth of the CPU time that decoding all of it takes is enough."""
        limits = Limits(600.0, 8, 192_000, 0.2)
        np.testing.assert_array_equal(
            decode(costly("many samples"), RECIPE, limits), decode(costly("many samples"), RECIPE)
        )

    def test_the_same_limits_hold_for_ffmpeg(self):
        av = pytest.importorskip("av")

        def m4a(seconds: float, rate: int, layout: str) -> bytes:
            file = io.BytesIO()
            with av.open(file, "w", format="mp4") as container:
                stream = container.add_stream("aac", rate=rate, layout=layout)
                count = len(stream.layout.channels)
                frame = av.AudioFrame.from_ndarray(
                    np.zeros((count, round(seconds * rate)), dtype=np.float32), "fltp", layout
                )
                frame.rate = rate
                for packet in [*stream.encode(frame), *stream.encode(None)]:
                    container.mux(packet)
            return file.getvalue()

        limits = Limits(9.0, 2, 48_000, 30.0)
        music = m4a(3, 44_100, "stereo")
        np.testing.assert_array_equal(decode(music, RECIPE, limits), decode(music, RECIPE))
        for data, reason in (
            (m4a(10, 16_000, "mono"), Reason.TOO_LONG),
            (m4a(1, 96_000, "mono"), Reason.SAMPLE_RATE_TOO_HIGH),
            (m4a(1, 16_000, "5.1"), Reason.TOO_MANY_CHANNELS),
        ):
            with pytest.raises(AudioError) as caught:
                decode(data, RECIPE, limits)
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
        decoders = Decoders(
            AudioRecipe(clip_seconds=1_000.0), processes=1, seconds=0.05, **{**LIMITS, "max_seconds": 4_000.0}
        )
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
        assert len(patient.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)
        assert patient.restarts == 1

    def test_one_that_was_ended_between_files_costs_nobody_an_answer(self, patient: Decoders):
        (pid,) = patient.pids
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        assert len(patient.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)

    def test_one_that_does_not_answer_is_replaced_and_serves_the_next(self):
        decoders = Decoders(RECIPE, processes=1, seconds=0.5, **LIMITS)
        try:
            os.kill(decoders.pids[0], signal.SIGSTOP)
            assert reason_of(decoders, encoded(noise(0.2)) + bytes(1_000_000)) is Reason.DECODER_TIMED_OUT
            assert len(decoders.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)
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
            assert len(decoders.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)
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
            "import os; from htcl_ray.audio.sandbox import Decoders; from htcl_ray.config.sections import AudioRecipe\n"
            f"d = Decoders(AudioRecipe(clip_seconds=2.0), processes=1, seconds=30.0, **{LIMITS})\n"
            "print(d.pids[0], flush=True); os.kill(os.getpid(), 9)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
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
                found = shared.decode(mutated(rng, originals[number % len(originals)]))
                assert 1 <= len(found) <= RECIPE.max_frames
            except AudioError:
                pass

    some(100)
    before, ours = [resident(pid) for pid in shared.pids], resident()
    some(300)
    assert shared.restarts == 0
    assert max(resident(pid) - then for pid, then in zip(shared.pids, before, strict=True)) < 16_000_000
    assert resident() - ours < 48_000_000  # the heap of all tests before this one
