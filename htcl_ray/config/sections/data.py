"""Audio, the user's tables, and how pairs are mined from logs."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from htcl_ray.config.sections.base import Names, Settings, nearest
from htcl_ray.schemas import CATALOG_COLUMNS, LOG_COLUMNS, Feedback


class AudioRecipe(Settings):
    """How a waveform becomes a log-mel spectrogram. Two models with different recipes cannot share features."""

    sample_rate: int = Field(16000, gt=0)
    """In Hz; audio is averaged to mono, then resampled to this rate."""
    clip_seconds: float = Field(120.0, gt=0)
    """Only the first seconds of a song are decoded."""
    min_seconds: float = Field(0.1, gt=0)
    """Shorter audio is quarantined as `too_short`."""
    n_fft: int = Field(2048, gt=0)
    """Hann window, in samples."""
    hop_length: int = Field(1536, gt=0)
    """Samples between frames."""
    n_mels: int = Field(128, gt=0)
    f_min: float = Field(0.0, ge=0)
    """Lowest mel band edge, in Hz."""
    f_max: float | None = None
    """Highest mel band edge, in Hz; null is half the sample rate."""
    top_db: float = Field(80.0, gt=0)
    """Cells quieter than the loudest by more than this, in dB, are raised to that floor."""

    @property
    def max_samples(self) -> int:
        """Samples of a full clip."""
        return round(self.clip_seconds * self.sample_rate)

    @property
    def max_frames(self) -> int:
        """Frames of a full clip (centred windows)."""
        return self.frames_of(self.clip_seconds)

    def frames_of(self, seconds: float) -> int:
        """Frames of a clip of this length."""
        return 1 + round(seconds * self.sample_rate) // self.hop_length

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.f_max is not None and not self.f_min < self.f_max <= self.sample_rate / 2:
            raise ValueError(
                f"f_max is {self.f_max} Hz; expected more than f_min ({self.f_min}) and at most sample_rate / 2"
            )
        if self.clip_seconds < self.min_seconds:
            raise ValueError(f"clip_seconds is {self.clip_seconds}; expected at least min_seconds ({self.min_seconds})")
        return self


class DataSettings(Settings):
    """The user's tables and how they are split."""

    catalog: Names = ()
    """Catalogue table(s): Parquet, CSV, JSON Lines or Arrow IPC; path or URI."""
    interactions: Names = ()
    """Log table(s) in the feedback, plays, affinity or ratings shape; empty trains stage 1 only."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our column name → the name in the user's tables, for columns that are called otherwise."""
    text_columns: Names = ("title", "artist", "album", "genre", "mood", "tags", "language", "year", "lyrics")
    """Catalogue columns that form the song text, in this order; any column of the catalogue may be named."""
    split_column: str | None = None
    """Catalogue column with train, validation or test; null splits by hash (see split_shares)."""
    split_shares: tuple[float, float, float] = (0.8, 0.1, 0.1)
    """Shares of train, validation and test: of artists by hash, and of the log's rows by time."""
    held_out_user_share: float = Field(0.1, ge=0, lt=1)
    """Share of users, by hash, whose events make no training pair; recommendation is evaluated on them."""
    max_rejected_share: float = Field(0.1, ge=0, le=1)
    """A catalogue or log with a larger share of rejected rows, over all its tables, fails the step."""
    songs_per_shard: int = Field(64, gt=0)
    """Songs per feature file: the unit of work and of resuming."""

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
        for ours in value:
            if ours not in known:
                raise ValueError(f"'{ours}' is not one of our columns; {nearest(ours, known)}")
        return value


class PairSettings(Settings):
    """How preference pairs are mined from logs."""

    positive_feedback: tuple[Feedback, ...] = (Feedback.LIKE, Feedback.COLLECT, Feedback.SHARE, Feedback.COMPLETE)
    """Feedback that says that the user wanted the song."""
    negative_feedback: tuple[Feedback, ...] = (Feedback.SKIP, Feedback.DISLIKE)
    """Feedback that says that the user did not; anything else is neutral exposure."""
    min_positive_rating: float | None = None
    """A rating (a number as feedback, or in the column `rating`) from here up is positive. Null is 4, for ratings of
    which the largest is 4 to 5; a log with another scale needs this key."""
    max_negative_rating: float = 2.0
    """A rating from here down is negative; one in between is neutral."""
    min_played_ratio: float = Field(0.5, ge=0, le=1)
    """A play without feedback is positive from this share of the song's length up, and neutral below."""
    session_gap_minutes: float = Field(30.0, gt=0)
    """Plays of one user further apart than this belong to different sessions."""
    min_support: int = Field(1, ge=1)
    """Distinct users that a pair needs."""
    repetition_saturation: float = Field(1.0, ge=0)
    """How much one user's repetitions of a pair add: s occurrences count s · (1 + this) / (s + this), as in BM25; 0
    counts users only."""
    max_occurrences_per_user: int | None = Field(500, ge=1)
    """Feedback and plays: what a user with more occurrences of pairs says counts less in proportion, in every pair;
    null is no cap."""
    support_discount: float = Field(0.99, ge=0, le=1)
    """Users whose evidence for a pair does not count: n equal users count n − this, so that one user, a coincidence,
    weighs little."""
    half_life_days: float | None = Field(None, gt=0)
    """Age at which an event counts half; null is no decay. The newest event of the training period has age 0."""
    max_pairs_per_song: int | None = Field(100, ge=1)
    """At most this many pairs, the heaviest, for each trigger song; null is no cap."""
    popularity_exponent: float = Field(0.5, ge=0, le=1)
    """Pair weight is divided by (popularity of trigger · popularity of song) to this power; 0 is no correction."""
    popularity_offset: float = Field(10.0, ge=0)
    """Added to both popularities (users who received the song well), so that rare songs do not weigh most."""
    max_songs_per_user: int = Field(200, ge=2)
    """Affinity logs and ratings: only a user's heaviest songs form pairs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.positive_feedback) & set(self.negative_feedback)
        if both:
            raise ValueError(
                f"{sorted(both)} is in positive_feedback and in negative_feedback; expected each value in one of them"
            )
        if self.max_negative_rating >= self.positive_from:
            raise ValueError(
                f"max_negative_rating is {self.max_negative_rating:g}; expected less than min_positive_rating ({self.positive_from:g})"
            )
        return self

    @property
    def positive_from(self) -> float:
        """`min_positive_rating`, or its default."""
        return 4.0 if self.min_positive_rating is None else self.min_positive_rating
