"""Questions to answers, without HTTP and without Ray: the same code behind the HTTP application and `htcl search`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np

from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.evaluation.release_gate import check_gates
from htcl_ray.index.folder import check_fits
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import ENCODER_DAMAGED, Vectors, check_unit_norm, unit_norm
from htcl_ray.schemas import METADATA
from htcl_ray.search.diversity import varied_search
from htcl_ray.search.filters import Filter
from htcl_ray.search.profiles import HALF_LIFE_DAYS, Heard, decayed_weights, profile, rocchio
from htcl_ray.search.ranking import Hit
from htcl_ray.search.shared_tags import TAG_COLUMNS, shared_with_songs, shared_with_text, tags_of
from htcl_ray.search.song_columns import LatestColumns, SongColumns
from htcl_ray.search.sonic_path import sonic_path
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.search.encoder import SongEncoder

MAX_K = 1000
DEFAULT_K = 10
MAX_TEXT_LENGTH = 10_000
LITTLE_COVERAGE = 0.5
"""Below this `text_coverage` people are warned that the songs may not fit the text."""
MAX_PATH = 100
"""Songs of a path, each of which is a search of its own."""
SHOWN = ("song_id", *(name for name in METADATA.names if name != "lyrics"))
"""Columns of an answer's songs."""

Shared = Callable[[dict[str, Any]], list[str]]


@dataclass(frozen=True)
class Options:
    """How a question is to be answered."""

    k: int = DEFAULT_K
    """Songs wanted: 1 to 1,000."""
    blend: float | None = None
    """0 semantic to 1 preference; None: 0.5, or 0 without stage 2."""
    filter: Filter | None = None
    max_per_artist: int | None = None
    """Songs without an artist are not counted together."""
    collapse_duplicates: bool = True
    """Of songs that preprocessing found to be the same recording only the best is returned, and none that is the same
    as a seed."""


@dataclass(frozen=True)
class Answer:
    """Songs, best first, and how they were asked for."""

    hits: list[Hit]
    metadata: list[dict[str, Any]]
    """Of each hit: `SHOWN`."""
    k: int
    blend: float
    shared_tags: list[list[str]] = field(default_factory=list)
    """Of each hit: its tags, genres and moods that the question has as well."""
    unknown_song_ids: list[str] = field(default_factory=list)
    """Songs of a history that the index does not hold."""
    text_coverage: float | None = None
    """Of a text: the share that the text model's vocabulary knows, 0 to 1."""


