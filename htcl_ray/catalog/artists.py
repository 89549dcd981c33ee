"""Group songs that share an artist, directly or through other songs, so that a split keeps them together.

A credit is split at ';' and at feat., ft. and featuring. '&', 'and', ',', '+', 'x', 'vs.' and 'with' also occur in
names (Simon & Garfunkel; Earth, Wind & Fire), so a credit is split at them only if the catalogue credits every part on
its own elsewhere. A credit is never split at '/'. Names are compared by `artist_key`; placeholders such as Various
Artists count as no artist.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_FEATURED = re.compile(r"\s*[(\[]?\s*(?<!\w)(?:feat|ft|featuring)(?:\.\s*|\s+)", re.IGNORECASE)
_JOINED = re.compile(r"\s*,\s*(?:(?:and|&)\s+)?|\s+(?:&|and|\+|x|×|vs\.?|with)\s+", re.IGNORECASE)
_LETTERS = str.maketrans(
    {"ø": "o", "ł": "l", "đ": "d", "ħ": "h", "ŧ": "t", "ı": "i", "æ": "ae", "œ": "oe", "’": "'", "‐": "-"}
)
_PLACEHOLDERS = frozenset(
    (
        "various artists",
        "various artist",
        "various",
        "various interprets",
        "various performers",
        "va",
        "v a",
        "verschiedene interpreten",
        "verschiedene",
        "diverse",
        "diverse interpreten",
        "artistes divers",
        "artistes varies",
        "varios artistas",
        "varios",
        "artisti vari",
        "unknown artist",
        "unknown artists",
        "unknown",
        "no artist",
        "none",
        "null",
        "n a",
        "na",
        "anonymous",
        "traditional",
        "soundtrack",
        "original soundtrack",
    )
)


def artist_key(name: str) -> str:
    """Normalise an artist's name to a key that is equal for all its spellings.

    Case, white space, punctuation, Unicode form and diacritics of Latin, Greek and Cyrillic are ignored. A name that
    consists of punctuation only is its own key.
    """
    folded = unicodedata.normalize("NFKC", name).casefold().translate(_LETTERS)
    letters = [letter for letter in unicodedata.normalize("NFKD", folded) if not "\u0300" <= letter <= "\u036f"]
    words = "".join(" " if unicodedata.category(letter)[0] in "PS" else letter for letter in letters if letter != "'")
    return " ".join(unicodedata.normalize("NFKC", words).split()) or folded.strip()


def is_placeholder(key: str) -> bool:
    """Whether an artist key names no artist, such as Various Artists, V.A., Unknown and '-'."""
    return key in _PLACEHOLDERS or not key or set(key) == {"-"}


def credits_of(cell: str | None) -> list[str]:
    """Split an artist cell at ';' and at featured guests, which are certain separators; spelling stays."""
    names = []
    for entry in (cell or "").split(";"):
        first, *guests = _FEATURED.split(entry)
        names += [first, *(guest if "(" in guest or "[" in guest else guest.rstrip(" )]") for guest in guests)]
    return [name for name in (" ".join(name.split()) for name in names) if name]


def credits_of_cells(cells: pa.Array) -> list[list[str]]:
    """Apply `credits_of` to each cell, in lower case; fast when most cells credit a single artist."""
    several = pc.fill_null(pc.match_substring_regex(cells, r"(?i);|\b(feat|ft|featuring)\b"), False).to_pylist()
    lower = pc.utf8_lower(cells).to_pylist()
    return [credits_of(cell) if many else [cell] if cell else [] for cell, many in zip(lower, several, strict=True)]


def credited_keys(cells: Sequence[str | None]) -> list[list[str]]:
    """Return the keys of the artists that each cell credits, without placeholders, split as the module describes."""
    names = [credits_of(cell) for cell in cells]
    known = {artist_key(name) for of_cell in names for name in of_cell}
    keys = [[key for name in of_cell for key in (artist_key(name), *_joined_parts(name, known))] for of_cell in names]
    return [[key for key in dict.fromkeys(of_cell) if not is_placeholder(key)] for of_cell in keys]


def _joined_parts(name: str, known: set[str]) -> list[str]:
    """Return the keys of the parts of a joint credit if every part is also credited on its own, else nothing."""
    parts = [artist_key(part) for part in _JOINED.split(name) if part]
    return parts if len(parts) > 1 and known.issuperset(parts) else []


def artist_groups(artists: pa.ChunkedArray, duplicate_groups: pa.ChunkedArray | None = None) -> pa.Array:
    """Assign songs to groups: connected components over shared artists and shared duplicate groups.

    A group is named after the first of its artists, `artist:<key>`, or without artists after the first of its duplicate
    groups, `recording:<group>`; null for a song that has neither.
    """
    coded = artists.combine_chunks().dictionary_encode()
    keys = credited_keys(coded.dictionary.to_pylist())
    names = sorted({key for of_cell in keys for key in of_cell})
    number = {name: place for place, name in enumerate(names)}
    of_song = pa.array([[number[key] for key in of_cell] for of_cell in keys], pa.list_(pa.int64())).take(coded.indices)
    songs, labels = [pc.list_parent_indices(of_song).to_numpy()], [pc.list_flatten(of_song).to_numpy()]
    label_names = [f"artist:{name}" for name in names]
    if duplicate_groups is not None:
        recordings = duplicate_groups.unique().sort()
        songs.append(np.arange(len(duplicate_groups)))
        labels.append(pc.index_in(duplicate_groups, value_set=recordings).to_numpy() + len(names))
        label_names += [f"recording:{group}" for group in recordings.to_pylist()]
    edges = np.concatenate(songs) + len(label_names), np.concatenate(labels)
    size = len(label_names) + len(artists)
    from scipy import sparse
    from scipy.sparse.csgraph import connected_components

    count, component = connected_components(
        sparse.coo_array((np.ones(len(edges[0]), np.int8), edges), shape=(size, size)), directed=False
    )
    first_label = np.full(count, len(label_names))
    np.minimum.at(first_label, component[: len(label_names)], np.arange(len(label_names)))
    return pa.array([*label_names, None], pa.string()).take(pa.array(first_label[component[len(label_names) :]]))
