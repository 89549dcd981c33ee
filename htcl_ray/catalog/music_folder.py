"""A folder of music files as a catalogue table: its songs with their tags, and the files that cannot be read."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import stat
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import NamedTuple

import pyarrow as pa

from htcl_ray.audio.formats import EXTENSIONS, FORMATS
from htcl_ray.catalog.audio_tags import SongTags, TagError, read_tags, tags_from_path
from htcl_ray.errors import TableError

IMPORTED = pa.schema(
    [
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("audio_path", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("artist", pa.string()),
        pa.field("album", pa.string()),
        pa.field("genre", pa.list_(pa.string())),
        pa.field("mood", pa.list_(pa.string())),
        pa.field("year", pa.int32()),
        pa.field("isrc", pa.string()),
    ]
)
"""The catalogue; `audio_path` is absolute."""
READ_AT_ONCE = 8
"""Threads that read tags: on a network drive they wait, on a disk the interpreter limits them."""
SYSTEM_FOLDERS = frozenset({"__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information"})
NEEDS_FFMPEG = frozenset(extension for kind in FORMATS if kind.needs_ffmpeg for extension in kind.extensions)


class Rejection(StrEnum):
    """Reason why a file or folder is in rejected.csv."""

    AUDIO_EMPTY = "audio_empty"
    ACCESS_DENIED = "access_denied"
    MISSING = "missing"
    DECODER_MISSING = "decoder_missing"
    NAME_NOT_UTF8 = "name_not_utf8"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    UNREADABLE_TAGS = "unreadable_tags"
    """The only reason of a song that is in the catalogue: it is named after its path."""


class Rejected(NamedTuple):
    """One row of rejected.csv."""

    path: str
    """Relative to the music folder."""
    reason: Rejection
    detail: str


class MusicFile(NamedTuple):
    """One file to import: its path below the music folder, and its absolute path."""

    relative: str
    path: str


@dataclass
class Listing:
    """The content of a music folder, by file names alone."""

    files: list[MusicFile] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    other: Counter[str] = field(default_factory=Counter)
    """Files that are no audio, by extension."""
    hidden: int = 0
    repeated: int = 0
    """Links to folders and files that are listed already."""


@dataclass(frozen=True)
class ImportedFolder:
    """The catalogue of a music folder."""

    songs: pa.Table
    """Schema IMPORTED, in the order of the paths."""
    rejected: list[Rejected]
    tagged: int
    """Songs with at least one tag."""


def list_music(folder: str) -> Listing:
    """List the audio files below a folder, by extension.

    Hidden files and folders, and those of operating systems, are left out. Symbolic links are followed after everything
    else, each folder and file once, so a loop ends and a song keeps its path when a link to it is added. Raises
    TableError when the folder itself cannot be listed.
    """
    listing = Listing()
    seen: set[tuple[int, int]] = set()
    folders, links = deque([""]), deque[str]()
    while folders or links:
        relative = folders.popleft() if folders else links.popleft()
        path = os.path.join(folder, relative)
        try:
            info = os.stat(path)
            if (info.st_dev, info.st_ino) in seen:
                listing.repeated += 1
                continue
            if not stat.S_ISDIR(info.st_mode):
                _add_file(listing, MusicFile(relative, path), info)
                seen.add((info.st_dev, info.st_ino))
                continue
            seen.add((info.st_dev, info.st_ino))
            with os.scandir(path) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            if not relative:
                raise TableError(
                    f"the folder {folder} cannot be listed: {error.strerror}; give a folder of music"
                ) from None
            if _is_audio(relative) or not isinstance(error, FileNotFoundError):  # a broken link to a picture is no loss
                listing.rejected.append(Rejected(relative, *_failure(error)))
            continue
        for entry in entries:
            name = os.path.join(relative, entry.name)
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FOLDERS:
                listing.hidden += 1
            elif entry.is_symlink():
                links.append(name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(name)
            else:
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError as error:
                    listing.rejected.append(Rejected(name, *_failure(error)))
                    continue
                seen.add((info.st_dev, info.st_ino))
                _add_file(listing, MusicFile(name, entry.path), info)
    listing.files.sort()
    return listing


def read_songs(listing: Listing, on_file: Callable[[], None] = lambda: None) -> ImportedFolder:
    """Read the tags of listed files; `on_file` is called after each. Audio is not decoded: `htcl preprocess` does that.

    The id of a song is a hash of its path below the music folder: it stays when tags change, and when the music folder
    is moved as a whole.
    """
    rejected, rows, tagged = list(listing.rejected), [], 0
    with ThreadPoolExecutor(READ_AT_ONCE) as pool:
        for file, (tags, fault) in zip(listing.files, pool.map(_tags, listing.files), strict=True):
            on_file()
            if fault is not None:
                rejected.append(fault)
            if tags is None:
                continue
            tagged += any(tags)
            rows.append(_row(file, tags.completed(tags_from_path(PurePath(file.relative)))))
    songs = pa.Table.from_pylist([dict(zip(IMPORTED.names, row, strict=True)) for row in rows], schema=IMPORTED)
    return ImportedFolder(songs, rejected, tagged)


def _row(file: MusicFile, tags: SongTags) -> tuple[object, ...]:
    song_id = hashlib.blake2b(os.fsencode(file.relative), digest_size=8).hexdigest()
    genres, moods = (list(values) or None for values in (tags.genres, tags.moods))
    artist = "; ".join(tags.artists) or None
    return song_id, file.path, tags.title or file.relative, artist, tags.album, genres, moods, tags.year, tags.isrc


def _tags(file: MusicFile) -> tuple[SongTags | None, Rejected | None]:
    """Tags of a file, or None if it cannot be opened; and the row of rejected.csv, if any."""
    try:
        return read_tags(file.path), None
    except TagError as error:
        detail = f"the song is imported and named after its path ({error})"
        return SongTags(), Rejected(file.relative, Rejection.UNREADABLE_TAGS, detail)
    except OSError as error:
        return None, Rejected(file.relative, *_failure(error))


def _add_file(listing: Listing, file: MusicFile, info: os.stat_result) -> None:
    extension = os.path.splitext(file.relative)[1].lower()
    if extension not in EXTENSIONS:
        listing.other[extension or "without extension"] += 1
        return
    fault = _fault(file, extension, info)
    if fault is None:
        listing.files.append(file)
    else:
        listing.rejected.append(Rejected(file.relative, *fault))


def _fault(file: MusicFile, extension: str, info: os.stat_result) -> tuple[Rejection, str] | None:
    if not stat.S_ISREG(info.st_mode):
        return Rejection.NOT_A_FILE, "it is a pipe, a socket or a device"
    if not info.st_size:
        return Rejection.AUDIO_EMPTY, "the file is empty (0 bytes)"
    try:
        file.path.encode()
    except UnicodeEncodeError:
        return Rejection.NAME_NOT_UTF8, "tables hold UTF-8 only; rename the file"
    if extension in NEEDS_FFMPEG and importlib.util.find_spec("av") is None:
        return Rejection.DECODER_MISSING, "the format needs FFmpeg: pip install 'htcl-ray[ffmpeg]', and import again"
    return None


def _failure(error: OSError) -> tuple[Rejection, str]:
    reasons = {PermissionError: Rejection.ACCESS_DENIED, FileNotFoundError: Rejection.MISSING}
    return reasons.get(type(error), Rejection.UNREADABLE), error.strerror or str(error)


def _is_audio(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def count_reasons(rejected: list[Rejected]) -> Iterator[tuple[Rejection, int, Rejected]]:
    """Each reason, the most frequent first, with its number of rows and an example."""
    for reason, number in Counter(row.reason for row in rejected).most_common():
        yield reason, number, next(row for row in rejected if row.reason == reason)
