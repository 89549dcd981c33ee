"""Questions to answers, without HTTP and without Ray: the same code behind the HTTP application and `htcl search`."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from htcl_ray import artifacts
from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.errors import QueryError
from htcl_ray.retrieval.index import SongIndex
from htcl_ray.retrieval.index_folder import check_fits
from htcl_ray.retrieval.ranking import Hit
from htcl_ray.retrieval.vectors import Vectors, unit_norm
from htcl_ray.schemas import METADATA
from htcl_ray.storage import Workspace
from htcl_ray.verdicts import refuse_failed

if TYPE_CHECKING:
    from htcl_ray.retrieval.encoder import SongEncoder

MAX_K = 1000
DEFAULT_K = 10


@dataclass(frozen=True)
class Answer:
    """Songs, best first, and how they were asked for."""

    hits: list[Hit]
    metadata: list[dict[str, Any]]
    """Of each hit: the columns of `schemas.METADATA`."""
    k: int
    blend: float


class SearchService:
    """Answers from one index. Words and audio need an encoder; songs and vectors do not.

    All questions take `k` (1 to 1,000) and `blend` (0 semantic to 1 preference; default 0.5, or 0 without stage 2) and raise
    QueryError for values that cannot be used.
    """

    def __init__(self, index: SongIndex, encoder: SongEncoder | None = None) -> None:
        if encoder is not None:
            check_fits(index.describe(), "given", dim=encoder.dim, model_versions=encoder.model_versions)
        self.index = index
        self._encoder = encoder

    @classmethod
    def open(cls, config: Config, index: str | None = None, *, encoder: bool = True) -> Self:
        """The service over an index of the workspace (default: the newest accepted) with the models that it names.

        `encoder=False` skips loading the models, for questions by song or vector. Raises GateError when the gate of the index or of its
        models failed, unless `serve.allow_failed_gate`.
        """
        workspace = Workspace(config.workspace)
        allow = config.serve.allow_failed_gate
        artifact = artifacts.index(workspace, index, accepted=not allow)
        models = artifacts.models_of(workspace, artifact)
        refuse_failed(workspace, artifact, models, allow)
        loaded = SongIndex.load(workspace.local_copy(artifact.path))
        return cls(loaded, _load_encoder(workspace, models) if encoder else None)

    def search_text(self, text: str, *, k: int = DEFAULT_K, blend: float | None = None) -> Answer:
        """Songs that words describe."""
        blend = self.check(k, blend)
        return self.search(self._need_encoder().encode_texts([check_text(text)]), k=k, blend=blend)

    def search_audio(self, source: str | bytes | BinaryIO, *, k: int = DEFAULT_K, blend: float | None = None) -> Answer:
        """Songs that sound like a recording: a path, a file's bytes or a file object. Raises AudioError."""
        blend = self.check(k, blend)
        encoder = self._need_encoder()
        return self.search(encoder.encode_waveforms([decode(source, encoder.recipe)]), k=k, blend=blend)

    def search_songs(self, song_ids: Sequence[str], *, k: int = DEFAULT_K, blend: float | None = None) -> Answer:
        """Songs like the mean of these, which are left out themselves. Raises SongNotFoundError."""
        if not song_ids:
            raise QueryError("there is no song id; expected at least one")
        stored = self.index.vectors_of(song_ids)
        preference = None if stored.preference is None else stored.preference.mean(axis=0, keepdims=True)
        return self.search(Vectors(stored.semantic.mean(axis=0, keepdims=True), preference), k=k, blend=blend, exclude=song_ids)

    def search_vector(self, vector: Sequence[float], *, k: int = DEFAULT_K, blend: float | None = None) -> Answer:
        """Songs near a vector of 2·dim numbers [semantic ; preference], or dim without stage 2; halves may have any length."""
        dim = self.index.dim
        expected = 2 * dim if self.index.has_preference else dim
        given = np.asarray(vector, dtype=np.float64)
        if given.shape != (expected,):
            layout = f"2 × {dim}, [semantic ; preference]" if self.index.has_preference else f"{dim}, the index has no preference vectors"
            raise QueryError(f"the vector has {given.size} numbers; expected {expected} ({layout})")
        halves = given.reshape(-1, 1, dim)
        return self.search(Vectors(halves[0], halves[1] if self.index.has_preference else None), k=k, blend=blend)

    def search(self, query: Vectors, *, k: int = DEFAULT_K, blend: float | None = None, exclude: Collection[str] = ()) -> Answer:
        """Songs near one row of vectors, `exclude` left out."""
        blend = self.check(k, blend)
        unit = Vectors(unit_norm(query.semantic), None if query.preference is None else unit_norm(query.preference))
        hits = self.index.search(unit, k, blend=blend, exclude=[exclude])[0]
        return Answer(hits, [self.metadata(hit.song_id) for hit in hits], k, blend)

    def metadata(self, song_id: str) -> dict[str, Any]:
        """The song's metadata. Raises SongNotFoundError."""
        row = self.index.metadata_of(song_id)
        return {name: row[name] for name in METADATA.names}

    def check(self, k: int, blend: float | None) -> float:
        """The blend to use. Raises QueryError for a `k` or blend that cannot be used, before anything is encoded."""
        if not 1 <= k <= MAX_K:
            raise QueryError(f"k is {k}; expected 1 to {MAX_K}")
        return self.index.check_blend(blend)

    def _need_encoder(self) -> SongEncoder:
        if self._encoder is None:
            raise QueryError("words and audio need the models; open the service with its encoder")
        return self._encoder


def check_text(text: str) -> str:
    """The words to search for. Raises QueryError when there are none."""
    if not text.strip():
        raise QueryError("the text is empty; expected words")
    return text


def _load_encoder(workspace: Workspace, models: artifacts.Models) -> SongEncoder:
    from htcl_ray.retrieval.encoder import SongEncoder  # loads torch

    preference = workspace.local_copy(models.preference.path) if models.preference else None
    return SongEncoder.load(workspace.local_copy(models.semantic.path), preference)
