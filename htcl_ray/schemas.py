"""Schemas of all tables and records that are stored or exchanged: columns, types and enumerations.

Other systems read the tables of a workspace, so a change here changes the format version.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Self, get_args, get_origin

import pyarrow as pa
from pydantic import BaseModel, Field
from pydantic.fields import FieldInfo

FORMAT_VERSION = 3
"""Format version of all manifests and tables of a workspace, raised when an old reader would misread a new file."""


class Split(StrEnum):
    """Part of the data to which a song or pair belongs."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class Feedback(StrEnum):
    """Reaction of a user to a song, as in the `feedback` column of a log."""

    LIKE = "like"
    COLLECT = "collect"
    SHARE = "share"
    COMPLETE = "complete"
    PLAY = "play"
    SKIP = "skip"
    DISLIKE = "dislike"


class Reason(StrEnum):
    """Reason why a row of a catalogue or log, or an upload, was rejected."""

    UNREADABLE_ROW = "unreadable_row"
    MISSING_SONG_ID = "missing_song_id"
    MISSING_AUDIO_PATH = "missing_audio_path"
    AUDIO_NOT_FOUND = "audio_not_found"
    ACCESS_DENIED = "access_denied"
    UNSUPPORTED_URI = "unsupported_uri"
    AUDIO_EMPTY = "audio_empty"
    UNDECODABLE = "undecodable"
    DECODER_MISSING = "decoder_missing"
    TOO_SHORT = "too_short"
    NOT_FINITE = "not_finite"
    MISSING_VECTOR = "missing_vector"
    WRONG_VECTOR_WIDTH = "wrong_vector_width"
    SILENT = "silent"
    TOO_LONG = "too_long"
    TOO_MANY_CHANNELS = "too_many_channels"
    SAMPLE_RATE_TOO_HIGH = "sample_rate_too_high"
    DECODER_CRASHED = "decoder_crashed"
    DECODER_TIMED_OUT = "decoder_timed_out"
    MISSING_TEXT = "missing_text"
    UNKNOWN_SPLIT = "unknown_split"
    MISSING_USER_ID = "missing_user_id"
    UNKNOWN_SONG = "unknown_song"
    UNKNOWN_TRIGGER_SONG = "unknown_trigger_song"
    BAD_TIMESTAMP = "bad_timestamp"
    BAD_FEEDBACK = "bad_feedback"
    BAD_PLAYED_RATIO = "bad_played_ratio"
    BAD_WEIGHT = "bad_weight"
    BAD_RATING = "bad_rating"


@dataclass(frozen=True)
class ColumnTraits:
    """Uses of one metadata column, apart from its name, type and description."""

    filterable: bool = True
    """Searches can filter by the column."""
    tag: bool = False
    """Its values are compared with the query for `shared_tags`, and are listed by `htcl demo`."""
    in_results: bool = True
    """Search results carry the column; without it, only `GET /v1/songs/{song_id}` does."""
    printed: bool = False
    """The table that `htcl search` prints has the column."""
    player: str | None = None
    """Name of the same fact in a song of the OpenSubsonic API, in the same type; None where players do not get it."""
    max_length: int = 1_000
    """Characters that the HTTP API accepts for one value."""


