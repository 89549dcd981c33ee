"""Search service: queries to results, without HTTP and without Ray, for the HTTP application and `htcl search`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

from htcl_ray.api.requests import HALF_LIFE_DAYS, MAX_K, MAX_TEXT_LENGTH, Play
from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.errors import QueryError, SongNotFoundError
from htcl_ray.evaluation.release_gate import check_gates
from htcl_ray.index.folder import check_fits
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import ENCODER_DAMAGED, Vectors, check_unit_norm, concatenate, unit_norm
from htcl_ray.schemas import ESTIMATED, METADATA, RESULT_COLUMNS, TAG_COLUMNS
from htcl_ray.search.diversity import diverse_search
from htcl_ray.search.results import (
    QueryOptions,
    SearchResults,
    tags_of,
    tags_shared_with_songs,
    tags_shared_with_text,
)
from htcl_ray.search.song_columns import LatestColumns, SongColumns
from htcl_ray.search.sonic_path import sonic_path
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.storage import Workspace

if TYPE_CHECKING:
    from htcl_ray.search.encoder import SongEncoder

LOW_COVERAGE = 0.5
"""`text_coverage` below which users are warned that the songs may not match the text."""
MAX_PATH = 100
"""Maximum number of songs on a path, each of which takes one search."""
NEGATIVE_WEIGHT = 0.5
DAY_SECONDS = 86_400.0

SharedTags = Callable[[dict[str, Any]], list[str]]
"""Tags that a song shares with the query."""


class SearchService:
    """Search in one index. Text and audio queries need an encoder; songs and vectors do not.

    All queries take the fields of `QueryOptions` as keyword arguments and raise QueryError for invalid values. Each
    query reads one snapshot of the index.
    """

    def __init__(self, index: SongIndex, encoder: SongEncoder | None = None) -> None:
        if encoder is not None:
            check_fits(index.describe(), "given", dim=encoder.dim, model_versions=encoder.model_versions)
        self.index = index
        self.encoder = encoder
        self._columns = LatestColumns()

    @classmethod
    def open(cls, config: Config, index: str | None = None, *, encoder: bool = True) -> Self:
        """Open an index of the workspace (default: the newest accepted one) with the models that it names.

        `encoder=False` does not load the models, for queries by song or vector. Raises GateError when `gate.require`
        rejects the index or its models.
        """
        workspace = Workspace(config.workspace)
        artifact = artifacts.index(workspace, index, require=config.gate.require)
        models = artifacts.models_of(workspace, artifact)
        check_gates(workspace, models, artifact, config.gate.require)
        loaded = SongIndex.load(workspace.local_copy(artifact.path))
        return cls(loaded, _load_encoder(workspace, models) if encoder else None)

    def search_text(self, text: str, **options: Any) -> SearchResults:
        """Songs that match a text."""
        self.check(**options)
        return self.search_encoded_text(text, self._require_encoder().encode_texts([check_text(text)]), **options)

    def search_encoded_text(self, text: str, query: Vectors, **options: Any) -> SearchResults:
        """Songs that match a text whose vectors are given. Raises InputError for vectors not of unit norm."""
        check_unit_norm(query, lambda _: "the query", ENCODER_DAMAGED)
        results = self._search(
            self.index.snapshot(),
            query,
            QueryOptions(**options),
            shared_tags=lambda song: tags_shared_with_text(song, text),
        )
        return results if query.text_coverage is None else replace(results, text_coverage=float(query.text_coverage[0]))

    def search_audio(self, source: str | bytes | BinaryIO, **options: Any) -> SearchResults:
        """Songs similar to a recording: a path, the bytes of a file, or a file object.

        Raises AudioError, and QueryError for models that take no audio.
        """
        self.check(**options)
        encoder = self._require_encoder()
        waveform = decode(source, encoder.audio_features.decoding)
        return self.search(encoder.encode_waveforms([waveform]), **options)

    def search_songs(
        self, song_ids: Sequence[str], negative_song_ids: Sequence[str] = (), **options: Any
    ) -> SearchResults:
        """Songs similar to the mean of the seeds and dissimilar to the mean of the negatives (`rocchio`).

        Seeds and negatives are not returned. Raises SongNotFoundError.
        """
        if not song_ids:
            raise QueryError("song_ids is empty; expected at least one song")
        index = self.index.snapshot()
        negatives = index.vectors_of(negative_song_ids) if negative_song_ids else None
        query = rocchio(index.vectors_of(song_ids), negatives)
        return self._search(
            index,
            query,
            QueryOptions(**options),
            exclude=(*song_ids, *negative_song_ids),
            shared_tags=self._shared_with(index, song_ids),
        )

    def search_vector(self, vector: Sequence[float], **options: Any) -> SearchResults:
        """Songs near a vector of 2·dim numbers, [semantic ; preference], or of dim numbers without stage 2.

        Each half is normalised to unit norm.
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
        query = Vectors(halves[0], halves[1] if index.has_preference else None)
        return self._search(index, query, QueryOptions(**options))

    def recommend(
        self, history: Sequence[Play], *, half_life_days: float = HALF_LIFE_DAYS, **options: Any
    ) -> SearchResults:
        """Songs for a listener, near the weighted mean of the history, without its songs.

        Weights decay by half every `half_life_days`. Songs of the history that the index does not contain are reported
        in `unknown_song_ids`. Raises SongNotFoundError when it contains none of them.
        """
        index = self.index.snapshot()
        known = [play for play in history if play.song_id in index]
        if not known:
            raise SongNotFoundError(
                f"none of the {len(history)} songs of the history is in the index; expected one at least"
            )
        ids = [play.song_id for play in known]
        query = history_vector(index.vectors_of(ids), decayed_weights(known, half_life_days))
        liked = [play.song_id for play in known if play.weight > 0]
        results = self._search(
            index, query, QueryOptions(**options), exclude=ids, shared_tags=self._shared_with(index, liked)
        )
        unknown = list(dict.fromkeys(play.song_id for play in history if play.song_id not in index))
        return replace(results, unknown_song_ids=unknown)

    def path(self, start_id: str, end_id: str, count: int, *, blend: float | None = None) -> SearchResults:
        """Songs that lead from one song to another (`sonic_path`), without duplicate recordings.

        `count`: 1 to MAX_PATH songs, including both ends, which are always returned. Scores are relative to the start.
        Raises SongNotFoundError.
        """
        if not 1 <= count <= MAX_PATH:
            raise QueryError(f"count is {count}; expected 1 to {MAX_PATH}")
        index = self.index.snapshot()
        columns, blend = self.columns(index), index.check_blend(blend)

        def nearest(point: Vectors, excluded: set[str]) -> str | None:
            hits = diverse_search(
                index,
                columns,
                point,
                1,
                blend=blend,
                exclude=excluded,
                allowed=None,
                max_per_artist=None,
                collapse=True,
            )
            return hits[0].song_id if hits else None

        hits = sonic_path(index, start_id, end_id, count, blend, nearest)
        metadata = columns.metadata([index.row_of(hit.song_id) for hit in hits], RESULT_COLUMNS)
        return SearchResults(hits, metadata, count, blend)

    def search(self, query: Vectors, *, exclude: Collection[str] = (), **options: Any) -> SearchResults:
        """Songs near one row of an encoder's vectors, without `exclude`. Raises InputError unless it has unit norm."""
        check_unit_norm(query, lambda _: "the query", ENCODER_DAMAGED)
        return self._search(self.index.snapshot(), query, QueryOptions(**options), exclude=exclude)

    def metadata(self, song_id: str) -> dict[str, Any]:
        """All metadata of a song, and which of it is estimated. Raises SongNotFoundError."""
        row = self.index.metadata_of(song_id)
        return {name: row[name] for name in (*METADATA.names, ESTIMATED)}

    def check(self, **options: Any) -> float:
        """Check the options before anything is encoded, and return the blend to use. Raises QueryError."""
        return _check(self.index, QueryOptions(**options))

    def columns(self, index: SongIndex) -> SongColumns:
        """The columns of a snapshot's songs table."""
        return self._columns.of(index.songs)

    def _search(
        self,
        index: SongIndex,
        query: Vectors,
        options: QueryOptions,
        *,
        exclude: Collection[str] = (),
        shared_tags: SharedTags | None = None,
    ) -> SearchResults:
        blend = _check(index, options)
        unit = Vectors(unit_norm(query.semantic), None if query.preference is None else unit_norm(query.preference))
        columns = self.columns(index)
        hits = diverse_search(
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
        songs = columns.metadata([index.row_of(hit.song_id) for hit in hits], RESULT_COLUMNS)
        return SearchResults(
            hits, songs, options.k, blend, [shared_tags(song) if shared_tags else [] for song in songs]
        )

    def _shared_with(self, index: SongIndex, song_ids: Sequence[str]) -> SharedTags:
        rows = [index.row_of(song_id) for song_id in song_ids]
        query_tags = tags_of(self.columns(index).metadata(rows, TAG_COLUMNS))
        return lambda song: tags_shared_with_songs(song, query_tags)

    def _require_encoder(self) -> SongEncoder:
        if self.encoder is None:
            raise QueryError("text and audio need the models; open the service with its encoder")
        return self.encoder


def check_text(text: str) -> str:
    """The text, if it can be searched for. Raises QueryError for empty, too long, or undecodable text."""
    if not text.strip():
        raise QueryError("the text is empty; expected words")
    if len(text) > MAX_TEXT_LENGTH:
        raise QueryError(f"the text has {len(text)} characters; expected at most {MAX_TEXT_LENGTH}")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise QueryError("the text holds half of a surrogate pair, which is no character; expected Unicode text")
    return text


def rocchio(seeds: Vectors, negatives: Vectors | None) -> Vectors:
    """One unit-norm row: mean of the seeds - 0.5 · mean of the negatives, in each space (Rocchio 1971)."""
    weights = np.full(len(seeds), 1 / len(seeds))
    if negatives is None or not len(negatives):
        return _weighted_sum(seeds, weights)
    away = np.full(len(negatives), -NEGATIVE_WEIGHT / len(negatives))
    return _weighted_sum(concatenate([seeds, negatives]), np.concatenate([weights, away]))


def decayed_weights(history: Sequence[Play], half_life_days: float) -> NDArray[np.float64]:
    """Weight · 2^(-age / half life) of each song, [songs].

    The age counts from the newest timestamp of the history; a song without a timestamp does not decay.
    """
    times = np.array([np.nan if play.timestamp is None else play.timestamp for play in history], dtype=np.float64)
    newest = np.nanmax(times) if not np.isnan(times).all() else 0.0
    ages = np.nan_to_num((newest - times) / DAY_SECONDS, nan=0.0)
    with np.errstate(under="ignore"):
        weights = np.array([play.weight for play in history]) * np.exp2(-ages / half_life_days)
    return np.asarray(weights, dtype=np.float64)


def history_vector(vectors: Vectors, weights: NDArray[np.float64]) -> Vectors:
    """One unit-norm row: the weighted sum of the songs. Raises QueryError when all weights are 0."""
    largest = np.abs(weights).max(initial=0.0)
    if not largest > 0:
        raise QueryError("no song of the history has weight; expected one whose weight is not 0")
    return _weighted_sum(vectors, weights / largest)


def _weighted_sum(vectors: Vectors, weights: NDArray[np.float64]) -> Vectors:
    """One unit-norm row: the weighted sum in each space. Raises QueryError when the songs cancel out."""
    semantic = weights @ vectors.semantic.astype(np.float64)
    preference = None if vectors.preference is None else weights @ vectors.preference.astype(np.float64)
    return Vectors(unit_norm(semantic[None]), None if preference is None else unit_norm(preference[None]))


def _check(index: SongIndex, options: QueryOptions) -> float:
    if not 1 <= options.k <= MAX_K:
        raise QueryError(f"k is {options.k}; expected 1 to {MAX_K}")
    if options.max_per_artist is not None and options.max_per_artist < 1:
        raise QueryError(f"max_per_artist is {options.max_per_artist}; expected at least 1")
    return index.check_blend(options.blend)


def _load_encoder(workspace: Workspace, models: artifacts.Models) -> SongEncoder:
    from htcl_ray.search.encoder import SongEncoder  # imports torch

    return SongEncoder.from_workspace(workspace, *models.paths)
