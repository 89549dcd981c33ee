"""Both training stages, and where their runs are seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from htcl_ray.config.sections.base import Seed, Settings, one_or_many
from htcl_ray.losses.registry import LOSSES, LossName


class HealthSettings(Settings):
    """When a run has gone wrong: looked at after every epoch on a fixed probe batch of training songs or pairs."""

    action: Literal["warn", "stop", "off"] = "warn"
    """A loss or gradient that is no number stops the run whatever this says."""
    patience_steps: int = Field(200, ge=1)
    """Steps that a fault must last before it counts: every run begins near a plateau."""
    max_mean_cosine: float = Field(0.95, gt=-1, le=1)
    """Collapse: mean cosine between different songs' audio, or different texts, above this."""
    min_effective_rank: float = Field(2.0, ge=1)
    """Collapse: fewer directions in use than this, as exp of the entropy of the singular values of the centred
    vectors."""
    plateau_margin: float = Field(0.002, ge=0, lt=1)
    """Plateau: a softmax term within this share of the loss that equal vectors for all songs would have."""


BestMetric = Literal[
    "loss",
    "validation_recall@10",
    "validation_ndcg@10",
    "validation_median_rank",
    "validation_pair_recall@10",
    "validation_pair_ndcg@10",
    "validation_pair_median_rank",
]
NOT_IN_MODEL = (
    "accelerator",
    "num_workers",
    "cpus_per_worker",
    "micro_batch_size",
    "max_failures",
    "checkpoint_every_steps",
    "keep_checkpoints",
    "health",
)
"""Settings of a stage that say where and how it runs, not what it learns: a run that is resumed may change them."""


class StageSettings(Settings):
    """What both training stages share."""

    model_config = ConfigDict(allow_inf_nan=False)

    batch_size: int | None = Field(32, ge=2)
    """Global: rows of one loss, over all workers (stage 2: pairs); null: `batch_size_per_worker`. Setting one of them
    unsets the other."""
    batch_size_per_worker: int | None = Field(None, ge=1)
    """Rows of one loss that each worker brings: the global batch is this × `num_workers`, and grows with them. Null:
    `batch_size`."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows that one worker encodes at a time; null is its whole share, auto what fits its memory. The gradient does not
    depend on it."""
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
    loss: LossName = "softmax"
    """softmax: InfoNCE, each row picks its match among the batch. sigmoid: each pair of rows is a match or not
    (SigLIP)."""
    mask_false_negatives: bool = True
    """Rows of one song, duplicate group, text or (stage 2) known pair are not each other's negatives; false is the
    published loss."""
    temperature: float = Field(0.074, ge=0.01, le=1)
    """Initial temperature of the contrastive losses; kept at or above 0.01."""
    learn_temperature: bool = True
    """False keeps the temperatures of the losses where they start."""
    freeze_text: bool = False
    """The text encoder stays as it is; its head learns."""
    freeze_audio_layers: int = Field(0, ge=0)
    """The audio encoder's first Transformer layers, and all that comes before them, stay as they are; 0 freezes
    nothing."""
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
    seed: Seed = 0
    """Of the order of rows, initial weights, dropout, crops and masks."""
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
    def global_batch_size(self) -> int:
        """Rows of one loss, over all workers."""
        return self.batch_size or (self.batch_size_per_worker or 0) * self.num_workers

    def resolved(self) -> Self:
        """These settings with the global batch size as a number: equal for runs that have equal batches."""
        return self.model_copy(update={"batch_size": self.global_batch_size, "batch_size_per_worker": None})

    @field_validator("micro_batch_size", mode="before")
    @classmethod
    def _check_micro_batch(cls, value: Any) -> Any:
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        if value is None or value == "auto" or (type(value) is int and value >= 1):
            return value
        raise ValueError(f"it is {value!r}; expected a number from 1, auto or null")

    @model_validator(mode="before")
    @classmethod
    def _unset_batch_size(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.get("batch_size_per_worker") is not None and "batch_size" not in value:
            return {**value, "batch_size": None}
        return value

    @model_validator(mode="after")
    def _check_batch(self) -> Self:
        if (self.batch_size is None) == (self.batch_size_per_worker is None):
            raise ValueError(
                f"batch_size (global) is {self.batch_size} and batch_size_per_worker is {self.batch_size_per_worker}; "
                "expected a number for one of them and null for the other"
            )
        if self.global_batch_size < 2:
            raise ValueError(
                "batch_size_per_worker × num_workers is 1; expected at least 2 rows, since each needs a negative"
            )
        if self.batch_size is not None and self.batch_size % self.num_workers:
            below = self.batch_size - self.batch_size % self.num_workers
            nearest_valid = " or ".join(str(size) for size in (below, below + self.num_workers) if size)
            raise ValueError(
                f"batch_size is {self.batch_size}; expected a multiple of num_workers ({self.num_workers}), for instance {nearest_valid}"
            )
        local = self.global_batch_size // self.num_workers
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > local:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; expected at most batch_size / num_workers ({local}), or auto or null"
            )
        return self


class PretrainSettings(StageSettings):
    """Stage 1: audio ↔ text."""

    songs_per_epoch: int | None = Field(None, ge=2)
    """Songs of an epoch, which goes on in the order where the one before ended; null is every training song once."""


class FinetuneSettings(StageSettings):
    """Stage 2: preference pairs, semantics kept."""

    audio_learning_rate: float = Field(1e-5, gt=0)
    """Peak rate of the audio encoder."""
    pairs_per_epoch: int | None = Field(None, ge=1)
    """Pairs drawn by weight in an epoch; null is as many as there are training pairs."""
    text_loss_weight: float = Field(1.0, ge=0)
    """Weight of audio ↔ text over both songs of a pair and the rehearsed songs: what keeps the semantics."""
    rehearsal_songs_per_pair: int = Field(1, ge=0)
    """Songs n of the whole training catalogue that audio ↔ text gets for each pair, n / (2 + n) of its rows; 0 sees
    songs of pairs only."""
    preference_loss_weight: float = Field(1.0, ge=0)
    """Weight of trigger audio ↔ recalled audio."""
    fusion_loss_weight: float = Field(1.0, ge=0)
    """Weight of audio ↔ the other song's fusion of audio and text."""
    popularity_correction: bool = False
    """Subtract log q from the logits of preference and fusion, q being the probability that the song is drawn (log-Q);
    softmax only."""
    explicit_negatives: bool = False
    """Add to each pair a song rejected after its trigger (skips, dislikes), as a negative of preference; half as much
    again to encode."""

    @model_validator(mode="after")
    def _check_correction(self) -> Self:
        if self.popularity_correction and not LOSSES[self.loss].corrects_popularity:
            raise ValueError(f"popularity_correction corrects a softmax, and loss is {self.loss}; set one of them back")
        if self.popularity_correction and self.explicit_negatives:
            raise ValueError(
                "popularity_correction needs keys that are drawn by the pairs' weights, and explicit_negatives adds others; choose one"
            )
        return self


class TrackingSettings(Settings):
    """Where training runs are seen beside `metrics.jsonl` and TensorBoard, which are always written. Changes no
    model.
    """

    trackers: Annotated[tuple[Literal["mlflow", "wandb"], ...], BeforeValidator(one_or_many)] = ()
    """Each needs the extra of its name; W&B takes its key and its mode from its own environment variables
    (WANDB_API_KEY, WANDB_MODE)."""
    project: str = Field("htcl-ray", min_length=1)
    """MLflow experiment and W&B project."""
    mlflow_uri: str | None = None
    """Tracking server, or `sqlite:///file`; null is MLFLOW_TRACKING_URI."""