class Metadata(BaseModel):
    """The optional columns of a catalogue, each declared once; absent values are null.

    The declaration order is the column order of every table. Catalogue columns, index tables, filters, requests,
    responses, the client's models, the tables in the terminal and the songs of players are derived from it. A column
    holds text (`str`), whole numbers (`int`), or a list of texts, stored as a list even where the input has one value.
    """

    title: Annotated[str | None, ColumnTraits(printed=True)] = Field(None, description="Title of the song.")
    artist: Annotated[str | None, ColumnTraits(printed=True, player="artist")] = Field(
        None, description="Credited artist, or several in one text, as in 'A feat. B'."
    )
    album: Annotated[str | None, ColumnTraits(player="album")] = Field(
        None, description="Album on which the song was released."
    )
    lyrics: Annotated[str | None, ColumnTraits(filterable=False, in_results=False, max_length=100_000)] = Field(
        None, description="Full lyrics of the song."
    )
    licence: Annotated[str | None, ColumnTraits()] = Field(
        None, description="Licence under which the recording may be used, such as 'CC BY 4.0'."
    )
    genre: Annotated[list[str] | None, ColumnTraits(tag=True, printed=True)] = Field(
        None, description="Genres of the song."
    )
    mood: Annotated[list[str] | None, ColumnTraits(tag=True, printed=True, player="moods")] = Field(
        None, description="Moods of the song, such as 'calm'."
    )
    tags: Annotated[list[str] | None, ColumnTraits(tag=True, printed=True)] = Field(
        None, description="Free-form tags of the song."
    )
    language: Annotated[list[str] | None, ColumnTraits()] = Field(None, description="Languages of the lyrics.")
    year: Annotated[int | None, ColumnTraits(player="year")] = Field(None, description="Year of release.")
    isrc: Annotated[str | None, ColumnTraits(in_results=False)] = Field(
        None, description="International Standard Recording Code of the recording, such as 'GBAYE0601498'."
    )


@dataclass(frozen=True)
class MetadataColumn:
    """One column of `Metadata`, read from its declaration."""

    name: str
    type: type[str] | type[int]
    """Type of a single value."""
    is_list: bool
    description: str
    traits: ColumnTraits

    @classmethod
    def of(cls, name: str, field: FieldInfo) -> Self:
        """The column that a field of `Metadata` declares."""
        kind = get_args(field.annotation)[0]  # of `kind | None`
        is_list = get_origin(kind) is list
        traits = next(item for item in field.metadata if isinstance(item, ColumnTraits))
        return cls(name, get_args(kind)[0] if is_list else kind, is_list, field.description or "", traits)

    @property
    def arrow(self) -> pa.Field:
        """The column of Arrow tables."""
        value = pa.int32() if self.type is int else pa.string()
        return pa.field(self.name, pa.list_(value) if self.is_list else value)


METADATA_COLUMNS = tuple(MetadataColumn.of(name, field) for name, field in Metadata.model_fields.items())
METADATA = pa.schema([column.arrow for column in METADATA_COLUMNS])
"""Metadata columns as features, indexes and updates store them."""
LIST_METADATA = tuple(column.name for column in METADATA_COLUMNS if column.is_list)
TEXT_METADATA = tuple(column.name for column in METADATA_COLUMNS if column.type is str and not column.is_list)
TAG_COLUMNS = tuple(column.name for column in METADATA_COLUMNS if column.traits.tag)
PRINTED_COLUMNS = tuple(column.name for column in METADATA_COLUMNS if column.traits.printed)
ESTIMATED = "estimated"
"""Column of tables and responses that names the columns of a song whose values were estimated from its audio."""
RESULT_COLUMNS = ("song_id", *(column.name for column in METADATA_COLUMNS if column.traits.in_results), ESTIMATED)
"""Columns that each search result carries."""

CATALOG_COLUMNS = ("song_id", "audio_path", "vector", *METADATA.names)
LOG_COLUMNS = ("user_id", "trigger_song_id", "song_id", "feedback", "timestamp", "played_ratio", "weight", "rating")


