"""Decode untrusted audio files to mono waveforms.

libsndfile reads WAV, FLAC, Ogg, Opus, MP3, AIFF and similar formats. If it fails and PyAV is installed, FFmpeg decodes
the file, but only with the demuxer that the file's signature names: with FFmpeg's own probing, a file could pose as a
playlist that opens other files and URLs.

Headers are not trusted: audio is read in blocks, averaged to mono and resampled as it arrives, and memory follows the
decoded length only. A damaged file keeps the audio before the damage, if it is long enough.
"""

from __future__ import annotations

import io
import math
import os
import time
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import soxr

from htcl_ray.audio.formats import identify
from htcl_ray.audio.readers import AudioStream, read_ffmpeg, read_sndfile
from htcl_ray.audio.source import one_line, opened
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError
from htcl_ray.schemas import Reason

FloatArray = npt.NDArray[np.float32]

LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""Accepted sample rates in Hz, which bound the memory and time that a header can make the decoder use."""
LARGEST_SAMPLE = 1e6
"""Full scale is 1. Float files with larger values are damaged, and their power would overflow: such samples are treated
as not finite."""
CODEC_EDGES_SECONDS = 0.2
"""Tolerance between declared and decoded duration; lossy codecs decode a little more or less than they declare."""
SILENCE_PEAK = 2**-13
"""-78 dBFS, four steps at 16 bits: above dither, below any music."""
RESAMPLER_EDGE_SECONDS = 0.02
OGG_PAGE_BYTES = 1 << 16


class Limits(NamedTuple):
    """Limits for an uploaded file. A file within the limits decodes to the same clip as without limits."""

    seconds: float
    """Largest duration that the header may declare."""
    channels: int
    sample_rate: int
    """In Hz."""
    cpu_seconds: float
    """CPU time of this process for one file."""

    def check(self, stream: AudioStream) -> None:
        """Raise AudioError when the header exceeds a limit."""
        if stream.channels > self.channels:
            raise AudioError(
                Reason.TOO_MANY_CHANNELS, f"it has {stream.channels} channels; expected at most {self.channels}"
            )
        if stream.rate > self.sample_rate:
            raise AudioError(
                Reason.SAMPLE_RATE_TOO_HIGH, f"its sample rate is {stream.rate} Hz; expected at most {self.sample_rate}"
            )
        if stream.seconds is not None and stream.seconds > self.seconds:
            raise AudioError(
                Reason.TOO_LONG,
                f"its header declares {stream.seconds:,.0f} s of audio; expected at most {self.seconds:g}",
            )


class Clip(NamedTuple):
    """The decoded start of an audio file."""

    waveform: FloatArray
    """Mono, [samples]."""
    decoded_share: float
    """Decoded seconds divided by declared seconds, both cut to the length of a clip, in (0, 1]; 1 when nothing is
    missing. A lower bound for a damaged file that declares no length."""


def decode(
    source: str | os.PathLike[str] | bytes | IO[bytes], recipe: AudioRecipe, limits: Limits | None = None
) -> FloatArray:
    """Decode the first `recipe.clip_seconds` of an audio file to mono float32 [samples] with full scale ±1.

    Same arguments and errors as `decode_clip`.
    """
    return decode_clip(source, recipe, limits).waveform


def decode_clip(
    source: str | os.PathLike[str] | bytes | IO[bytes], recipe: AudioRecipe, limits: Limits | None = None
) -> Clip:
    """Decode the first `recipe.clip_seconds` of an audio file at `recipe.sample_rate`, and measure the missing share.

    `source`: a path, an s3://, gs:// or file:// URI, the file's bytes, or a seekable binary file object. Channels are
    averaged, then resampled (soxr HQ); single samples that are not finite become 0.

    Raises AudioError for an unusable file, with `reason` audio_not_found, access_denied, unsupported_uri, audio_empty,
    undecodable, decoder_missing, too_short or not_finite; with `limits` also too_long, too_many_channels,
    sample_rate_too_high and decoder_timed_out. Raises StorageError or AccessDeniedError when the object store fails,
    which is no property of the file.
    """
    with opened(source) as file:
        head = file.read(64)
        file.seek(0)
        if not head:
            raise AudioError(Reason.AUDIO_EMPTY, "the file is empty (0 bytes)")
        path = getattr(file, "name", None) if isinstance(file, io.BufferedReader) else None
        deadline = math.inf
        if limits:
            deadline = time.process_time() + limits.cpu_seconds
            file = cast(IO[bytes], _FileUntilDeadline(file, deadline))
        waveform, failure = _Waveform(recipe, limits, deadline), ""
        try:
            waveform.fill(read_sndfile(path if isinstance(path, str) else file))  # libsndfile uses a path's extension
        except AudioError:  # beyond the limits
            raise
        except Exception as error:  # of damaged files: RuntimeError, ValueError, TypeError, MemoryError and others  # noqa: BLE001
            waveform.check_time()
            failure = f"libsndfile: {one_line(error)}"
        waveform.broke_off = bool(failure)
        if failure and waveform.seconds < recipe.min_seconds:
            waveform = _decode_with_ffmpeg(file, head, _Waveform(recipe, limits, deadline), failure)
        if head.startswith(b"OggS") and not waveform.is_full and not _has_last_ogg_page(file):
            # libsndfile takes the length from the last page in the file
            waveform.broke_off, waveform.declared_seconds = True, None
        waveform.check_time()
    return Clip(waveform.finish(), waveform.decoded_share)


class _FileUntilDeadline(io.RawIOBase):
    """A file that ends at the CPU deadline, because libraries parse metadata of any size within one call."""

    def __init__(self, file: IO[bytes], deadline: float) -> None:
        self.file = file
        self.deadline = deadline

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def readinto(self, buffer: Any) -> int:
        data = b"" if time.process_time() > self.deadline else self.file.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


class _Waveform:
    """Accumulate decoded blocks as mono audio at the recipe's sample rate, up to the length of a clip."""

    def __init__(self, recipe: AudioRecipe, limits: Limits | None, deadline: float) -> None:
        self.recipe = recipe
        self.limits = limits
        self.deadline = deadline
        """In `time.process_time()`."""
        self.rate = 0
        self.frames = 0
        self.finite = 0
        self.parts: list[FloatArray] = []
        self.resampler: soxr.ResampleStream | None = None
        self.declared_seconds: float | None = None
        self.lost_seconds = 0.0
        """Duration of packets that could not be decoded."""
        self.broke_off = False
        """Whether decoding ended with an error."""

    @property
    def is_full(self) -> bool:
        """Whether a whole clip was decoded."""
        return self.seconds >= self.recipe.clip_seconds

    @property
    def decoded_share(self) -> float:
        """See `Clip.decoded_share`."""
        expected = max(self.declared_seconds or 0.0, self.seconds + self.lost_seconds)
        if self.broke_off and self.declared_seconds is None:
            expected = self.recipe.clip_seconds
        missing = min(expected, self.recipe.clip_seconds) - self.seconds
        tolerance = 0.0 if self.broke_off or self.lost_seconds else CODEC_EDGES_SECONDS
        return self.seconds / (self.seconds + missing) if missing > tolerance else 1.0

    @property
    def seconds(self) -> float:
        return self.frames / self.rate if self.rate else 0.0

    def fill(self, stream: AudioStream) -> None:
        """Add blocks until the clip is full or the stream ends. Raises AudioError beyond the limits."""
        if self.limits:
            self.limits.check(stream)
        rate = stream.rate
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise ValueError(f"the sample rate is {rate} Hz; expected {LOWEST_RATE} to {HIGHEST_RATE}")
        self.rate = rate
        if rate != self.recipe.sample_rate:
            self.resampler = soxr.ResampleStream(rate, self.recipe.sample_rate, 1, dtype="float32", quality="HQ")
        self.declared_seconds = None if stream.seconds is None else stream.seconds + stream.truncated_seconds
        wanted = int(np.ceil(self.recipe.clip_seconds * rate))
        for block in stream.blocks:
            self.check_time()
            if len(block):
                self._add(block[: wanted - self.frames])
            if self.frames >= wanted:
                return

    def add_lost(self, seconds: float) -> None:
        """Count a packet that could not be decoded."""
        self.lost_seconds += seconds

    def check_time(self) -> None:
        """Raise AudioError beyond `limits.cpu_seconds`. Called for each block and packet, and at the end."""
        if time.process_time() > self.deadline:
            assert self.limits is not None, "only limits set a deadline"
            raise AudioError(
                Reason.DECODER_TIMED_OUT,
                f"decoding it took more than {self.limits.cpu_seconds:g} s of CPU time; send fewer channels, a lower "
                "sample rate, or another format",
            )

    def _add(self, block: FloatArray) -> None:
        if block.min() >= -LARGEST_SAMPLE and block.max() <= LARGEST_SAMPLE:  # false with a NaN
            self.finite += block.size
        else:
            finite = np.abs(block) <= LARGEST_SAMPLE
            self.finite += int(np.count_nonzero(finite))
            block = np.where(finite, block, np.float32(0))
        self.frames += len(block)
        channels = block.shape[1]
        mono = (
            np.ascontiguousarray(block[:, 0])
            if channels == 1
            else block @ np.full(channels, 1 / channels, dtype=np.float32)
        )
        self.parts.append(self.resampler.resample_chunk(mono) if self.resampler else mono)

    def finish(self) -> FloatArray:
        """Return the whole waveform. Raises AudioError when it is too short or has no finite sample."""
        if self.seconds < self.recipe.min_seconds:
            raise AudioError(
                Reason.TOO_SHORT, f"{self.seconds:.3f} s were decoded; expected at least {self.recipe.min_seconds} s"
            )
        if not self.finite:
            raise AudioError(Reason.NOT_FINITE, "no sample is a finite number")
        if self.resampler:
            self.parts.append(self.resampler.resample_chunk(np.zeros(0, dtype=np.float32), last=True))
        return np.concatenate(self.parts)[: self.recipe.max_samples]


