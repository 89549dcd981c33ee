"""Estimated genre, mood and tags of songs that have none, by the scores of a music tagger.

A column of a song is either stated by the catalogue or estimated, never both, so the names of its estimated columns
mark each estimated value.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from htcl_ray.schemas import ESTIMATED, ESTIMATES, TAG_COLUMNS

_GENRES = (
    "rock, pop, alternative, indie, electronic, dance, alternative rock, jazz, metal, classic rock, soul, indie rock, "
    "electronica, folk, punk, blues, hard rock, ambient, experimental, Hip-Hop, country, funk, electro, heavy metal, "
    "Progressive rock, rnb, indie pop, House"
)
_MOODS = "beautiful, chillout, Mellow, easy listening, sexy, party, sad, happy"
_TAGS = "female vocalists, male vocalists, instrumental, acoustic, guitar"
VALUES: dict[str, tuple[str, str]] = {
    **{
        tag: (column, tag.lower())
        for column, names in (("genre", _GENRES), ("mood", _MOODS), ("tags", _TAGS))
        for tag in names.split(", ")
    },
    "chill": ("mood", "chillout"),
    "female vocalist": ("tags", "female vocalists"),
}
"""Tag of a tagger → metadata column and value: the tags of the Million Song Dataset (Last.fm, 2011).

Decades and `oldies` are facts that audio does not tell, and `catchy` describes the listener; they are not used.
"""


def known_tags(tags: Sequence[str]) -> list[str]:
    """The tags of an encoder that are values of metadata columns."""
    return [tag for tag in tags if tag in VALUES]


def estimated_values(
    songs: pa.Table, scores: npt.NDArray[np.float32], tags: Sequence[str], min_score: float
) -> pa.Table:
    """Rows of ESTIMATES for songs with `song_id` and the columns TAG_COLUMNS.

    `scores` [songs, tags]: probabilities; of several tags with one value the greatest counts. A column of a song that
    has a value stays null, and so does one without a value of at least `min_score`. Values are in falling order.
    """
    places: dict[tuple[str, str], list[int]] = {}
    for place, tag in enumerate(tags):
        if tag in VALUES:
            places.setdefault(VALUES[tag], []).append(place)
    columns = {"song_id": songs["song_id"]}
    for column in TAG_COLUMNS:
        values = {
            value: scores[:, of_value].max(axis=1) for (name, value), of_value in places.items() if name == column
        }
        stated = pc.fill_null(pc.greater(pc.list_value_length(songs[column]), 0), False).to_pylist()
        columns[column] = pa.array(
            [None if given else _best(values, row, min_score) for row, given in enumerate(stated)],
            ESTIMATES.field(column).type,
        )
    return pa.table(columns, schema=ESTIMATES)


def _best(values: dict[str, npt.NDArray[np.float32]], row: int, min_score: float) -> list[str] | None:
    """Values of a song with at least this score, best first; None without any."""
    chosen = sorted((-float(scores[row]), value) for value, scores in values.items() if scores[row] >= min_score)
    return [value for _, value in chosen] or None


def completed(songs: pa.Table, estimates: pa.Table) -> pa.Table:
    """Fill the null or empty cells of TAG_COLUMNS from rows of ESTIMATES, and append the column `estimated`.

    Both tables have the same songs in the same order. A stated value is never replaced.
    """
    names: list[list[str]] = [[] for _ in range(songs.num_rows)]
    for column in TAG_COLUMNS:
        stated = pc.fill_null(pc.greater(pc.list_value_length(songs[column]), 0), False)
        given = estimates[column].combine_chunks()
        for row in np.flatnonzero(np.asarray(pc.and_(pc.invert(stated), pc.is_valid(given)))):
            names[row].append(column)
        cells = zip(stated.to_pylist(), songs[column].to_pylist(), given.to_pylist(), strict=True)
        filled = pa.array([own if is_stated else other for is_stated, own, other in cells], given.type)
        songs = songs.set_column(songs.schema.get_field_index(column), songs.schema.field(column), filled)
    return songs.append_column(ESTIMATED, pa.array([columns or None for columns in names], pa.list_(pa.string())))
