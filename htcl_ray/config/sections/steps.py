"""Sections `embed`, `index`, `evaluate`, `gate` and `ray`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator

from htcl_ray.config.sections.base import Names, Seed, Settings, one_or_many


class EmbedSettings(Settings):
    """Batch computation of embeddings."""

    batch_size: int = Field(64, ge=1)
    """Number of clips per batch of a worker."""
    num_workers: int = Field(1, ge=1)
    """Number of parallel workers. Each loads the models once."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Device of the workers. `auto`: one GPU per worker when the cluster has GPUs, otherwise the CPU."""


class IndexSettings(Settings):
    """Nearest-neighbour index over the embeddings."""

    kind: Literal["auto", "flat", "hnsw", "ivf", "ivf_pq"] = "auto"
    """Kind of FAISS index. `flat`: exact search; `hnsw`: a graph; `ivf`: inverted lists; `ivf_pq`: inverted lists with
    compressed vectors; `auto`: chosen by the number of songs (see `index/engines/selection.py`)."""
    min_recall: float = Field(0.95, ge=0, le=1)
    """Minimum recall@10 against exact search, from 0 to 1, measured on queries that the index was not tuned on. A build
    that does not reach it fails."""
    rerank: float | None = Field(None, ge=1)
    """Candidates per requested result whose scores are recomputed from exact vectors. Null: chosen by the kind of
    index."""
    hnsw_neighbors: int = Field(32, ge=2)
    """Number of neighbours of a node in the HNSW graph (M). Higher values increase recall and memory."""
    ef_construction: int = Field(200, ge=1)
    """Length of the candidate list while an HNSW graph is built. Higher values increase recall and build time."""
    ef_search: int = Field(128, ge=1)
    """Length of the candidate list of an HNSW query. Higher values increase recall and latency."""
    ivf_lists: int | None = Field(None, ge=1)
    """Number of inverted lists (nlist). Null: four times the square root of the number of songs."""
    ivf_probes: int | None = Field(None, ge=1)
    """Number of inverted lists that a query reads (nprobe). Null: the smallest number whose measured recall is safely
    above `min_recall`."""
    pq_bytes: int | None = Field(None, ge=1)
    """Size of a compressed vector in ivf_pq, in bytes; a divisor of the dimension of the vectors. Null: about one byte
    per four dimensions."""


class EvaluateSettings(Settings):
    """Evaluation on held-out songs and users."""

    split: Literal["validation", "test"] = "test"
    """Split whose songs and users are evaluated."""
    ks: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Cut-offs k of recall@k, hit rate@k and NDCG@k."""
    probe_columns: Names = ("genre", "language", "mood", "tags")
    """Catalogue columns that probes and zero-shot classification predict for held-out artists. Empty columns are
    skipped."""
    folds: int = Field(5, ge=2)
    """Number of cross-validation folds of the probes that are trained on held-out songs. All songs of an artist are in
    one fold."""
    neighbors: int = Field(10, ge=1)
    """Number of neighbours of the k-nearest-neighbour probe."""
    label_prompts: Names = ("{label}", "{label} music", "a {label} song")
    """Texts that represent a label in zero-shot classification; `{label}` stands for it. The vectors of all texts of a
    label are averaged."""
    oracle_vectors: str | None = None
    """Parquet table with `song_id` and `vector` (list of floats): the true traits of the songs, where they are known,
    as in the sample catalogue. Recommendation tasks report them as the method `oracle`, an upper bound for audio
    vectors. Null: none."""
    min_history: int = Field(1, ge=1)
    """Minimum number of songs with positive feedback that a user needs before the time split to be evaluated."""
    max_users: int | None = Field(2000, ge=1)
    """Maximum number of users in a recommendation task, chosen by a hash of their id. Null: all users."""
    min_item_users: int = Field(5, ge=1)
    """Minimum number of users with positive feedback, and of users with negative feedback, that a song needs for the
    item AUC."""
    allowed_overlaps: Annotated[tuple[Literal["artists", "times"], ...], BeforeValidator(one_or_many)] = ()
    """Overlaps of training and test data that are accepted although they make the metrics optimistic: `artists`, when a
    split column was chosen that way, and `times`."""
    resamples: int = Field(1000, ge=100)
    """Number of bootstrap resamples of the confidence intervals."""
    seed: Seed = 0
    """Seed of the permuted controls, random samples and bootstrap."""

    @field_validator("label_prompts")
    @classmethod
    def _check_prompts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prompt in value or ("",):
            if "{label}" not in prompt:
                raise ValueError(
                    f"one is '{prompt}'; expected texts with {{label}} where the label goes, such as 'a {{label}} song'"
                )
        return value


Require = Literal["off", "failed", "unjudged"]


class GateSettings(Settings):
    """Conditions under which a step uses a model or index."""

    require: Require = "failed"
    """`off`: use any model or index; `failed`: refuse those whose gate failed; `unjudged`: also refuse those that no
    gate has judged. It applies to the model from which finetune and tune start, and in embed, index, serve and search.
    Embed a model that is still to be judged without `unjudged`, since `htcl evaluate --gate` needs its embeddings."""

    @field_validator("require", mode="before")
    @classmethod
    def _off_of_yaml(cls, value: Any) -> Any:
        """Accept false, as YAML reads the word off."""
        return "off" if value is False else value


class RaySettings(Settings):
    """Ray cluster on which the steps run."""

    address: str | None = None
    """Address of the Ray cluster. Null: RAY_ADDRESS where it is set, as in a submitted job, and otherwise a private
    cluster that is started on this machine."""
    num_cpus: int | None = Field(None, ge=1)
    """Number of logical CPUs of the private cluster. Null: those of the machine, at least 4, since training workers
    must leave CPUs for data tasks."""
    object_store_bytes: int | None = Field(None, ge=80_000_000)
    """Size of the shared memory of the private cluster, in bytes. Null: Ray's default of 30 % of the machine's
    memory."""
