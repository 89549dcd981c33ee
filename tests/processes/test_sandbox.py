"""Sandboxed decoders: equal results, enforced limits, and recovery from crashes and hangs."""

from __future__ import annotations

import functools
import io
import itertools
import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from fractions import Fraction
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import soundfile

from htcl_ray.audio import decode, log_mel
from htcl_ray.audio.decode import Limits
from htcl_ray.audio.sandbox import Decoders
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError, StepError
from htcl_ray.schemas import Reason

pytestmark = pytest.mark.processes

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


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the state was not reached"
        time.sleep(0.005)


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


@pytest.fixture(scope="module")
def single() -> Iterator[Decoders]:
    """One process, which tests stop or kill."""
    decoders = Decoders(RECIPE, processes=1, seconds=60.0, **LIMITS)
    yield decoders
    decoders.close()


@pytest.fixture(scope="module")
def impatient() -> Iterator[Decoders]:
    """One process with a short limit of wall-clock time."""
    decoders = Decoders(RECIPE, processes=1, seconds=1.0, **LIMITS)
    yield decoders
    decoders.close()


@pytest.fixture(scope="module")
def bounded() -> Iterator[Decoders]:
    """One process with a short limit of CPU time and wide limits otherwise."""
    wide = {**LIMITS, "max_seconds": 600.0, "max_channels": 8, "max_sample_rate": 192_000, "cpu_seconds": 0.2}
    decoders = Decoders(AudioRecipe(), processes=1, seconds=60.0, **wide)
    yield decoders
    decoders.close()


def request_all(decoders: Decoders, files: list[bytes]) -> tuple[ThreadPoolExecutor, list[Future[np.ndarray]]]:
    """Stop the only process and decode files in threads: one of the first two is in flight, the others wait."""
    (pid,) = decoders.pids
    os.kill(pid, signal.SIGSTOP)
    threads, requests = ThreadPoolExecutor(len(files)), list[Future[np.ndarray]]()
    for data in files:
        requests.append(threads.submit(decoders.decode, data))
        wait_until(lambda: decoders.waiting == max(0, len(requests) - 1))
    return threads, requests


class NumberedFile(bytes):
    """A file that records its number when it is sent to a process: `send` calls `len` once."""

    sent: ClassVar[list[int]] = []
    number = 0

    def __len__(self) -> int:
        self.sent.append(self.number)
        return super().__len__()


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.999, 2.0, 2.09, 2.11, 5.0, 9.0])
@pytest.mark.parametrize(("rate", "format"), [(16_000, "WAV"), (44_100, "FLAC"), (48_000, "OGG"), (44_100, "MP3")])
def test_decode_equals_decoding_in_this_process(shared: Decoders, seconds: float, rate: int, format: str):
    data = encoded(noise(seconds, rate, 2), rate, format)
    mel = shared.decode(data)
    expected = log_mel(decode(data, RECIPE), RECIPE.sample_rate, RECIPE)
    assert mel.dtype == np.float32
    np.testing.assert_array_equal(mel, expected)


def test_a_pretrained_encoder_gets_the_waveform():
    """At the sample rate of the encoder; the encoder itself runs in another process."""
    recipe = RECIPE.model_copy(update={"extractor": "pretrained", "sample_rate": 24_000})
    decoders = Decoders(recipe, processes=1, seconds=60.0, **LIMITS)
    try:
        for seconds in (0.5, 9.0):
            data = encoded(noise(seconds, 44_100, 2), 44_100, "FLAC")
            np.testing.assert_array_equal(decoders.decode(data)[:, 0], decode(data, recipe))
    finally:
        decoders.close()


def test_audio_after_the_first_clip_is_ignored(shared: Decoders):
    samples = noise(5.0)
    mel = shared.decode(encoded(samples, subtype="FLOAT"))
    np.testing.assert_array_equal(mel, log_mel(samples[:32_000, 0], 16_000, RECIPE))
    np.testing.assert_array_equal(mel, shared.decode(encoded(samples[:32_000], subtype="FLOAT")))


def test_reasons_equal_those_of_decoding_in_this_process(shared: Decoders):
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
        with pytest.raises(AudioError) as actual:
            shared.decode(data)
        assert (actual.value.reason, actual.value.detail) == (expected.value.reason, expected.value.detail)


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
    """Replace the number of samples (36 bits) in STREAMINFO."""
    info = bytearray(flac)
    info[21] = info[21] & 0xF0 | frames >> 32
    info[22:26] = struct.pack(">I", frames & 0xFFFFFFFF)
    return bytes(info)