class SearchService:
    """Answers from one index. Words and audio need an encoder; songs and vectors do not.

    All questions take the fields of `Options` as keywords and raise QueryError for values that cannot be used. An
    answer comes from the index as it was at one moment.
    """

    def __init__(self, index: SongIndex, encoder: SongEncoder | None = None) -> None:
        if encoder is not None:
            check_fits(index.describe(), "given", dim=encoder.dim, model_versions=encoder.model_versions)
        self.index = index
        self.encoder = encoder
        self._columns = LatestColumns()

    @classmethod
    def open(cls, config: Config, index: str | None = None, *, encoder: bool = True) -> Self:
        """The service over an index of the workspace (default: the newest accepted) with the models that it names.

        `encoder=False` skips loading the models, for questions by song or vector. Raises GateError when `gate.require`
        forbids the index or its models.
        """
        workspace = Workspace(config.workspace)
        artifact = artifacts.index(workspace, index, require=config.gate.require)
        models = artifacts.models_of(workspace, artifact)
        check_gates(workspace, models, artifact, config.gate.require)
        loaded = SongIndex.load(workspace.local_copy(artifact.path))
        return cls(loaded, _load_encoder(workspace, models) if encoder else None)

    def search_text(self, text: str, **options: Any) -> Answer:
        """Songs that words describe."""
        self.check(**options)
        return self.search_encoded_text(text, self._need_encoder().encode_texts([check_text(text)]), **options)

    def search_encoded_text(self, text: str, query: Vectors, **options: Any) -> Answer:
        """Songs near the vectors of words that were encoded elsewhere. Raises InputError for vectors not of unit
        norm.
        """
        check_unit_norm(query, lambda _: "the query", ENCODER_DAMAGED)
        answer = self._answer(
            self.index.snapshot(), query, Options(**options), shared=lambda song: shared_with_text(song, text)
        )
        return answer if query.text_coverage is None else replace(answer, text_coverage=float(query.text_coverage[0]))

    def search_audio(self, source: str | bytes | BinaryIO, **options: Any) -> Answer:
        """Songs that sound like a recording: a path, a file's bytes or a file object. Raises AudioError."""
        self.check(**options)
        encoder = self._need_encoder()
        return self.search(encoder.encode_waveforms([decode(source, encoder.recipe)]), **options)

    def search_songs(self, song_ids: Sequence[str], negative_song_ids: Sequence[str] = (), **options: Any) -> Answer:
        """Songs like the mean of these and unlike the mean of the negatives (`profiles.rocchio`); all of them are left
        out.

        Raises SongNotFoundError.
        """
        if not song_ids:
            raise QueryError("there is no song id; expected at least one")
        index = self.index.snapshot()
        negatives = index.vectors_of(negative_song_ids) if negative_song_ids else None
        query = rocchio(index.vectors_of(song_ids), negatives)
        return self._answer(
            index,
            query,
            Options(**options),
            exclude=(*song_ids, *negative_song_ids),
            shared=_like_songs(self, index, song_ids),
        )

    def search_vector(self, vector: Sequence[float], **options: Any) -> Answer:
        """Songs near a vector of 2·dim numbers [semantic ; preference], or dim without stage 2; halves may have any
        length.
        """
        index = self.index.snapshot()
        dim = index.dim
        expected = 2 * dim if index.has_preference else dim
        given = np.asarray(vector, dtype=np.float64)
        if given.shape != (expected,):
            layout = (
                f"2 × {dim}, [semantic ; preference]"
                if index.has_preference
                else f"{dim}, the index has no preference vectors"
            )
            raise QueryError(f"the vector has {given.size} numbers; expected {expected} ({layout})")
        halves = given.reshape(-1, 1, dim)
        return self._answer(index, Vectors(halves[0], halves[1] if index.has_preference else None), Options(**options))

    def recommend(self, history: Sequence[Heard], *, half_life_days: float = HALF_LIFE_DAYS, **options: Any) -> Answer:
        """Songs for a listener that are not in the history: near its weighted mean, of which what was heard long ago is
        less.

        Songs that the index does not hold are named in the answer. Raises SongNotFoundError when it holds none of them.
        """
        index = self.index.snapshot()
        known = [heard for heard in history if heard.song_id in index]
        if not known:
            raise SongNotFoundError(
                f"none of the {len(history)} songs of the history is in the index; expected one at least"
            )
        ids = [heard.song_id for heard in known]
        query = profile(index.vectors_of(ids), decayed_weights(known, half_life_days))
        liked = [heard.song_id for heard in known if heard.weight > 0]
        unknown = list(dict.fromkeys(heard.song_id for heard in history if heard.song_id not in index))
        return self._answer(
            index, query, Options(**options), exclude=ids, shared=_like_songs(self, index, liked), unknown=unknown
        )

    def path(self, start_id: str, end_id: str, count: int, *, blend: float | None = None) -> Answer:
        """Songs that lead from one to the other (`sonic_path`), none the same recording as another; scores are relative
        to the start.

        `count`: 1 to MAX_PATH songs, both ends included, which are always there. Raises SongNotFoundError.
        """
        if not 1 <= count <= MAX_PATH:
            raise QueryError(f"count is {count}; expected 1 to {MAX_PATH}")
        index = self.index.snapshot()
        columns, used = self.columns(index), index.check_blend(blend)

        def nearest(point: Vectors, taken: set[str]) -> str | None:
            hits = varied_search(
                index, columns, point, 1, blend=used, exclude=taken, allowed=None, max_per_artist=None, collapse=True
            )
            return hits[0].song_id if hits else None

        hits = sonic_path(index, start_id, end_id, count, used, nearest)
        found = columns.metadata([index.row_of(hit.song_id) for hit in hits], SHOWN)
        return Answer(hits, found, count, used)

    def search(self, query: Vectors, *, exclude: Collection[str] = (), **options: Any) -> Answer:
        """Songs near one row of an encoder's vectors, `exclude` left out. Raises InputError for vectors not of unit
        norm.
        """
        check_unit_norm(query, lambda _: "the query", ENCODER_DAMAGED)
        return self._answer(self.index.snapshot(), query, Options(**options), exclude=exclude)

    def metadata(self, song_id: str) -> dict[str, Any]:
        """The song's metadata. Raises SongNotFoundError."""
        row = self.index.metadata_of(song_id)
        return {name: row[name] for name in METADATA.names}

    def check(self, **options: Any) -> float:
        """The blend to use. Raises QueryError for options that cannot be used, before anything is encoded."""
        return _checked(self.index, Options(**options))

    def columns(self, index: SongIndex) -> SongColumns:
        """Those of the snapshot's songs."""
        return self._columns.of(index.songs)

    def _answer(
        self,
        index: SongIndex,
        query: Vectors,
        options: Options,
        *,
        exclude: Collection[str] = (),
        shared: Shared | None = None,
        unknown: Sequence[str] = (),
    ) -> Answer:
        blend = _checked(index, options)
        unit = Vectors(unit_norm(query.semantic), None if query.preference is None else unit_norm(query.preference))
        columns = self.columns(index)
        hits = varied_search(
            index,
            columns,
            unit,
            options.k,
            blend=blend,
            exclude=exclude,
            allowed=None if options.filter is None else columns.allowed(options.filter),
            max_per_artist=options.max_per_artist,
            collapse=options.collapse_duplicates,
        )
        found = columns.metadata([index.row_of(hit.song_id) for hit in hits], SHOWN)
        return Answer(hits, found, options.k, blend, [shared(song) if shared else [] for song in found], list(unknown))

    def _need_encoder(self) -> SongEncoder:
        if self.encoder is None:
            raise QueryError("words and audio need the models; open the service with its encoder")
        return self.encoder


