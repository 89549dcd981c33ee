"""The audio file formats: names, file extensions, media types, and the signatures that identify a file's content."""

from __future__ import annotations

from typing import NamedTuple


class AudioFormat(NamedTuple):
    """One audio file format."""

    name: str
    extensions: tuple[str, ...]
    """Lower case, with the dot."""
    media_type: str | None = None
    """None for formats that browsers do not play."""
    signatures: tuple[tuple[int, bytes], ...] = ()
    """(offset, bytes) at the start of a file. Formats without signatures are only read by libsndfile."""
    demuxer: str = ""
    """FFmpeg's name of the demuxer for a file with one of the signatures."""
    needs_ffmpeg: bool = False
    """Whether libsndfile never reads the format."""
    declares_duration: bool = True
    """False for streams whose duration FFmpeg only estimates from the bit rate of the first frame."""


FORMATS = (
    AudioFormat("MP4/M4A", (".m4a", ".mp4"), "audio/mp4", ((4, b"ftyp"),), "mov", needs_ffmpeg=True),
    AudioFormat("WMA", (".wma",), None, ((0, b"\x30\x26\xb2\x75\x8e\x66\xcf\x11"),), "asf", needs_ffmpeg=True),
    AudioFormat("Monkey's Audio", (".ape",), None, ((0, b"MAC "),), "ape", needs_ffmpeg=True),
    AudioFormat(
        "AAC",
        (".aac",),
        "audio/aac",
        ((0, b"\xff\xf1"), (0, b"\xff\xf9")),
        "aac",
        needs_ffmpeg=True,
        declares_duration=False,
    ),
    AudioFormat("WavPack", (".wv",), None, ((0, b"wvpk"),), "wv", needs_ffmpeg=True),
    AudioFormat("True Audio", (".tta",), None, ((0, b"TTA1"),), "tta", needs_ffmpeg=True),
    AudioFormat("Musepack", (".mpc",), None, ((0, b"MPCK"),), "mpc8", needs_ffmpeg=True),
    AudioFormat("Musepack", (".mpc",), None, ((0, b"MP+"),), "mpc", needs_ffmpeg=True),
    AudioFormat(
        "WebM/Matroska", (".weba", ".webm"), "audio/webm", ((0, b"\x1a\x45\xdf\xa3"),), "matroska", needs_ffmpeg=True
    ),
    AudioFormat("Speex", (".spx",), None, ((28, b"Speex   "),), "ogg", needs_ffmpeg=True),  # before Ogg, its container
    AudioFormat("FLAC", (".flac",), "audio/flac", ((0, b"fLaC"),), "flac"),
    AudioFormat("Ogg", (".oga", ".ogg", ".opus"), "audio/ogg", ((0, b"OggS"),), "ogg"),
    AudioFormat("MP3", (".mp2", ".mp3"), "audio/mpeg", ((0, b"ID3"), (0, b"\xff\xfb")), "mp3", declares_duration=False),
    AudioFormat("WAV", (".wav",), "audio/wav"),
    AudioFormat("AIFF", (".aif", ".aiff"), "audio/aiff"),
    AudioFormat("AU", (".au",)),
    AudioFormat("CAF", (".caf",)),
)
EXTENSIONS = frozenset(extension for format in FORMATS for extension in format.extensions)
"""File extensions of every format."""
MEDIA_TYPES = {
    extension: format.media_type for format in FORMATS if format.media_type for extension in format.extensions
}
"""File extension → media type, for the formats that browsers play."""


def identify(head: bytes) -> AudioFormat | None:
    """Return the format whose signature the first bytes of a file (at least 64) carry, or None."""
    return next(
        (
            format
            for format in FORMATS
            if any(head[offset:].startswith(signature) for offset, signature in format.signatures)
        ),
        None,
    )
