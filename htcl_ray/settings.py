"""The sections of a configuration: every knob with its type, range, default and meaning."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator, model_validator

from htcl_ray.schemas import CATALOG_COLUMNS, LOG_COLUMNS, Feedback


def _one_or_many(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Names = Annotated[tuple[str, ...], BeforeValidator(_one_or_many)]
"""One string or a list of strings."""


class Settings(BaseModel):
    """Base of every section: frozen, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


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
            raise ValueError(f"f_max is {self.f_max} Hz; expected more than f_min ({self.f_min}) and at most sample_rate / 2")
        if self.clip_seconds < self.min_seconds:
            raise ValueError(f"clip_seconds is {self.clip_seconds}; expected at least min_seconds ({self.min_seconds})")
        return self


class DataSettings(Settings):
    """The user's tables and how they are split."""

    catalog: Names = ()
    """Catalogue table(s): Parquet, CSV or JSON Lines; path or URI."""
    interactions: Names = ()
    """Log table(s) in the feedback, plays or affinity shape; empty trains stage 1 only."""
    columns: dict[str, str] = {}
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
            raise ValueError(f"the shares are {list(value)}; expected three numbers from 0 that sum to 1, the first above 0")
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
    min_positive_rating: float = 4.0
    """Numeric feedback from here up is positive."""
    max_negative_rating: float = 2.0
    """Numeric feedback from here down is negative."""
    min_played_ratio: float = Field(0.5, ge=0, le=1)
    """A play without feedback is positive from this share of the song's length up, and neutral below."""
    session_gap_minutes: float = Field(30.0, gt=0)
    """Plays of one user further apart than this belong to different sessions."""
    min_support: int = Field(1, ge=1)
    """Distinct users that a pair needs."""
    half_life_days: float | None = Field(None, gt=0)
    """Age at which an event counts half; null is no decay. The newest event of the training period has age 0."""
    max_pairs_per_song: int | None = Field(100, ge=1)
    """At most this many pairs, the heaviest, for each trigger song; null is no cap."""
    popularity_exponent: float = Field(0.5, ge=0, le=1)
    """Pair weight is divided by (positives of trigger · positives of song) to this power; 0 is no correction."""
    max_songs_per_user: int = Field(200, ge=2)
    """Affinity logs: only a user's heaviest songs form pairs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = set(self.positive_feedback) & set(self.negative_feedback)
        if both:
            raise ValueError(f"{sorted(both)} is in positive_feedback and in negative_feedback; expected each value in one of them")
        if self.max_negative_rating >= self.min_positive_rating:
            raise ValueError(f"max_negative_rating is {self.max_negative_rating}; expected less than min_positive_rating")
        return self


class TextSettings(Settings):
    """The text tower."""

    name_or_path: str | None = None
    """A BERT-like model by hub name or local folder; null trains a small BERT and its WordPiece vocabulary from the song texts."""
    pooling: Literal["pooler", "cls", "mean"] = "pooler"
    """Tokens → one vector: BERT's pooler over the first token as the authors (models made without one: the first token itself), the
    first token, or the mean over tokens, which sentence encoders such as MiniLM were trained for."""
    max_tokens: int = Field(128, gt=2)
    """Longer song texts are cut."""
    vocab_size: int = Field(2000, gt=10)
    """From scratch: WordPieces."""
    width: int = Field(128, gt=0)
    """From scratch: hidden size."""
    layers: int = Field(2, gt=0)
    """From scratch: Transformer layers."""
    heads: int = Field(4, gt=0)
    """From scratch: attention heads."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """From scratch: dropout in layers and attention."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        return self