def check_text(text: str) -> str:
    """The words to search for. Raises QueryError when there are none, too many, or characters that are none."""
    if not text.strip():
        raise QueryError("the text is empty; expected words")
    if len(text) > MAX_TEXT_LENGTH:
        raise QueryError(f"the text has {len(text)} characters; expected at most {MAX_TEXT_LENGTH}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise QueryError("the text holds half of a surrogate pair, which is no character; expected Unicode text")
    return text


def _checked(index: SongIndex, options: Options) -> float:
    if not 1 <= options.k <= MAX_K:
        raise QueryError(f"k is {options.k}; expected 1 to {MAX_K}")
    if options.max_per_artist is not None and options.max_per_artist < 1:
        raise QueryError(f"max_per_artist is {options.max_per_artist}; expected at least 1")
    return index.check_blend(options.blend)


def _like_songs(service: SearchService, index: SongIndex, song_ids: Sequence[str]) -> Shared:
    asked = tags_of(service.columns(index).metadata([index.row_of(song_id) for song_id in song_ids], TAG_COLUMNS))
    return lambda song: shared_with_songs(song, asked)


def _load_encoder(workspace: Workspace, models: artifacts.Models) -> SongEncoder:
    from htcl_ray.search.encoder import SongEncoder  # loads torch

    return SongEncoder.from_workspace(workspace, *models.paths)
