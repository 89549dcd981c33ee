"""Sections `data`, `catalog` and `pairs`: input tables and their split, missing metadata, and preference pairs."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from htcl_ray.config.sections.base import Names, Settings, nearest
from htcl_ray.schemas import CATALOG_COLUMNS, LOG_COLUMNS, Feedback


class DataSettings(Settings):
    """Input tables (catalogue and interaction logs) and their train, validation and test split."""

    catalog: Names = ()
    """Catalogue tables, one path or URI or a list: Parquet, CSV, JSON Lines or Arrow IPC."""
    interactions: Names = ()
    """Interaction logs, one path or URI or a list, with the columns of feedback, plays, affinity or ratings. Empty:
    only stage 1 can be trained."""
    vectors: Names = ()
    """Tables with the columns `song_id` and `vector`, for `audio.extractor: vectors`. Empty: the vectors are in the
    column `vector` of the catalogue."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of columns in your tables that differ from the expected names, as `expected name: your name`."""
    text_columns: Names = ("title", "artist", "album", "genre", "mood", "tags", "language", "year", "lyrics")
    """Catalogue columns that are joined into the text of a song, in this order. Any column of the catalogue is
    possible."""
    split_column: str | None = None
    """Catalogue column with the values train, validation or test. Null: songs are split by a hash of the artist (see
    `split_shares`)."""
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test, which sum to 1: of artists (by hash), and of the rows of a log (by
    time)."""
    held_out_user_share: float = Field(0.1, ge=0, lt=1)
    """Share of users, from 0 to below 1 and chosen by hash, whose interactions form no training pair. Recommendation is
    evaluated on them."""
    max_rejected_share: float = Field(0.1, ge=0, le=1)
    """Maximum share of rejected rows, from 0 to 1, over all tables of the catalogue or log. Preprocessing fails above
    it."""
    songs_per_shard: int = Field(64, gt=0)
    """Number of songs per feature file, which is the unit of parallel work and of resuming. A file of given vectors
    holds 64 times as many, because they need no decoding."""

    @field_validator("split_shares")
    @classmethod
    def _shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) < 0 or value[0] == 0 or abs(sum(value) - 1) > 1e-6:
            raise ValueError(
                f"the shares are {list(value)}; expected three numbers from 0 that sum to 1, the first above 0"
            )
        return value

    @field_validator("columns")
    @classmethod
    def _columns(cls, value: dict[str, str]) -> dict[str, str]:
        known = sorted({*CATALOG_COLUMNS, *LOG_COLUMNS})
        for name in value:
            if name not in known:
                raise ValueError(f"'{name}' is not an expected column name; {nearest(name, known)}")
        return value


class CatalogSettings(Settings):
    """Completion of the catalogue's metadata."""

    auto_tags: bool = False
    """Complete the genre, mood and tags of songs that have none of them, by the tags of a pretrained music tagger
    (`audio.extractor: pretrained` with `make pretrained-audio`). Estimated values are marked wherever they are shown;
    what the catalogue states, training and evaluation stay as they are."""
    auto_tags_min_score: float = Field(0.2, gt=0, le=1)
    """Lowest score of an estimated value, above 0 to 1: the probability that the tagger gives a tag, as the mean over
    the windows of a song. Lower: more values, more of them wrong."""

    def check_extractor(self, extractor: str) -> None:
        """Raise ValueError when estimated tags are to come from another extractor than a pretrained encoder."""
        if self.auto_tags and extractor != "pretrained":
            raise ValueError(
                f"catalog.auto_tags needs a pretrained encoder that gives tags, but audio.extractor is {extractor}; "
                "set audio.extractor=pretrained with such an encoder, or catalog.auto_tags=false"
            )


class PairSettings(Settings):
    """Mining of preference pairs from interaction logs."""

    positive_feedback: tuple[Feedback, ...] = (Feedback.LIKE, Feedback.COLLECT, Feedback.SHARE, Feedback.COMPLETE)
    """Values of the `feedback` column that count as positive."""
    negative_feedback: tuple[Feedback, ...] = (Feedback.SKIP, Feedback.DISLIKE)
    """Values of the `feedback` column that count as negative. All other values are neutral exposure."""
    min_positive_rating: float | None = None
    """Lowest positive rating, in the `rating` column or as a number in `feedback`. Null: 4, for logs whose highest
    rating is between 4 and 5; a log with another scale requires this key."""
    max_negative_rating: float = 2.0
    """Highest negative rating. Ratings between this and `min_positive_rating` are neutral."""
    min_played_ratio: float = Field(0.5, ge=0, le=1)
    """Minimum played share of a song, from 0 to 1, from which a play without feedback is positive; below it is
    neutral."""
    session_gap_minutes: float = Field(30.0, gt=0)
    """Minimum pause in minutes between two plays of a user that starts a new session."""
    min_support: int = Field(1, ge=1)
    """Minimum number of distinct users of a pair. Pairs with fewer are dropped."""
    repetition_saturation: float = Field(1.0, ge=0)
    """Weight of repetitions of a pair by one user, at least 0: s occurrences count s · (1 + x) / (s + x), as in BM25.
    0: only distinct users count."""
    max_occurrences_per_user: int | None = Field(500, ge=1)
    """Cap on the influence of one user (feedback and plays): all pairs of a user with more occurrences than this are
    scaled down in proportion. Null: no cap."""
    support_discount: float = Field(0.99, ge=0, le=1)
    """Discount of the support, from 0 to 1: n equal users count n − x, so that pairs of a single user, which may be a
    coincidence, have little weight."""
    half_life_days: float | None = Field(None, gt=0)
    """Age in days at which an event counts half. The newest event of the training period has age 0. Null: no time
    decay."""
    max_pairs_per_song: int | None = Field(100, ge=1)
    """Maximum number of pairs per trigger song; those of the highest weight are kept. Null: no maximum."""
    popularity_exponent: float = Field(0.5, ge=0, le=1)
    """Exponent of the popularity correction, from 0 to 1: pair weights are divided by (popularity of the trigger song ·
    popularity of the recalled song) to this power. 0: no correction."""
    popularity_offset: float = Field(10.0, ge=0)
    """Number added to both popularities (users with positive feedback), so that rare songs do not get the highest
    weights."""
    max_songs_per_user: int = Field(200, ge=2)
    """Maximum number of songs of one user, those of the highest weight, that form pairs in affinity logs and
    ratings."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.positive_feedback) & set(self.negative_feedback)
        if both:
            raise ValueError(
                f"{sorted(both)} is in positive_feedback and in negative_feedback; expected each value in one of them"
            )
        if self.max_negative_rating >= self.positive_from:
            raise ValueError(
                f"max_negative_rating is {self.max_negative_rating:g}; expected less than min_positive_rating "
                f"({self.positive_from:g})"
            )
        return self

    @property
    def positive_from(self) -> float:
        """The lowest positive rating: `min_positive_rating`, or its default of 4."""
        return 4.0 if self.min_positive_rating is None else self.min_positive_rating
