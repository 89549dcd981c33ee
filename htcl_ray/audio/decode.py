"""Audio file → mono waveform, from files that nobody vouches for.

libsndfile reads WAV, FLAC, Ogg, Opus, MP3, AIFF and their like. What it cannot read goes to FFmpeg, when PyAV is
installed, but only under the demuxer that the file's first bytes name: probing would let a file pose as a playlist that
opens other files and addresses.

Headers lie, so nothing is allocated from them: audio is read in blocks, averaged to mono and resampled as it comes, and
the length is what was really decoded. A file that breaks off keeps what came before the break, as a truncated file
does, if that is long enough.
"""

from __future__ import annotations

import io
import itertools
import math
import os
import re
import time
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from htcl_ray.audio.source import one_line, opened
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError
from htcl_ray.schemas import Reason

FloatArray = npt.NDArray[np.float32]

BLOCK_SAMPLES = 1 << 16
"""Samples of all channels that are decoded at a time."""
LOWEST_RATE, HIGHEST_RATE = 1_000, 768_000
"""In Hz. A header may claim anything; the decoder's memory and time must not follow it."""
UNKNOWN_FRAMES = 1 << 62
"""libsndfile says about 2⁶³ for a header that leaves the length open."""
LARGEST_SAMPLE = 1e6
"""Full scale is 1. Float files with values beyond this are damaged, and their power would overflow: such samples count
as not finite."""


CODEC_EDGES_SECONDS = 0.2
"""Lossy codecs declare a little more or less than they decode."""
SILENCE_PEAK = 2**-13
"""-78 dBFS, four steps of 16 bits: above dither, below music, however quiet."""
RESAMPLER_EDGE_SECONDS = 0.02
OGG_PAGE_BYTES = 1 << 16
TRUNCATED_CHUNK = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log of a WAV or AIFF file whose header declares more bytes than there are."""
LENGTH_LEFT_OPEN = 0x7FFF_0000
"""Bytes; programs that write to a pipe declare about 2³¹ or 2³² instead of a length."""


class _Format(NamedTuple):
    offset: int
    signature: bytes
    demuxer: str
    """FFmpeg's name."""
    name: str
    needs_ffmpeg: bool = True
    """libsndfile never reads it."""


