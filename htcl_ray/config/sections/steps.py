"""Embedding, index, evaluation, and the cluster that steps run on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from htcl_ray.config.sections.base import Names, Seed, Settings, one_or_many


class EmbedSettings(Settings):
    """Batch embedding."""

    batch_size: int = Field(64, ge=1)
    num_workers: int = Field(1, ge=1)
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


class IndexSettings(Settings):
    """The nearest-neighbour index."""

    kind: Literal["auto", "flat", "hnsw", "ivf", "ivf_pq"] = "auto"
    """flat is exact; auto chooses by the number of songs (index/engines/selection.py)."""
    min_recall: float = Field(0.95, ge=0, le=1)
    """Recall@10 against exact search that a build must reach on songs that it has not seen."""
    rerank: float | None = Field(None, ge=1)
    """Candidates per result that are scored again exactly; null is what the kind's codes need."""
    hnsw_neighbors: int = Field(32, ge=2)
    ef_construction: int = Field(200, ge=1)
    ef_search: int = Field(128, ge=1)
    ivf_lists: int | None = Field(None, ge=1)
    """Null is four times the square root of the number of songs."""
    ivf_probes: int | None = Field(None, ge=1)
    """Lists that a query reads; null is found by trying until recall is safely above `min_recall`."""
    pq_bytes: int | None = Field(None, ge=1)
    """Bytes of a song's code in ivf_pq, a divisor of the vectors' width; null is about one for four numbers."""


class EvaluateSettings(Settings):
    """Evaluation on held-out songs and users."""

    split: Literal["validation", "test"] = "test"
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Cut-offs of recall, hit rate and NDCG."""
    probe_columns: Names = ("genre", "language", "mood", "tags")
    """Catalogue columns that probes and zero-shot classification predict on held-out artists; one that is empty is left
    out."""
    folds: int = Field(5, ge=2)
    """Folds of the probes that see only held-out songs; an artist is in one fold."""
    neighbors: int = Field(10, ge=1)
    """Of the nearest-neighbour probe."""
    label_prompt: str = "{label}"
    """Text that asks for a label in zero-shot classification, such as `a {label} song`."""
    min_history: int = Field(1, ge=1)
    """Positive songs that a user needs before the cut to be asked."""
    max_users: int | None = Field(2000, ge=1)
    """Users asked in a recommendation task, chosen by a hash of their id; null is all of them."""
    min_item_users: int = Field(5, ge=1)
    """Positive users, and negative ones, that a song needs for the item AUC."""
    allowed_overlaps: Annotated[tuple[Literal["artists", "times"], ...], BeforeValidator(one_or_many)] = ()
    """What training and evaluation may share although figures flatter the model then: `artists` when a split column was
    chosen so."""
    resamples: int = Field(1000, ge=100)
    """Of the bootstrap that gives the intervals."""
    seed: Seed = 0
    """Of the shuffled controls, the random draws and the bootstrap."""

    @field_validator("label_prompt")
    @classmethod
    def _check_prompt(cls, value: str) -> str:
        if "{label}" not in value:
            raise ValueError(
                f"it is '{value}'; expected a text with {{label}} where the label goes, such as 'a {{label}} song'"
            )
        return value


Require = Literal["off", "failed", "unjudged"]


class GateSettings(Settings):
    """What the gate of a model or index has to say before a step uses it."""

    require: Require = "failed"
    """off: any may be used. failed: those whose gate failed are refused. unjudged: those that no gate has judged as
    well. Asked by finetune and tune of the model that they start from, by embed, index, serve and search; a model that
    is to be judged is embedded without `unjudged`, since `htcl evaluate --gate` needs its embeddings."""

    @field_validator("require", mode="before")
    @classmethod
    def _off_of_yaml(cls, value: Any) -> Any:
        """YAML reads the word off as false."""
        return "off" if value is False else value


class RaySettings(Settings):
    """Which cluster the steps run on."""

    address: str | None = None
    """Null connects to RAY_ADDRESS when it is set, as in a submitted job, and otherwise starts a private cluster on
    this machine."""
    num_cpus: int | None = Field(None, ge=1)
    """Logical CPUs of the private cluster; null is the machine's, at least 4 (training workers must leave room for data
    tasks)."""
    object_store_bytes: int | None = Field(None, ge=80_000_000)
    """Shared memory of the private cluster; null is Ray's own choice, 30 % of the machine's memory."""
