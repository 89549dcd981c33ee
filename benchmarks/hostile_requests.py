"""Hostile requests: damaged audio files, files with false headers, malformed forms, and deep, large or invalid JSON."""

from __future__ import annotations

import functools
import io
import json
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

BOUNDARY = "boundary-of-the-form"
AUDIO, SEARCH, ACTIVATE, SONG = "/v1/search/audio", "/v1/search", "/v1/index/activate", "/v1/songs/{song_id}"
"""Routes as named in `/openapi.json`."""
HEADER_BYTES = 64
NAMES = (
    "a.wav",
    "a.mp3",
    "a.flac",
    "a.txt",
    "../../etc/passwd",
    "/dev/zero",
    "C:\\a",
    "a\x00b",
    "%2e%2e%2f",
    "名.ogg",
    "a" * 2_000,
    "",
)


class Request(NamedTuple):
    """One request. `route` is its template, `kind` its defect."""

    kind: str
    method: str
    route: str
    content: bytes
    content_type: str = "application/json"
    path: str | None = None
    """None for a route without parameters."""


def requests(files: Sequence[bytes], count: int, seed: int) -> Iterator[Request]:
    """Generate `count` requests from `seed`: the handwritten ones first, then uploads of damaged `files`."""
    made = list(handmade())[:count]
    yield from made
    rng = np.random.default_rng(seed)
    names = list(DAMAGES)
    for number in range(count - len(made)):
        name = names[number % len(names)]
        data = DAMAGES[name](rng, files)
        yield upload(f"damaged: {name}", data, NAMES[rng.integers(len(NAMES))])


def read_files(folder: Path) -> list[bytes]:
    """Read the files of a folder, sorted by name, without empty ones."""
    return [data for path in sorted(folder.iterdir()) if path.is_file() and (data := path.read_bytes())]


def upload(kind: str, data: bytes, name: str = "a.wav", fields: Sequence[tuple[str, str]] = ()) -> Request:
    """Build a well-formed form with a file."""
    parts = [part("file", data, name), *(part(key, value.encode()) for key, value in fields)]
    return form(kind, b"".join(parts) + closing())


def form(kind: str, content: bytes, content_type: str = f"multipart/form-data; boundary={BOUNDARY}") -> Request:
    """Build a request with this body for the audio search."""
    return Request(kind, "POST", AUDIO, content, content_type)


def part(name: str, data: bytes, filename: str | None = None, headers: bytes = b"") -> bytes:
    """Encode one part of a form."""
    file = b"" if filename is None else b'; filename="' + filename.encode() + b'"'
    head = b'Content-Disposition: form-data; name="' + name.encode() + b'"' + file + b"\r\n" + headers
    return b"--" + BOUNDARY.encode() + b"\r\n" + head + b"\r\n" + data + b"\r\n"


def closing() -> bytes:
    """Encode the end of a form."""
    return b"--" + BOUNDARY.encode() + b"--\r\n"


Files = Sequence[bytes]


def _pick(rng: np.random.Generator, files: Files) -> bytearray:
    return bytearray(files[rng.integers(len(files))])


def _flip_bits(rng: np.random.Generator, files: Files) -> bytes:
    data = _pick(rng, files)
    for place in rng.integers(0, len(data), size=int(10 ** rng.uniform(0, 3))):
        data[place] ^= 1 << int(rng.integers(8))
    return bytes(data)


def _edit_header(rng: np.random.Generator, files: Files) -> bytes:
    """Overwrite some of the first bytes, which hold sizes, rates and channels in most formats, with extreme numbers."""
    data = _pick(rng, files)
    for _ in range(rng.integers(1, 4)):
        extreme = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\x01\0\0\0", rng.bytes(4))[
            rng.integers(6)
        ]
        place, width = int(rng.integers(0, min(HEADER_BYTES, len(data)))), int(rng.integers(1, 5))
        data[place : place + width] = extreme[:width]
    return bytes(data)


def _truncate(rng: np.random.Generator, files: Files) -> bytes:
    data = _pick(rng, files)
    return bytes(data[: rng.integers(0, len(data))])


def _splice(rng: np.random.Generator, files: Files) -> bytes:
    first, second = _pick(rng, files), _pick(rng, files)
    return bytes(first[: rng.integers(0, len(first) + 1)] + second[rng.integers(0, len(second)) :])


def _append(rng: np.random.Generator, files: Files) -> bytes:
    return bytes(_pick(rng, files)) + rng.bytes(int(10 ** rng.uniform(0, 5)))