def check_audible(waveform: FloatArray, recipe: AudioRecipe) -> None:
    """Raise AudioError for a silent clip: mono samples [n] at the recipe's rate whose peak about the mean is tiny.

    All silent clips would have the same embedding and would be grouped as duplicate recordings.
    """
    edge = round(RESAMPLER_EDGE_SECONDS * recipe.sample_rate)  # where a constant signal rings
    inner = waveform[edge : waveform.size - edge] if waveform.size > 4 * edge else waveform
    loudest = float(max(inner.max() - (mean := float(inner.mean(dtype=np.float64))), mean - inner.min()))
    if loudest < SILENCE_PEAK:
        level = f"peak {20 * np.log10(loudest):.0f} dBFS" if loudest > 0 else "every sample is equal"
        raise AudioError(
            Reason.SILENT,
            f"the {waveform.size / recipe.sample_rate:.1f} s that are used are silent ({level}); expected a peak of at "
            f"least {20 * np.log10(SILENCE_PEAK):.0f} dBFS",
        )


def _has_last_ogg_page(file: IO[bytes]) -> bool:
    """Whether the last page of an Ogg file carries the end-of-stream flag."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OGG_PAGE_BYTES))
    tail = file.read()
    last = tail.rfind(b"OggS")
    return 0 <= last < len(tail) - 5 and bool(tail[last + 5] & 4)


def _decode_with_ffmpeg(file: IO[bytes], head: bytes, waveform: _Waveform, failure: str) -> _Waveform:
    """Fill `waveform` with FFmpeg from a file that libsndfile refused with the message `failure`."""
    format = identify(head)
    if format is None:
        raise AudioError(Reason.UNDECODABLE, failure)
    try:
        import av
    except ImportError:
        if not format.needs_ffmpeg:
            raise AudioError(Reason.UNDECODABLE, failure) from None
        raise AudioError(
            Reason.DECODER_MISSING, f"{format.name} needs FFmpeg: pip install 'htcl-ray[ffmpeg]'"
        ) from None
    try:
        file.seek(0)
        with av.open(file, format=format.demuxer) as container:
            waveform.fill(
                read_ffmpeg(
                    container,
                    trust_duration=format.declares_duration,
                    check_time=waveform.check_time,
                    lose=waveform.add_lost,
                )
            )
    except AudioError:  # beyond the limits
        raise
    except Exception as error:  # FFmpeg's errors, and any error of PyAV on a damaged file  # noqa: BLE001
        waveform.check_time()
        if waveform.seconds < waveform.recipe.min_seconds:
            raise AudioError(Reason.UNDECODABLE, f"{failure}; FFmpeg ({format.name}): {one_line(error)}") from None
        waveform.broke_off = True
    return waveform
