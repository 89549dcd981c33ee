"""Sections `pretrain`, `finetune` and `tracking`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, ConfigDict, Field, field_validator, model_validator

from htcl_ray.config.sections.base import Names, Seed, Settings, one_or_many
from htcl_ray.losses.registry import LOSSES, LossName


class HealthSettings(Settings):
    """Detection of collapse and plateaus, after every epoch on a fixed batch of training songs or pairs."""

    action: Literal["warn", "stop", "off"] = "warn"
    """Reaction to a fault: `warn`, `stop` the run, or `off`. A loss or gradient that is not finite always stops the
    run."""
    patience_steps: int = Field(200, ge=1)
    """Number of steps that a fault must last before it is reported, since every run begins near a plateau."""
    max_mean_cosine: float = Field(0.95, gt=-1, le=1)
    """Collapse threshold, from -1 to 1: maximum mean cosine similarity between different audio clips, or between
    different texts."""
    min_effective_rank: float = Field(2.0, ge=1)
    """Collapse threshold: minimum effective rank of the centred embeddings (exp of the entropy of their singular
    values)."""
    plateau_margin: float = Field(0.002, ge=0, lt=1)
    """Plateau threshold: a softmax loss within this share of the loss of identical embeddings counts as a plateau."""


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
"""Settings of a stage that do not change the trained model; a run that is resumed may change them."""


class StageSettings(Settings):
    """Settings of both training stages."""

    model_config = ConfigDict(allow_inf_nan=False)

    batch_size: int | None = Field(32, ge=2)
    """Global batch size: rows of one loss over all workers (songs in stage 1, pairs in stage 2); a multiple of
    `num_workers`. Null: set by `batch_size_per_worker`. Setting one of the two unsets the other."""
    batch_size_per_worker: int | None = Field(None, ge=1)
    """Rows per worker; the global batch size is this × `num_workers` and grows with the number of workers. Null: set by
    `batch_size`."""
    micro_batch_size: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    """Rows that a worker encodes at a time (gradient caching); gradients do not depend on it. `auto`: as many as fit in
    its memory; null: its whole share of the batch."""
    warm_start: str | None = None
    """Earlier model whose weights training starts from: a model folder, or a model version of the workspace. Set by
    `--from`. Null: random weights in stage 1, the semantic model in stage 2."""
    epochs: int = Field(20, ge=1)
    """Number of passes over the songs or pairs of an epoch."""
    num_workers: int = Field(1, ge=1)
    """Number of training workers, each with one GPU or `cpus_per_worker` CPUs."""
    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of heads, temperatures and, in stage 1, the audio encoder."""
    text_learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the text encoder."""
    weight_decay: float = Field(0.0, ge=0)
    """Weight decay of the weight matrices. 0: Adam; above 0: AdamW."""
    warmup_share: float = Field(0.05, ge=0, lt=1)
    """Share of all steps, from 0 to below 1, during which the learning rate rises linearly to its peak."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up. `cosine`: half a cosine down to 0; `constant`: the peak rate."""
    max_gradient_norm: float | None = Field(1.0, gt=0)
    """Maximum global norm of the gradients, which are scaled down to it. Null: no clipping."""
    loss: LossName = "softmax"
    """Contrastive loss. `softmax`: InfoNCE over all rows of the batch; `sigmoid`: a binary classification of each pair
    of rows (SigLIP)."""
    mask_false_negatives: bool = True
    """Whether rows of the same song, duplicate group, text or (in stage 2) known pair are excluded from each other's
    negatives. False: the published loss."""
    temperature: float = Field(0.074, ge=0.01, le=1)
    """Initial temperature of the contrastive losses, from 0.01 to 1. A learned temperature stays at or above 0.01."""
    learn_temperature: bool = True
    """Whether the temperatures are learned. False: they keep their initial value."""
    freeze_text: bool = False
    """Whether the weights of the text encoder are frozen. Its projection head is always trained."""
    freeze_audio_layers: int = Field(0, ge=0)
    """Number of layers of the audio tower, from the first, that are frozen together with everything before them (of the
    `transformer` tower: Transformer layers, and the convolutions). 0: nothing is frozen."""
    time_shift: bool = False
    """Whether training clips are rotated in time by a random number of frames, the end of the clip before its start."""
    time_masks: int = Field(0, ge=0)
    """Number of time masks per training clip (SpecAugment, arXiv 1904.08779). 0: none."""
    time_mask_frames: int = Field(40, ge=1)
    """Maximum width of a time mask, in frames; widths are uniform from 0. All time masks together cover at most half of
    a clip."""
    mel_masks: int = Field(0, ge=0)
    """Number of frequency masks per training clip (SpecAugment). 0: none."""
    mel_mask_bands: int = Field(16, ge=1)
    """Maximum width of a frequency mask, in mel bands; widths are uniform from 0."""
    text_dropout: float = Field(0.0, ge=0, lt=1)
    """Probability, from 0 to below 1, that a column of a song's text is left out of a training text; the others are in
    random order, and at least one is kept. 0: all columns in their order."""
    short_text_share: float = Field(0.0, ge=0, le=1)
    """Share of training texts, from 0 to 1, that are one to three tags of the song, as search queries are, in place of
    its text: values of genre, mood and tags, where they are columns of its text. 0: none."""
    short_text_templates: Names = ("{tags}", "{tags} music", "a {tags} song", "music with {tags}")
    """Short training texts to draw from; `{tags}` stands for the tags."""
    compile: bool = False
    """Whether to compile the towers with torch.compile, which takes minutes at the start and makes steps faster on
    GPUs."""
    seed: Seed = 0
    """Seed of the order of rows, initial weights, dropout, crops, shifts, masks and training texts."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of the workers. `auto`: one GPU per worker when the cluster has GPUs, otherwise the CPU."""
    cpus_per_worker: float = Field(1.0, gt=0)
    """Number of CPUs that a worker reserves in Ray; it computes with max(1, this) threads."""
    max_failures: int = Field(2, ge=0)
    """Number of times that a run restarts from its last checkpoint after it lost a worker."""
    checkpoint_every_steps: int | None = Field(None, ge=1)
    """Interval, in steps from the start of the run, of checkpoints in addition to the one at the end of each epoch.
    Null: none."""
    keep_checkpoints: int = Field(1, ge=1)
    """Number of checkpoints that a run keeps: the newest ones, or with `best_metric` the best and the newest."""
    best_metric: BestMetric | None = None
    """Metric by which the epoch of the published model is selected. Null: the last epoch."""
    health: HealthSettings = HealthSettings()
    """Checks of the run on a fixed batch of training songs or pairs after every epoch."""

    @property
    def global_batch_size(self) -> int:
        """The global batch size: rows of one loss over all workers."""
        return self.batch_size or (self.batch_size_per_worker or 0) * self.num_workers

    def resolved(self) -> Self:
        """Return these settings with the global batch size as a number: equal for runs with equal batches."""
        return self.model_copy(update={"batch_size": self.global_batch_size, "batch_size_per_worker": None})

    @field_validator("short_text_templates")
    @classmethod
    def _check_templates(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for template in value or ("",):
            if "{tags}" not in template:
                raise ValueError(
                    f"one is '{template}'; expected texts with {{tags}} where the tags go, such as 'a {{tags}} song'"
                )
        return value

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
                f"batch_size is {self.batch_size}; expected a multiple of num_workers ({self.num_workers}), "
                f"for instance {nearest_valid}"
            )
        local = self.global_batch_size // self.num_workers
        if isinstance(self.micro_batch_size, int) and self.micro_batch_size > local:
            raise ValueError(
                f"micro_batch_size is {self.micro_batch_size}; expected at most batch_size / num_workers ({local}), "
                "or auto or null"
            )
        return self