class ModelSettings(Settings):
    """Audio tower, heads and fusion. Defaults are the paper's."""

    conv_channels: int = Field(512, gt=0)
    width: int = Field(768, gt=0)
    """Hidden size of the audio Transformer."""
    layers: int = Field(12, gt=0)
    heads: int = Field(12, gt=0)
    feed_forward: int = Field(3072, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    position_kernel: int = Field(31, gt=0)
    """Tokens that the convolutional position embedding sees; odd."""
    position_groups: int = Field(16, gt=0)
    head_hidden: tuple[int, ...] = (384, 192)
    """Hidden widths of the audio and text heads."""
    dim: int = Field(100, gt=0)
    """Width of the joint space."""
    window_seconds: float | None = Field(None, gt=0)
    """Longer clips are trained on in random crops of this length and embedded as the mean of evenly spaced windows; null: clips whole."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; expected a multiple of heads ({self.heads})")
        if self.width % self.position_groups:
            raise ValueError(f"width is {self.width}; expected a multiple of position_groups ({self.position_groups})")
        if self.position_kernel % 2 == 0:
            raise ValueError(f"position_kernel is {self.position_kernel}; expected an odd number")
        return self


class HealthSettings(Settings):
    """When a run has gone wrong: looked at after every epoch on a fixed probe batch of training songs or pairs."""

    action: Literal["warn", "stop", "off"] = "warn"
    """A loss or gradient that is no number stops the run whatever this says."""
    patience_steps: int = Field(200, ge=1)
    """Steps that a fault must last before it counts: every run begins near a plateau."""
    max_mean_cosine: float = Field(0.95, gt=-1, le=1)
    """Collapse: mean cosine between different songs' audio, or different texts, above this."""
    min_effective_rank: float = Field(2.0, ge=1)
    """Collapse: fewer directions in use than this, as exp of the entropy of the singular values of the centred vectors."""
    plateau_margin: float = Field(0.002, ge=0, lt=1)
    """Plateau: a softmax term within this share of the loss that equal vectors for all songs would have."""


BestMetric = Literal["loss", "validation_recall@10", "validation_median_rank", "validation_pair_recall@10", "validation_pair_median_rank"]
LOWER_IS_BETTER = ("loss", "validation_median_rank", "validation_pair_median_rank")


class StageSettings(Settings):
    """What both training stages share."""

    batch_size: int = Field(32, ge=2)
    """Global: rows of one loss, over all workers (stage 2: pairs)."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows that one worker encodes at a time; null is its whole share, auto what fits its memory. The gradient does not depend on it."""
    epochs: int = Field(20, ge=1)
    num_workers: int = Field(1, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    """Peak rate of heads, temperatures and, in stage 1, the audio encoder."""
    text_learning_rate: float = Field(1e-5, gt=0)
    """Peak rate of the text encoder."""
    weight_decay: float = Field(0.0, ge=0)
    """Above 0 is AdamW; matrices only."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of all steps with a linearly rising rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up: half a cosine to 0, or the peak rate to the end."""
    max_gradient_norm: float | None = Field(1.0, gt=0)
    """Gradients are scaled down to this global norm; null is no clipping."""
    loss: Literal["softmax", "sigmoid"] = "softmax"
    """softmax: InfoNCE, each row picks its match among the batch. sigmoid: each pair of rows is a match or not (SigLIP)."""
    mask_false_negatives: bool = True
    """Rows of one song, duplicate group, text or (stage 2) known pair are not each other's negatives; false is the published loss."""
    temperature: float = Field(0.074, ge=0.01, le=1)
    """Initial temperature of the contrastive losses; learned, kept at or above 0.01."""
    freeze_text: bool = False
    """The text encoder stays as it is; its head learns."""
    freeze_audio_layers: int = Field(0, ge=0)
    """The audio encoder's first Transformer layers, and all that comes before them, stay as they are; 0 freezes nothing."""
    time_masks: int = Field(0, ge=0)
    """Stretches of frames hidden from a training clip (SpecAugment, arXiv 1904.08779); 0 is none."""
    time_mask_frames: int = Field(40, ge=1)
    """Longest stretch; widths are uniform from 0. All stretches together never hide more than half of a clip."""
    mel_masks: int = Field(0, ge=0)
    """Groups of neighbouring mel bands hidden from a training clip; 0 is none."""
    mel_mask_bands: int = Field(16, ge=1)
    """Widest group; widths are uniform from 0."""
    compile: bool = False
    """Compile the towers with torch.compile: minutes at the start, faster steps; worth it on GPUs."""
    seed: int = Field(0, ge=0)
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """auto takes one GPU per worker when the cluster has GPUs."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """CPUs that a worker reserves from Ray; it computes with max(1, this) threads."""
    max_failures: int = Field(2, ge=0)
    """Times that a run restarts from its last checkpoint after losing a worker."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Checkpoints within an epoch, beside the one at its end; null is none. Counted from the first step of the run."""
    keep_checkpoints: int = Field(1, ge=1)
    """Checkpoints that a run keeps: the newest, or with `best_metric` the best and the newest."""
    best_metric: BestMetric | None = None
    """The model that is published is the epoch that was best by this; null is the last epoch."""
    health: HealthSettings = HealthSettings()

    @property
    def initial_bias(self) -> float | None:
        """Sigmoid loss: where its bias starts, at the log odds that two rows of a batch match; None for softmax.

        The −10 of the paper is about this number for its batches of 32,768; for small ones it would be far below.
        """
        return -math.log(self.batch_size - 1) if self.loss == "sigmoid" else None

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _check_micro_batch(cls, value: Any) -> Any:
        if value is None or value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"it is {value!r}; expected a number from 1, auto or null")

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if self.batch_size % self.num_workers:
            below = self.batch_size - self.batch_size % self.num_workers
            nearest_valid = " or ".join(str(size) for size in (below, below + self.num_workers) if size)
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of num_workers ({self.num_workers}), for instance {nearest_valid}"
            )
        local = self.batch_size // self.num_workers
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > local:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; expected at most batch_size / num_workers ({local}), or auto or null"
            )
        return self