def features_schema(frames: int, width: int) -> pa.Schema:
    """Schema of `features/<fingerprint>/*.parquet`.

    `features` is [frames, width] fp16: log-mel frames in dB (reference power 1.0), vectors of windows of a pretrained
    encoder, or the song's given vector as its only frame. Only the first `valid_frames` frames are the song's, the rest
    is padding that no reader may use. `decoded_share` is 1 unless a damaged file could be decoded only in part (see
    `audio.decode.Clip`). `audio_path` is absolute or a URI, and null for a song that has only a vector.
    """
    return pa.schema(
        [
            pa.field("song_id", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("features", pa.fixed_shape_tensor(pa.float16(), (frames, width)), nullable=False),
            pa.field("valid_frames", pa.int32(), nullable=False),
            pa.field("split", pa.string(), nullable=False),
            pa.field("decoded_share", pa.float32(), nullable=False),
            pa.field("duplicate_group", pa.string(), nullable=False),
            pa.field("audio_path", pa.string()),
            *METADATA,
        ]
    )


EVENTS = pa.schema(
    [
        pa.field("user_id", pa.string(), nullable=False),
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("trigger_song_id", pa.string()),
        pa.field("value", pa.float32(), nullable=False),
        pa.field("timestamp", pa.float64()),
        pa.field("held_out_user", pa.bool_(), nullable=False),
        pa.field("period", pa.string(), nullable=False),
    ]
)
"""`events/<fingerprint>/*.parquet`: accepted rows of all kinds of logs in one form.

`value`: > 0 positive (its magnitude is the strength), 0 neutral exposure, < 0 negative. `timestamp`: epoch seconds,
null for affinity logs and ratings. `period`: train, validation or test, by time (without a timestamp: train).
`held_out_user`: the events of this user are in no training pair.
"""

PAIRS = pa.schema(
    [
        pa.field("trigger_song_id", pa.string(), nullable=False),
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("support", pa.int64(), nullable=False),
        pa.field("first_timestamp", pa.float64()),
        pa.field("last_timestamp", pa.float64()),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""`pairs/<fingerprint>/*.parquet`, and `negatives/<fingerprint of the pairs>/*.parquet` with explicit negatives."""

QUARANTINE = pa.schema(
    [
        pa.field("song_id", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def embeddings_schema(dim: int) -> pa.Schema:
    """Schema of `embeddings/<fingerprint>/*.parquet`: unit-norm fp32 vectors; `preference` is null without stage 2."""
    vector = pa.list_(pa.float32(), dim)
    return pa.schema(
        [
            pa.field("song_id", pa.string(), nullable=False),
            pa.field("semantic", vector, nullable=False),
            pa.field("preference", vector),
        ]
    )


ESTIMATES = pa.schema(
    [pa.field("song_id", pa.string(), nullable=False), *(METADATA.field(name) for name in TAG_COLUMNS)]
)
"""`estimates/<fingerprint>/*.parquet`: values that were estimated from the audio, best first, for songs and columns
without a stated value; see `catalog/auto_tags.py`. Null where a value is stated or none reaches the minimum score."""

INDEX_SONGS = pa.schema(
    [
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("audio_path", pa.string()),
        pa.field("duplicate_group", pa.string()),
        *METADATA,
        pa.field(ESTIMATED, pa.list_(pa.string())),
    ]
)
"""`index/<version>/songs.parquet`: row i describes vector i of `index.faiss`.

`estimated`: names of the columns in TAG_COLUMNS whose values were estimated from the audio, null without any.
"""

SONG_MAP = pa.schema(
    [
        pa.field("song_id", pa.string(), nullable=False),
        pa.field("x", pa.float32(), nullable=False),
        pa.field("y", pa.float32(), nullable=False),
    ]
)
"""`index/<version>/map.parquet`: a 2-D map of at most 5,000 songs, with coordinates from 0 to 1."""

UPDATES = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("op", pa.string(), nullable=False),
        pa.field("semantic", pa.list_(pa.float32())),
        pa.field("preference", pa.list_(pa.float32())),
        pa.field("semantic_model", pa.string()),
        pa.field("preference_model", pa.string()),
        *INDEX_SONGS,
    ]
)
"""`updates/*.arrow`: songs added to or removed from an index while it is served; see `index/live/update_log.py`.

`name` orders the updates; the update of a song with the greatest name is in effect. `op`: `upsert` or `remove`.
`semantic_model`, `preference_model`: fingerprints of the weights.
"""