_SIGNATURES = (
    _Format(4, b"ftyp", "mov", "MP4/M4A"),
    _Format(0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", "asf", "WMA"),
    _Format(0, b"MAC ", "ape", "Monkey's Audio"),
    _Format(0, b"\xff\xf1", "aac", "AAC"),
    _Format(0, b"\xff\xf9", "aac", "AAC"),
    _Format(0, b"wvpk", "wv", "WavPack"),
    _Format(0, b"TTA1", "tta", "True Audio"),
    _Format(0, b"MPCK", "mpc8", "Musepack"),
    _Format(0, b"MP+", "mpc", "Musepack"),
    _Format(0, b"\x1a\x45\xdf\xa3", "matroska", "WebM/Matroska"),
    _Format(28, b"Speex   ", "ogg", "Speex"),
    _Format(0, b"fLaC", "flac", "FLAC", needs_ffmpeg=False),
    _Format(0, b"OggS", "ogg", "Ogg", needs_ffmpeg=False),
    _Format(0, b"ID3", "mp3", "MP3", needs_ffmpeg=False),
    _Format(0, b"\xff\xfb", "mp3", "MP3", needs_ffmpeg=False),
)

_GUESSED_DURATION = ("aac", "mp3")
"""Demuxers of streams that declare no duration: FFmpeg's is a guess from the first frame's bit rate."""


class Limits(NamedTuple):
    """What an upload may be. Of a file within them the same clip is decoded as of any other."""

    seconds: float
    """That its header declares."""
    channels: int
    sample_rate: int
    """In Hz."""
    cpu_seconds: float
    """CPU time of this process that decoding may take."""

    def check(self, sound: _Sound) -> None:
        """Raise AudioError when the header declares more."""
        if sound.channels > self.channels:
            raise AudioError(
                Reason.TOO_MANY_CHANNELS, f"it has {sound.channels} channels; expected at most {self.channels}"
            )
        if sound.rate > self.sample_rate:
            raise AudioError(
                Reason.SAMPLE_RATE_TOO_HIGH, f"its sample rate is {sound.rate} Hz; expected at most {self.sample_rate}"
            )
        if sound.seconds is not None and sound.seconds > self.seconds:
            raise AudioError(
                Reason.TOO_LONG,
                f"its header declares {sound.seconds:,.0f} s of audio; expected at most {self.seconds:g}",
            )


class Clip(NamedTuple):
    """Decoded audio."""

    waveform: FloatArray
    """Mono, [samples]."""
    decoded_share: float
    """Above 0, and 1 when nothing is missing: decoded seconds / seconds that the header declares, neither more than is
    used of a file. Where a damaged file declares no length, a lower bound."""


def decode(
    source: str | os.PathLike[str] | bytes | IO[bytes], recipe: AudioRecipe, limits: Limits | None = None
) -> FloatArray:
    """The waveform of `decode_clip`: the first `recipe.clip_seconds` of an audio file as mono float32 [samples]; full
    scale is ±1.
    """
    return decode_clip(source, recipe, limits).waveform


def decode_clip(
    source: str | os.PathLike[str] | bytes | IO[bytes], recipe: AudioRecipe, limits: Limits | None = None
) -> Clip:
    """The first `recipe.clip_seconds` of an audio file as mono float32 at `recipe.sample_rate`, and how much of it
    could be decoded.

    `source`: a path, an s3://, gs:// or file:// URI, the file's bytes, or a seekable binary file object. Channels are
    averaged, then resampled (soxr HQ); single samples that are not finite become 0. Raises AudioError for a file that
    cannot be used: its `reason` is audio_not_found, access_denied, unsupported_uri, audio_empty, undecodable,
    decoder_missing, too_short or not_finite; what exceeds `limits` is too_long, too_many_channels, sample_rate_too_high
    or decoder_timed_out. Raises StorageError or AccessDeniedError when an object store fails, which says nothing about
    the file.
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
            file = cast(IO[bytes], _UntilDeadline(file, deadline))
        waveform, failure = _Waveform(recipe, limits, deadline), ""
        try:
            waveform.fill(
                _read_sndfile(path if isinstance(path, str) else file)
            )  # from a path, it also tries what the name says
        except AudioError:  # beyond the limits
            raise
        except Exception as error:  # on broken files: RuntimeError, ValueError, TypeError, MemoryError, …
            waveform.check_time()
            failure = f"libsndfile: {one_line(error)}"
        waveform.broke_off = bool(failure)
        if failure and waveform.seconds < recipe.min_seconds:
            waveform = _decode_with_ffmpeg(file, head, _Waveform(recipe, limits, deadline), failure)
        if head.startswith(b"OggS") and not waveform.is_full and not _ends_as_ogg(file):
            waveform.broke_off, waveform.declared_seconds = (
                True,
                None,
            )  # libsndfile takes the length from the last page that there is
        waveform.check_time()
    return Clip(waveform.finish(), waveform.decoded_share)


class _UntilDeadline(io.RawIOBase):
    """A file that ends when the CPU time is up: libraries parse what comes before the audio, however much it is, within
    one call.
    """

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


class _Sound(NamedTuple):
    """An opened file: what its header declares, and its blocks of [frames, channels] as they are decoded."""

    rate: int
    channels: int
    seconds: float | None
    """None when the header does not tell."""
    blocks: Iterator[FloatArray]
    truncated_seconds: float = 0.0
    """What the header declares beyond the end of the file; not part of `seconds`."""


class _Waveform:
    """Collects decoded blocks as mono audio at the recipe's rate, up to the length of a clip."""

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
        """Of pieces in the middle that could not be decoded."""
        self.broke_off = False
        """Decoding ended with an error."""

    @property
    def is_full(self) -> bool:
        """Whether all that is used of a file was decoded."""
        return self.seconds >= self.recipe.clip_seconds

    @property
    def decoded_share(self) -> float:
        """See `Clip`."""
        expected = max(self.declared_seconds or 0.0, self.seconds + self.lost_seconds)
        if self.broke_off and self.declared_seconds is None:
            expected = self.recipe.clip_seconds
        missing = min(expected, self.recipe.clip_seconds) - self.seconds
        tolerance = 0.0 if self.broke_off or self.lost_seconds else CODEC_EDGES_SECONDS
        return self.seconds / (self.seconds + missing) if missing > tolerance else 1.0

    @property
    def seconds(self) -> float:
        return self.frames / self.rate if self.rate else 0.0

    def fill(self, sound: _Sound) -> None:
        """Take blocks until the clip is full or they end. Raises AudioError for more than the limits."""
        if self.limits:
            self.limits.check(sound)
        rate = sound.rate
        if not LOWEST_RATE <= rate <= HIGHEST_RATE:
            raise ValueError(f"the sample rate is {rate} Hz; expected {LOWEST_RATE} to {HIGHEST_RATE}")
        self.rate = rate
        if rate != self.recipe.sample_rate:
            self.resampler = soxr.ResampleStream(rate, self.recipe.sample_rate, 1, dtype="float32", quality="HQ")
        self.declared_seconds = None if sound.seconds is None else sound.seconds + sound.truncated_seconds
        wanted = int(np.ceil(self.recipe.clip_seconds * rate))
        for block in sound.blocks:
            self.check_time()
            if len(block):
                self._add(block[: wanted - self.frames])
            if self.frames >= wanted:
                return

    def check_time(self) -> None:
        """Raise AudioError when decoding has taken the CPU time that `limits` allow; called for every block and packet
        and at the end.
        """
        if time.process_time() > self.deadline:
            assert self.limits is not None, "without limits there is no deadline"
            raise AudioError(
                Reason.DECODER_TIMED_OUT,
                f"decoding it took more than {self.limits.cpu_seconds:g} s of CPU time; send fewer channels, a lower sample rate, or "
                "another format",
            )

    def _add(self, block: FloatArray) -> None:
        if block.min() >= -LARGEST_SAMPLE and block.max() <= LARGEST_SAMPLE:  # false when there is a NaN
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
        """The whole waveform; raises AudioError when there is not enough of it."""
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
    """Raise AudioError for silence: mono samples [n] at the recipe's rate that hardly differ from their mean.

    All silent clips would have one embedding, and would be taken for one recording.
    """
    edge = round(RESAMPLER_EDGE_SECONDS * recipe.sample_rate)  # where a constant signal rings
    inner = waveform[edge : waveform.size - edge] if waveform.size > 4 * edge else waveform
    loudest = float(max(inner.max() - (mean := float(inner.mean(dtype=np.float64))), mean - inner.min()))
    if loudest < SILENCE_PEAK:
        level = f"peak {20 * np.log10(loudest):.0f} dBFS" if loudest > 0 else "every sample is equal"
        raise AudioError(
            Reason.SILENT,
            f"the {waveform.size / recipe.sample_rate:.1f} s that are used are silent ({level}); expected a peak of at least "
            f"{20 * np.log10(SILENCE_PEAK):.0f} dBFS",
        )


def _ends_as_ogg(file: IO[bytes]) -> bool:
    """Whether the last page of an Ogg file says that it is the last."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - OGG_PAGE_BYTES))
    tail = file.read()
    last = tail.rfind(b"OggS")
    return 0 <= last < len(tail) - 5 and bool(tail[last + 5] & 4)


def _read_sndfile(file: str | IO[bytes]) -> _Sound:
    sound = soundfile.SoundFile(file)

    def blocks() -> Iterator[FloatArray]:
        size = max(1, BLOCK_SAMPLES // sound.channels)
        while True:
            block = sound.read(size, dtype="float32", always_2d=True)
            if not len(block):
                return
            yield block

    seconds = sound.frames / sound.samplerate if 0 <= sound.frames < UNKNOWN_FRAMES and sound.samplerate else None
    truncated = 0.0
    if seconds is not None and (found := TRUNCATED_CHUNK.search(sound.extra_info)):
        declared, present = int(found[1]), int(found[2])
        if 0 < present < declared < LENGTH_LEFT_OPEN:
            truncated = seconds * (declared / present - 1)
    return _Sound(sound.samplerate, sound.channels, seconds, blocks(), truncated)


def _decode_with_ffmpeg(file: IO[bytes], head: bytes, waveform: _Waveform, failure: str) -> _Waveform:
    """`waveform`, filled with what FFmpeg makes of a file that libsndfile refused; `failure` is libsndfile's own
    complaint.
    """
    found = next((format for format in _SIGNATURES if head[format.offset :].startswith(format.signature)), None)
    if found is None:
        raise AudioError(Reason.UNDECODABLE, failure)
    try:
        import av
    except ImportError:
        if not found.needs_ffmpeg:
            raise AudioError(Reason.UNDECODABLE, failure) from None
        raise AudioError(Reason.DECODER_MISSING, f"{found.name} needs FFmpeg: pip install 'htcl-ray[ffmpeg]'") from None
    try:
        file.seek(0)
        with av.open(file, format=found.demuxer) as container:
            waveform.fill(_read_ffmpeg(container, waveform, trust_duration=found.demuxer not in _GUESSED_DURATION))
    except AudioError:  # beyond the limits
        raise
    except Exception as error:  # FFmpeg's own errors, and whatever PyAV raises on a broken file
        waveform.check_time()
        if waveform.seconds < waveform.recipe.min_seconds:
            raise AudioError(Reason.UNDECODABLE, f"{failure}; FFmpeg ({found.name}): {one_line(error)}") from None
        waveform.broke_off = True
    return waveform


def _read_ffmpeg(container: Any, waveform: _Waveform, trust_duration: bool) -> _Sound:
    """`waveform.lost_seconds` grows by packets that cannot be decoded."""
    import av

    # Interleaved, because PyAV counts a ninth plane in planar frames of 8 channels, and reading that one ends the
    # process.
    to_floats = av.AudioResampler(format="flt")

    def frames() -> Iterator[Any]:
        for packet in container.demux(container.streams.audio[0]):
            waveform.check_time()  # FFmpeg has up to 5 MB of packets in memory when it knows what they are, and broken ones make no block
            try:
                decoded = packet.decode()
            except av.InvalidDataError:  # one broken packet; players go on with the next
                waveform.lost_seconds += float((packet.duration or 0) * packet.time_base)
                continue
            for frame in decoded:
                yield from to_floats.resample(frame)

    rest = frames()
    first = next(rest, None)  # its rate is true; the container's is a claim
    if first is None:
        raise ValueError("no audio found")
    seconds = container.duration / av.time_base if trust_duration and container.duration else None
    blocks = (_as_rows(frame) for frame in itertools.chain([first], rest))
    return _Sound(first.sample_rate, first.layout.nb_channels, seconds, blocks)


def _as_rows(frame: Any) -> FloatArray:
    """[frames, channels] of an interleaved FFmpeg frame."""
    return frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