class PretrainSettings(StageSettings):
    """Stage 1: audio ↔ text."""


class FinetuneSettings(StageSettings):
    """Stage 2: preference pairs, semantics kept."""

    audio_learning_rate: float = Field(1e-5, gt=0)
    """Peak rate of the audio encoder."""
    pairs_per_epoch: int | None = Field(None, ge=1)
    """Pairs drawn by weight in an epoch; null is as many as there are training pairs."""
    text_loss_weight: float = Field(1.0, ge=0)
    """Weight of audio ↔ text over both songs of a pair: what keeps the semantics."""
    preference_loss_weight: float = Field(1.0, ge=0)
    """Weight of trigger audio ↔ recalled audio."""
    fusion_loss_weight: float = Field(1.0, ge=0)
    """Weight of audio ↔ the other song's fusion of audio and text."""
    popularity_correction: bool = False
    """Subtract log q from the logits of preference and fusion, q being the probability that the song is drawn (log-Q); softmax only."""
    explicit_negatives: bool = False
    """Add to each pair a song rejected after its trigger (skips, dislikes), as a negative of preference; half as much again to encode."""

    @model_validator(mode="after")
    def _check_correction(self) -> Self:
        if self.popularity_correction and self.loss != "softmax":
            raise ValueError(f"popularity_correction corrects a softmax, and loss is {self.loss}; set one of them back")
        if self.popularity_correction and self.explicit_negatives:
            raise ValueError(
                "popularity_correction needs keys that are drawn by the pairs' weights, and explicit_negatives adds others; choose one"
            )
        return self


class EmbedSettings(Settings):
    """Batch embedding."""

    batch_size: int = Field(64, ge=1)
    num_workers: int = Field(1, ge=1)
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


class IndexSettings(Settings):
    """The nearest-neighbour index."""

    kind: Literal["flat", "hnsw"] = "flat"
    """flat is exact."""
    hnsw_neighbors: int = Field(32, ge=2)
    ef_construction: int = Field(200, ge=1)
    ef_search: int = Field(128, ge=1)


class EvaluateSettings(Settings):
    """Evaluation on held-out songs and users."""

    split: Literal["validation", "test"] = "test"
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Cut-offs of recall, hit rate and NDCG."""
    probe_column: str = "genre"
    """Catalogue column that the linear probe predicts on held-out artists."""
    min_history: int = Field(1, ge=1)
    """Positive songs that a held-out user needs before the cut."""
    seed: int = 0
    """Of the shuffled control."""


class ServeSettings(Settings):
    """The HTTP application."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    allowed_hosts: Names = ()
    """Names that a request's Host header may carry, beside localhost and serve.host; `*` allows any, for a proxy that checks."""
    encoder_replicas: int = Field(1, ge=1)
    encoder_cpus: float = Field(1.0, gt=0)
    """CPUs that an encoder replica reserves; it computes with max(1, this) threads."""
    encoder_gpus: float = Field(0.0, ge=0)
    """Share of a GPU that an encoder replica reserves; 0 computes on the CPU."""
    max_batch_size: int = Field(16, ge=1)
    """Audio clips or texts that one encoder call takes together."""
    batch_wait_seconds: float = Field(0.01, ge=0)
    """How long the first request of a batch waits for others."""
    max_upload_bytes: int = Field(50_000_000, gt=0)


class TrackingSettings(Settings):
    """Where training runs are seen beside `metrics.jsonl` and TensorBoard, which are always written. Changes no model."""

    trackers: Annotated[tuple[Literal["mlflow", "wandb"], ...], BeforeValidator(_one_or_many)] = ()
    """Each needs the extra of its name; W&B takes its key and its mode from its own environment variables (WANDB_API_KEY, WANDB_MODE)."""
    project: str = Field("htcl-ray", min_length=1)
    """MLflow experiment and W&B project."""
    mlflow_uri: str | None = None
    """Tracking server, or `sqlite:///file`; null is MLFLOW_TRACKING_URI."""


class RaySettings(Settings):
    """Which cluster the steps run on."""

    address: str | None = None
    """Null connects to RAY_ADDRESS when it is set, as in a submitted job, and otherwise starts a private cluster on this machine."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the private cluster; null is the machine's, at least 4 (training workers must leave room for data tasks)."""
    object_store_bytes: int | None = Field(None, ge=80_000_000)
    """Shared memory of the private cluster; null is Ray's own choice, 30 % of the machine's memory."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """The hint of an error about an unknown name: the nearest valid one, or all of them when none is near."""
    choices = list(choices)
    match = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    return f"did you mean '{match[0]}'?" if match else f"expected one of {', '.join(choices)}"