def _cut_out(rng: np.random.Generator, files: Files) -> bytes:
    data = _pick(rng, files)
    start, end = sorted(int(place) for place in rng.integers(0, len(data) + 1, size=2))
    return bytes(data[:start] + data[end:])


def _repeat(rng: np.random.Generator, files: Files) -> bytes:
    data = bytes(_pick(rng, files))
    return data * int(min(10, max(2, 2_000_000 // len(data))))


def _disguise(rng: np.random.Generator, files: Files) -> bytes:
    """Join the first bytes of one file with the body of another."""
    first, second = _pick(rng, files), _pick(rng, files)
    length = int(rng.integers(4, 40))
    return bytes(first[:length] + second[length:])


DAMAGES: dict[str, Callable[[np.random.Generator, Files], bytes]] = {
    "bits flipped": _flip_bits,
    "header edited": _edit_header,
    "truncated": _truncate,
    "spliced": _splice,
    "appended": _append,
    "cut out": _cut_out,
    "repeated": _repeat,
    "disguised": _disguise,
}


def handmade() -> Iterator[Request]:
    """Generate requests that a fuzzer would hardly reach."""
    for kind, data in hostile_files():
        yield upload(kind, data)
    yield from _forms()
    yield from _searches()


def hostile_files() -> Iterator[tuple[str, bytes]]:
    """Generate small audio files that decode to much audio or have false headers."""
    silence = _hour_of_silence()
    yield "an hour of silence in little FLAC", silence
    yield "FLAC of an hour that leaves its length open", with_declared_samples(silence, 0)
    yield "FLAC of an hour that declares a second", with_declared_samples(silence, 16_000)
    yield "FLAC of 4 kB that declares 100 hours", with_declared_samples(silence, 100 * 3_600 * 16_000)[:4_096]
    yield "FLAC of many heads", silence[:8_192] * 400
    yield "WAV that claims 4 GB", wav(16_000, 1, b"\0" * 32_000, claimed=0xFFFFFFFF)
    yield "WAV of 1,024 channels", wav(16_000, 1_024, b"\0" * 2_048_000)
    yield "WAV of 65,535 channels", wav(16_000, 65_535, b"\0" * 2_048_000)
    yield "WAV of no channel", wav(16_000, 0, b"\0" * 32_000)
    yield "WAV of no rate", wav(0, 1, b"\0" * 32_000)
    yield "WAV of 4 GHz", wav(0xFFFFFFFF, 1, b"\0" * 32_000)
    yield "WAV of 1 Hz", wav(1, 1, b"\0" * 32_000)
    yield "WAV of NaN", wav(16_000, 1, b"\xff" * 64_000, bits=32, code=3)
    yield "WAV of infinity", wav(16_000, 1, b"\0\0\x80\x7f" * 16_000, bits=32, code=3)
    yield "20 MB of nothing", b"\0" * 20_000_000
    yield "playlist", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n"
    yield "concatenation script", b"ffconcat version 1.0\nfile '/etc/passwd'\n"
    yield "MP4 of no end", b"\0\0\0\x20ftypM4A \0\0\0\0" + b"\0\0\0\x01moov\xff\xff\xff\xff\xff\xff\xff\xff" * 1_000
    yield "ID3 tag of 256 MB", b"ID3\x04\0\0\x7f\x7f\x7f\x7f" + b"\0" * 10_000
    yield "ID3 tags in a row", b"ID3\x04\0\0\0\0\0\x01\0" * 100_000
    yield "Ogg pages of nothing", (b"OggS\0\x02" + b"\0" * 20 + b"\x01\0") * 50_000


def _forms() -> Iterator[Request]:
    audio = _encoded(np.random.default_rng(0).uniform(-0.1, 0.1, 16_000).astype(np.float32), "WAV")
    good = part("file", audio, "a.wav")
    yield form("form without boundary", good + closing(), "multipart/form-data")
    yield form("form of another boundary", good + closing(), "multipart/form-data; boundary=other")
    yield form("form with an empty boundary", good + closing(), "multipart/form-data; boundary=")
    yield form("form without end", good)
    yield form("form cut in a header", good[:30])
    yield form("form of nothing", b"")
    yield form("form of 10,000 fields", good + part("k", b"1") * 10_000 + closing())
    yield form("form of 10,000 files", part("file", b"x", "a") * 10_000 + closing())
    yield form(
        "part with headers of 1 MB", part("file", audio, "a.wav", b"X-Long: " + b"y" * 1_000_000 + b"\r\n") + closing()
    )
    yield form("part with 10,000 headers", part("file", audio, "a.wav", b"X: y\r\n" * 10_000) + closing())
    yield form("file name of 1 MB", part("file", audio, "a" * 1_000_000) + closing())
    yield form("audio without a form", audio, "audio/wav")
    yield form("JSON in place of a form", b"{}", "application/json")
    yield form("text in place of a file", part("file", b"text") + closing())
    for key, value in (
        ("k", "0"),
        ("k", "9" * 10_000),
        ("k", "nan"),
        ("blend", "nan"),
        ("blend", "1e400"),
        ("filter", "[" * 100_000),
    ):
        yield upload(f"option {key}={value[:10]}", audio, fields=[(key, value)])
    for name in NAMES:
        yield upload(f"named {name[:20]!r}", audio, name)


def _searches() -> Iterator[Request]:
    bodies: dict[str, bytes] = {
        "100,000 brackets": b"[" * 100_000,
        "100,000 objects": b'{"filter":' * 90_000,
        "brackets side by side": b"[" + b"[]," * 300_000 + b"[]]",
        "brackets in a filter": b'{"text": "a", "filter": {"genre": ' + b"[" * 500 + b"]" * 500 + b"}}",
        "huge k": b'{"text": "a", "k": ' + b"9" * 4_000 + b"}",
        "k beyond what Python reads": b'{"text": "a", "k": ' + b"9" * 400_000 + b"}",
        "vector of NaN": b'{"vector": [' + b",".join([b"NaN"] * 200) + b"]}",
        "vector of infinity": b'{"vector": [' + b",".join([b"1e999"] * 200) + b"]}",
        "vector of 200,000": json.dumps({"vector": [0.5] * 200_000}).encode(),
        "seeds, too many": json.dumps({"song_ids": ["a"] * 100_000}).encode(),
        "text of 900 kB": json.dumps({"text": "a" * 900_000}).encode(),
        "keys, many": json.dumps({str(number): 0 for number in range(50_000)}).encode(),
        "the same key, often": b"{" + b'"text": "a",' * 50_000 + b'"text": "a"}',
        "half a surrogate pair": b'{"text": "\\ud800"}',
        "no UTF-8": b'{"text": "\xff\xfe"}',
        "NUL": b'{"song_id": "\\u0000"}',
        "cut off": b'{"text": "a',
        "larger than allowed": b" " * 2_000_000,
        "path as a song": b'{"song_id": "../../../etc/passwd"}',
    }
    for kind, content in bodies.items():
        yield Request(f"JSON: {kind}", "POST", SEARCH, content)
    for version in ("../../etc", "/etc/passwd", "a/b", "..", "a\x00", "", "v" * 65, "http://192.0.2.1/index"):
        yield Request(f"activate {version[:20]!r}", "POST", ACTIVATE, json.dumps({"version": version}).encode())
    for name in ("..%2f..%2fetc%2fpasswd", "%00", "%ff%fe", "a" * 5_000):
        yield Request(f"song {name[:20]}", "GET", SONG, b"", path=f"/v1/songs/{name}")


def wav(rate: int, channels: int, data: bytes, claimed: int | None = None, bits: int = 16, code: int = 1) -> bytes:
    """Build a RIFF file with the given values in its header. `code`: 1 for integers, 3 for floats."""
    width = channels * bits // 8
    head = struct.pack("<HHIIHH", code, channels, rate, rate * width % 2**32, width % 2**16, bits)
    size = struct.pack("<I", len(data) if claimed is None else claimed)
    return b"RIFF" + size + b"WAVEfmt " + struct.pack("<I", 16) + head + b"data" + size + data


def with_declared_samples(flac: bytes, samples: int) -> bytes:
    """Replace the number of samples (36 bits, 0 for unknown) in the STREAMINFO of a FLAC file."""
    info = bytearray(flac)
    info[21] = info[21] & 0xF0 | samples >> 32
    info[22:26] = struct.pack(">I", samples & 0xFFFFFFFF)
    return bytes(info)


@functools.cache
def _hour_of_silence() -> bytes:
    return _encoded(np.zeros(16_000 * 3_600, dtype=np.float32), "FLAC")


def _encoded(samples: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, 16_000, format=format)
    return file.getvalue()