@functools.cache
def costly(case: str) -> bytes:
    """A small file within all other limits that takes long to decode."""
    if case == "many samples":  # 2 minutes of 8 channels at 192 kHz; constant samples compress to almost nothing
        file = io.BytesIO()
        second = np.full((192_000, 8), 1_000, dtype=np.int16)
        with soundfile.SoundFile(file, "w", 192_000, 8, format="FLAC", subtype="PCM_16") as writer:
            for _ in range(120):
                writer.write(second)
        assert len(file.getvalue()) < 1_000_000
        return file.getvalue()
    av = pytest.importorskip("av")
    if case == "a long header":  # empty boxes, which FFmpeg reads within one call
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
    def test_a_header_that_declares_hours_is_rejected_without_decoding(self, shared: Decoders):
        data = with_declared_frames(encoded(noise(1), format="FLAC"), 100 * 3_600 * 16_000)
        with pytest.raises(AudioError, match="declares 360,000 s"):
            shared.decode(data)
        assert reason_of(shared, data) is Reason.TOO_LONG

    def test_nothing_after_the_first_clip_is_decoded(self, shared: Decoders):
        """Neither twenty minutes of audio without a declared length, nor a damaged second half."""
        silence = with_declared_frames(encoded(np.zeros((1_200 * 16_000, 1), dtype=np.float32), format="FLAC"), 0)
        assert len(silence) < 100_000
        assert len(shared.decode(silence)) == RECIPE.max_frames
        broken = bytearray(encoded(noise(8), format="FLAC"))
        broken[len(broken) // 2 :] = bytes(len(broken) // 2)
        np.testing.assert_array_equal(shared.decode(bytes(broken)), shared.decode(encoded(noise(8), format="FLAC")))

    def test_a_header_that_declares_less_than_the_audio_limits_the_clip(self, shared: Decoders):
        data = with_declared_frames(encoded(np.zeros((20 * 16_000, 1), dtype=np.float32), format="FLAC"), 16_000)
        assert len(shared.decode(data)) == RECIPE.frames_of(1)  # as libsndfile reads it

    def test_max_seconds_is_inclusive(self, shared: Decoders):
        assert len(shared.decode(encoded(noise(9)))) == RECIPE.max_frames
        assert reason_of(shared, encoded(noise(9.01))) is Reason.TOO_LONG

    def test_channels_and_sample_rates_are_limited(self, shared: Decoders):
        assert reason_of(shared, encoded(noise(0.2, channels=3))) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, encoded(noise(0.2, 96_000), 96_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(48_001, 1, b"\0" * 20_000, 20_000)) is Reason.SAMPLE_RATE_TOO_HIGH
        assert reason_of(shared, riff(16_000, 1_000, b"\0" * 20_000, 20_000)) is Reason.TOO_MANY_CHANNELS
        assert reason_of(shared, riff(16_000, 60_000, b"\0" * 20_000, 20_000)) in (
            Reason.TOO_MANY_CHANNELS,
            Reason.UNDECODABLE,
        )

    @pytest.mark.parametrize("case", ["many samples", "packets of one sample", "broken packets", "a long header"])
    def test_cpu_time_is_limited_for_any_content(self, bounded: Decoders, case: str):
        """The file is rejected without losing the process. Decoding it without limits takes several times as long."""
        with pytest.raises(AudioError, match=r"decoding it took more than 0\.2 s of CPU time") as caught:
            bounded.decode(costly(case))
        assert caught.value.reason is Reason.DECODER_TIMED_OUT
        mel = bounded.decode(encoded(noise(5.0, 44_100, 2), 44_100, "MP3"))
        assert len(mel) == AudioRecipe().frames_of(5.0)
        assert bounded.restarts == 0

    def test_a_long_file_costs_no_more_than_its_first_clip(self):
        """An eighth of the CPU time for the whole file is enough."""
        limits = Limits(600.0, 8, 192_000, 0.1)
        np.testing.assert_array_equal(
            decode(costly("many samples"), RECIPE, limits), decode(costly("many samples"), RECIPE)
        )

    def test_limits_hold_for_ffmpeg(self):
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
    def test_are_reused_for_many_files(self, shared: Decoders):
        before = shared.pids
        assert len(before) == 2
        for _ in range(20):
            shared.decode(encoded(noise(0.2)))
        assert (shared.pids, shared.restarts) == (before, 0)

    def test_inherit_no_secrets_and_no_open_files(self, shared: Decoders):
        for pid in shared.pids:
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"PYTHONPATH" in environment
            assert b"secret" not in environment
            links = {os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir()}
            assert all(link == "/dev/null" or link.startswith("pipe:") for link in links), links

    def test_have_limits_of_files_memory_and_cpu_time(self, shared: Decoders):
        for pid in shared.pids:
            limits = Path(f"/proc/{pid}/limits").read_text()
            for name in ("Max open files", "Max file size", "Max core file size"):
                assert re.search(rf"^{name} +0 +0 ", limits, re.MULTILINE), limits
            size = int(re.search(r"^Max address space +(\d+) ", limits, re.MULTILINE)[1])  # type: ignore[index]
            assert 600_000_000 < size < 4_000_000_000
            assert re.search(r"^Max cpu time +\d+ ", limits, re.MULTILINE)

    @pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
    def test_a_crash_fails_only_the_file_that_is_decoded(self, single: Decoders, number: signal.Signals):
        (pid,), before = single.pids, single.restarts
        threads, requests = request_all(single, [encoded(noise(0.2))] * 2)
        os.kill(pid, number)
        os.kill(pid, signal.SIGCONT)
        threads.shutdown()
        (error,) = [request.exception() for request in requests if request.exception()]
        assert isinstance(error, AudioError)
        assert error.reason is Reason.DECODER_CRASHED
        (mel,) = [request.result() for request in requests if not request.exception()]
        assert len(mel) == RECIPE.frames_of(0.2)
        assert single.restarts == before + 1

    def test_a_process_that_ended_between_files_is_replaced(self, single: Decoders):
        (pid,) = single.pids
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert len(single.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)

    def test_waiting_callers_are_served_first_come_first_served(self, single: Decoders):
        (pid,) = single.pids
        files = [NumberedFile(encoded(noise(0.2))) for _ in range(8)]
        for number, file in enumerate(files):
            file.number = number
        NumberedFile.sent.clear()
        threads, requests = request_all(single, files)
        os.kill(pid, signal.SIGCONT)
        threads.shutdown()
        assert all(len(request.result()) == RECIPE.frames_of(0.2) for request in requests)
        assert sorted(NumberedFile.sent[:2]) == [0, 1]
        assert NumberedFile.sent[2:] == list(range(2, 8))

    @pytest.mark.parametrize("padding", [0, 1_000_000], ids=["receiving", "sending"])
    def test_a_process_that_hangs_is_replaced_and_serves_the_next_file(self, impatient: Decoders, padding: int):
        """The limit of wall-clock time covers waiting for the response and sending a file larger than the pipe."""
        (pid,), before = impatient.pids, impatient.restarts
        os.kill(pid, signal.SIGSTOP)
        assert reason_of(impatient, encoded(noise(0.2)) + bytes(padding)) is Reason.DECODER_TIMED_OUT
        assert (len(impatient.pids), impatient.restarts) == (1, before + 1)
        assert impatient.pids != [pid]
        assert not Path(f"/proc/{pid}").exists()
        assert len(impatient.decode(encoded(noise(0.2)))) == RECIPE.frames_of(0.2)

    def test_waiting_for_a_process_times_out(self, impatient: Decoders):
        os.kill(impatient.pids[0], signal.SIGSTOP)
        assert reason_of(impatient, encoded(noise(0.2))) is Reason.DECODER_TIMED_OUT
        (pid,) = impatient.pids  # a new process, which is not warm yet
        os.kill(pid, signal.SIGSTOP)
        with ThreadPoolExecutor(3) as threads:
            requests = [threads.submit(impatient.decode, encoded(noise(0.2))) for _ in range(3)]
            waited = list(itertools.islice(as_completed(requests), 2))
            assert all(isinstance(request.exception(), TimeoutError) for request in waited)
            os.kill(pid, signal.SIGCONT)
            (served,) = set(requests) - set(waited)
            assert len(served.result()) == RECIPE.frames_of(0.2)

    def test_close_ends_processes_and_waiting_callers(self):
        decoders = Decoders(RECIPE, processes=1, seconds=60.0, **LIMITS)
        (pid,) = decoders.pids
        threads, requests = request_all(decoders, [encoded(noise(0.2))] * 3)
        decoders.close()
        threads.shutdown()
        errors = sorted(type(request.exception()).__name__ for request in requests)
        assert errors == ["AudioError", "StepError", "StepError"]
        assert not Path(f"/proc/{pid}").exists()
        assert decoders.pids == []
        with pytest.raises(StepError, match="closed"):
            decoders.decode(b"")

    def test_end_with_their_parent(self, tmp_path: Path):
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
        wait_until(lambda: has_ended(pid))

    def test_a_process_that_does_not_start_raises_an_error(self):
        with pytest.raises(StepError, match="does not start"):
            Decoders(RECIPE, processes=1, seconds=1.0, **{**LIMITS, "memory_bytes": "none"})  # type: ignore[arg-type]


def mutated(rng: np.random.Generator, data: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 20)):
        damaged[rng.integers(0, min(len(damaged), 10 ** rng.integers(2, 6)))] = rng.integers(256)
    return bytes(damaged[: rng.integers(len(damaged) // 2, len(damaged) + 1)])


def test_memory_stays_flat_over_damaged_files(shared: Decoders):
    originals = [encoded(noise(1, 44_100, 2), 44_100, format) for format in ("WAV", "FLAC", "OGG", "MP3", "AIFF")]
    rng = np.random.default_rng(0)

    def decode_some(count: int) -> None:
        for number in range(count):
            try:
                mel = shared.decode(mutated(rng, originals[number % len(originals)]))
                assert 1 <= len(mel) <= RECIPE.max_frames
            except AudioError:
                pass

    decode_some(100)
    before, before_here = [resident(pid) for pid in shared.pids], resident()
    decode_some(300)
    assert shared.restarts == 0
    assert max(resident(pid) - then for pid, then in zip(shared.pids, before, strict=True)) < 16_000_000
    assert resident() - before_here < 48_000_000
