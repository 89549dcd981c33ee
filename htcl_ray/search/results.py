"""Options and results of a query, the tags that a result shares with it, and their form as API responses."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from htcl_ray.api.requests import DEFAULT_K, Filter
from htcl_ray.api.responses import EmbeddingResponse, RecommendResponse, Result, SearchResponse
from htcl_ray.index.ranking import Hit
from htcl_ray.index.vectors import ENCODER_DAMAGED, ModelVersions, Vectors, check_unit_norm
from htcl_ray.schemas import ESTIMATED, TAG_COLUMNS


@dataclass(frozen=True)
class QueryOptions:
    """Options of a query."""

    k: int = DEFAULT_K
    """Number of songs to return, 1 to 1,000."""
    blend: float | None = None
    """Weight of the preference score, 0 (semantic) to 1; None is 0.5, or 0 without stage 2."""
    filter: Filter | None = None
    max_per_artist: int | None = None
    """Maximum number of songs by one artist; songs without an artist are not limited."""
    collapse_duplicates: bool = True
    """Return only the best of several duplicate recordings, and no duplicate of a seed."""


@dataclass(frozen=True)
class SearchResults:
    """Hits of one query, best first, with the options used and each song's metadata."""

    hits: list[Hit]
    metadata: list[dict[str, Any]]
    """The columns `schemas.RESULT_COLUMNS` of each hit."""
    k: int
    blend: float
    shared_tags: list[list[str]] = field(default_factory=list)
    """Tags, genres and moods that each hit shares with the query."""
    unknown_song_ids: list[str] = field(default_factory=list)
    """Songs of a history that the index does not contain."""
    text_coverage: float | None = None
    """Fraction of the query text that the text model's vocabulary covers, 0 to 1; None without a text."""

    def to_response(self, index: str) -> SearchResponse:
        """The response of a search in the index version `index`."""
        return SearchResponse(
            results=self._results(), k=self.k, blend=self.blend, index=index, text_coverage=self.text_coverage
        )

    def to_recommend_response(self, index: str) -> RecommendResponse:
        """The response of a recommendation from the index version `index`."""
        return RecommendResponse(
            results=self._results(),
            k=self.k,
            blend=self.blend,
            index=index,
            unknown_song_ids=self.unknown_song_ids,
        )

    def _results(self) -> list[Result]:
        return [
            Result(
                **metadata,
                score=hit.score,
                semantic_score=hit.semantic_score,
                preference_score=hit.preference_score,
                shared_tags=tags,
            )
            for hit, metadata, tags in zip(self.hits, self.metadata, self.shared_tags, strict=True)
        ]


def embedding_response(vectors: Vectors, model_versions: ModelVersions) -> EmbeddingResponse:
    """The response that carries the first row of `vectors`. Raises InputError for vectors not of unit norm."""
    check_unit_norm(vectors, lambda _: "the query", ENCODER_DAMAGED)
    preference, coverage = (
        None if part is None else part[0].tolist() for part in (vectors.preference, vectors.text_coverage)
    )
    return EmbeddingResponse(
        semantic=vectors.semantic[0].tolist(),
        preference=preference,
        text_coverage=coverage,
        model_versions=dict(model_versions),
    )


def printed(song: Mapping[str, Any], column: str) -> str:
    """A metadata column of a song or result as text for a terminal; estimated values are marked."""
    value = song[column]
    text = ", ".join(value) if isinstance(value, list) else str(value or "")
    return f"{text} (estimated)" if text and column in (song.get(ESTIMATED) or ()) else text


def tags_of(songs: Iterable[Mapping[str, Any]]) -> set[str]:
    """All tags, genres and moods of the songs, in lower case."""
    return {tag.lower() for song in songs for column in TAG_COLUMNS for tag in song.get(column) or ()}


def tags_shared_with_songs(song: Mapping[str, Any], query_tags: Collection[str]) -> list[str]:
    """Tags of the song that are in `query_tags` (see `tags_of`), each once, with the song's capitalisation."""
    return _matching_tags(song, lambda tag: tag.lower() in query_tags)


def tags_shared_with_text(song: Mapping[str, Any], text: str) -> list[str]:
    """Tags of the song that occur in the text as whole words."""
    words = f" {_words(text)} "
    return _matching_tags(song, lambda tag: bool(_words(tag)) and f" {_words(tag)} " in words)


def _matching_tags(song: Mapping[str, Any], matches: Callable[[str], bool]) -> list[str]:
    unique = {tag.lower(): tag for column in TAG_COLUMNS for tag in song.get(column) or () if matches(tag)}
    return list(unique.values())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