class PretrainSettings(StageSettings):
    """Stage 1: contrastive pre-training on audio and text."""

    songs_per_epoch: int | None = Field(None, ge=2)
    """Number of songs per epoch; each epoch continues in the order where the previous one ended. Null: every training
    song once."""
    use_joint_space: bool = False
    """Whether stage 1 is skipped: the semantic model is then the joint space of the pretrained audio-text model that
    `audio.name_or_path` and `text.name_or_path` name, as it is. Set by `htcl finetune --from pretrained`. Needs
    `audio.extractor=pretrained`, `audio.tower=residual`, `model.head_hidden=[]` and the `model.dim` of that model."""


class FinetuneSettings(StageSettings):
    """Stage 2: contrastive fine-tuning on preference pairs that preserves the semantics of stage 1."""

    audio_learning_rate: float = Field(1e-5, gt=0)
    """Peak learning rate of the audio encoder."""
    pairs_per_epoch: int | None = Field(None, ge=1)
    """Number of pairs per epoch, sampled by weight. Null: the number of training pairs."""
    replay_share: float = Field(0.5, ge=0, lt=1)
    """Share of the drawn pairs, from 0 to below 1, that come from the pairs of the earlier model when training
    continues from a preference model (`warm_start`). 0: newer pairs only."""
    text_loss_weight: float = Field(1.0, ge=0)
    """Weight of the audio-text loss over both songs of a pair and the rehearsal songs, which preserves the semantics of
    stage 1."""
    rehearsal_songs_per_pair: int = Field(1, ge=0)
    """Number n of songs of the whole training catalogue that are added to the audio-text loss per pair: n / (2 + n) of
    its rows. 0: songs of pairs only."""
    preference_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss between the audio of the trigger song and the audio of the recalled song."""
    fusion_loss_weight: float = Field(1.0, ge=0)
    """Weight of the loss between the audio of one song and the fusion of audio and text of the other."""
    popularity_correction: bool = False
    """Whether to subtract log q from the logits of the preference and fusion losses, where q is the sampling
    probability of the song (log-Q correction); softmax only."""
    several_positives: bool | None = None
    """Whether all songs of a batch that are paired with a trigger are its positives in the preference loss, not only
    the one that was drawn with it (Khosla et al. 2020); softmax with masked false negatives only. Null: wherever that
    is possible, without `popularity_correction`."""
    explicit_negatives: bool = False
    """Whether to add to each pair a song that was rejected after its trigger song (skip or dislike) as a negative of
    the preference loss. Encoding takes half as long again."""

    @property
    def uses_several_positives(self) -> bool:
        """Whether `several_positives` is set, or null and possible."""
        return self._can_have_several_positives if self.several_positives is None else self.several_positives

    @property
    def _can_have_several_positives(self) -> bool:
        return LOSSES[self.loss].several_positives and self.mask_false_negatives and not self.popularity_correction

    @model_validator(mode="after")
    def _check_correction(self) -> Self:
        if self.popularity_correction and not LOSSES[self.loss].corrects_popularity:
            raise ValueError(f"popularity_correction corrects a softmax, and loss is {self.loss}; set one of them back")
        if self.several_positives and not self._can_have_several_positives:
            raise ValueError(
                f"several_positives needs loss=softmax, mask_false_negatives=true and popularity_correction=false, but "
                f"they are {self.loss}, {str(self.mask_false_negatives).lower()} and "
                f"{str(self.popularity_correction).lower()}; set it to null, or set them back"
            )
        if self.popularity_correction and self.explicit_negatives:
            raise ValueError(
                "popularity_correction requires songs that are sampled by the weights of pairs, and explicit_negatives "
                "adds others; choose one"
            )
        return self


class TrackingSettings(Settings):
    """Experiment trackers, in addition to `metrics.jsonl` and TensorBoard; they do not change the model."""

    trackers: Annotated[tuple[Literal["mlflow", "wandb"], ...], BeforeValidator(one_or_many)] = ()
    """Experiment trackers: `mlflow` and `wandb`. Each requires the extra of its name; W&B reads its key and mode from
    its environment variables (WANDB_API_KEY, WANDB_MODE)."""
    project: str = Field("htcl-ray", min_length=1)
    """Name of the MLflow experiment and of the W&B project."""
    mlflow_uri: str | None = None
    """URI of the MLflow tracking server, or `sqlite:///file`. Null: MLFLOW_TRACKING_URI."""
