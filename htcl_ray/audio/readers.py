"""Streams of decoded blocks from libsndfile and from FFmpeg (PyAV).

Both report what the header declares separately from the decoded audio, because headers of damaged and hostile files are
wrong.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import soundfile

FloatArray = npt.NDArray[np.float32]

BLOCK_SAMPLES = 1 << 16
"""Samples over all channels that are decoded at a time."""
UNKNOWN_FRAMES = 1 << 62
"""libsndfile reports about 2⁶³ frames for a header without a length."""
TRUNCATED_CHUNK = re.compile(r"^\s*(?:data|SSND) : (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's log line for a WAV or AIFF file whose header declares more bytes than the file holds."""
LENGTH_LEFT_OPEN = 0x7FFF_0000
"""Bytes. Programs that write to a pipe declare about 2³¹ or 2³² instead of a length."""


class AudioStream(NamedTuple):
    """An opened audio file: the values of its header, and an iterator over its decoded blocks."""

    rate: int
    """In Hz."""
    channels: int
    seconds: float | None
    """Declared duration; None when the header does not declare one."""
    blocks: Iterator[FloatArray]
    """Float32 [frames, channels], decoded on demand."""
    truncated_seconds: float = 0.0
    """Declared duration beyond the end of the file; not part of `seconds`."""


def read_sndfile(file: str | IO[bytes]) -> AudioStream:
    """Open a path or a seekable file with libsndfile. Raises the errors of `soundfile`."""
    reader = soundfile.SoundFile(file)

    def blocks() -> Iterator[FloatArray]:
        size = max(1, BLOCK_SAMPLES // reader.channels)
        while True:
            block = reader.read(size, dtype="float32", always_2d=True)
            if not len(block):
                return
            yield block

    seconds = reader.frames / reader.samplerate if 0 <= reader.frames < UNKNOWN_FRAMES and reader.samplerate else None
    truncated = 0.0
    if seconds is not None and (match := TRUNCATED_CHUNK.search(reader.extra_info)):
        declared, present = int(match[1]), int(match[2])
        if 0 < present < declared < LENGTH_LEFT_OPEN:
            truncated = seconds * (declared / present - 1)
    return AudioStream(reader.samplerate, reader.channels, seconds, blocks(), truncated)


def read_ffmpeg(
    container: Any, *, trust_duration: bool, check_time: Callable[[], None], lose: Callable[[float], None]
) -> AudioStream:
    """Read the first audio stream of an open PyAV container.

    `check_time` is called before each packet, because FFmpeg buffers up to 5 MB of packets and damaged ones produce no
    block. `lose` receives the duration in seconds of each packet that cannot be decoded. Raises ValueError for a
    container without decodable audio, and the errors of PyAV.
    """
    import av

    # Interleaved, because PyAV counts a ninth plane in planar frames of 8 channels, and reading it crashes the process.
    to_floats = av.AudioResampler(format="flt")

    def frames() -> Iterator[Any]:
        for packet in container.demux(container.streams.audio[0]):
            check_time()
            try:
                decoded = packet.decode()
            except av.InvalidDataError:  # one damaged packet; players skip it, too
                lose(float((packet.duration or 0) * packet.time_base))
                continue
            for frame in decoded:
                yield from to_floats.resample(frame)

    rest = frames()
    first = next(rest, None)  # its sample rate is the decoded one; the container only declares one
    if first is None:
        raise ValueError("the file holds no audio that can be decoded")
    seconds = container.duration / av.time_base if trust_duration and container.duration else None
    blocks = (_as_rows(frame) for frame in itertools.chain([first], rest))
    return AudioStream(first.sample_rate, first.layout.nb_channels, seconds, blocks)


def _as_rows(frame: Any) -> FloatArray:
    """Convert an interleaved FFmpeg frame to float32 [frames, channels]."""
    rows: FloatArray = frame.to_ndarray().reshape(-1, frame.layout.nb_channels)
    return rows
