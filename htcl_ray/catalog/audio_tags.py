"""Metadata of one audio file: its tags (ID3, Vorbis comments, MP4, RIFF, AIFF), completed from its path.

Tags are text from a stranger: they are cut, stripped of control characters, and never interpreted. The parser is
`tinytag`, which is pure Python and reads tags only (docs/decisions/0030-run-and-import.md).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from typing import NamedTuple

from tinytag import TinyTag, TinyTagException

MAX_LENGTH = 1_000
"""Characters that are kept of one value."""
MAX_VALUES = 100
"""Values that are kept of one tag."""
NUMBERED = re.compile(r"(?:\d{1,2}[-.])?\d{1,3}(?:\s*[-._)]\s*|\s+)(?=\S)")
"""Track number in front of a title, such as `07 `, `07. `, `07 - ` or, with the disc, `1-07 `."""
DISC_FOLDER = re.compile(r"(?:cd|disc|disk)[\s_-]*\d{1,2}", re.IGNORECASE)
MOODS = ("mood", "tmoo", "wm/mood")
"""Names of one tag: in Vorbis comments, MP4 and free fields, in ID3v2.4, in ASF."""
YEAR = re.compile(r"(?<!\d)(1\d{3}|2\d{3})(?!\d)")


class SongTags(NamedTuple):
    """Metadata of one song; absent values are None or empty."""

    title: str | None = None
    artists: tuple[str, ...] = ()
    album: str | None = None
    genres: tuple[str, ...] = ()
    moods: tuple[str, ...] = ()
    year: int | None = None
    isrc: str | None = None

    def completed(self, other: SongTags) -> SongTags:
        """These tags, with those of `other` where a value is absent."""
        return self._replace(**{name: value for name, value in other._asdict().items() if not getattr(self, name)})


class TagError(Exception):
    """The tags of a file cannot be read."""


def read_tags(path: str) -> SongTags:
    """Read the tags of a file; empty for a format without tags. Raises TagError for damaged tags, OSError."""
    try:
        tags = TinyTag.get(path, duration=False, image=False)
    except TinyTagException as error:
        raise TagError((str(error).splitlines() or [type(error).__name__])[0]) from None
    artists = _values([tags.artist or "", *tags.other.get("artist", [])])
    years = YEAR.search(tags.year or "")
    return SongTags(
        title=_first([tags.title or ""]),
        artists=artists or _values([tags.albumartist or ""]),
        album=_first([tags.album or ""]),
        genres=_separated([tags.genre or "", *tags.other.get("genre", [])]),
        moods=_separated([value for name in MOODS for value in tags.other.get(name, [])]),
        year=int(years[1]) if years else None,
        isrc=_first(tags.other.get("isrc", [])),
    )


def tags_from_path(path: PurePath) -> SongTags:
    """Derive metadata from a path below the music folder.

    `Artist/Album/07 Title.flac`, also with a folder `CD 1` below the album, states all three. Any other path states a
    title only, its file name: a folder may as well be a genre, a year or a playlist.
    """
    stem = " ".join(path.stem.replace("_", " ").split())
    number = NUMBERED.match(stem)
    title = stem[number.end() :] if number else stem
    folders = [part for part in path.parts[:-1] if not DISC_FOLDER.fullmatch(part)]
    if number and len(folders) >= 2:
        return SongTags(_tidy(title), _values([folders[-2]]), _tidy(folders[-1]))
    return SongTags(_tidy(title) or _tidy(path.name))


def _tidy(value: str) -> str | None:
    """One line of printable text; None when nothing is left."""
    text = value[: 4 * MAX_LENGTH].encode("utf-8", "replace").decode()
    text = "".join(" " if unicodedata.category(character) in ("Cc", "Cs") else character for character in text)
    return " ".join(text.split())[:MAX_LENGTH].strip() or None


def _values(values: Iterable[str]) -> tuple[str, ...]:
    """The distinct values of a tag, in order. Null characters separate values in ID3v2.4."""
    parts = (part for value in values for part in value.split("\0"))
    return tuple(dict.fromkeys(text for part in parts if (text := _tidy(part))))[:MAX_VALUES]


def _separated(values: Sequence[str]) -> tuple[str, ...]:
    """Like `_values`, for labels of which programs write several into one value, separated by semicolons."""
    return _values(part for value in values for part in value.split(";"))


def _first(values: Iterable[str]) -> str | None:
    return next(iter(_values(values)), None)
