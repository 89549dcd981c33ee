"""`htcl search`: one query from the shell, run in this process, without a server."""

from __future__ import annotations

import json
import sys
from typing import Any

from pydantic import ValidationError
from rich.console import Console
from rich.table import Table

from htcl_ray.api.requests import Filter
from htcl_ray.config import Config
from htcl_ray.errors import QueryError, first_fault
from htcl_ray.pipelines.index import determined_index
from htcl_ray.schemas import PRINTED_COLUMNS
from htcl_ray.search.results import SearchResults, printed
from htcl_ray.search.service import LOW_COVERAGE, SearchService
from htcl_ray.workspace.storage import Workspace


def search(
    config: Config,
    index: str | None,
    *,
    text: str | None,
    audio: str | None,
    song_id: str | None,
    conditions: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Search by text, by an audio file (path or URI), or by a song of the index, and print the results.

    `conditions`: a Filter as JSON; `options`: further fields of `QueryOptions`. Raises QueryError.
    """
    options["filter"] = None if conditions is None else _filter(conditions)
    index = index or determined_index(Workspace(config.workspace), config)
    service = SearchService.open(config, index, encoder=song_id is None)
    if song_id is not None:
        results = service.search_songs([song_id], **options)
    elif audio is not None:
        results = service.search_audio(audio, **options)
    else:
        results = service.search_text(text or "", **options)
    if as_json:
        tree = {
            "k": results.k,
            "blend": results.blend,
            "text_coverage": results.text_coverage,
            "results": _results(results),
        }
        print(json.dumps(tree, ensure_ascii=not (sys.stdout.encoding or "").lower().startswith("utf"), indent=2))
    else:
        _print(results)
    _warn(results)


def _filter(conditions: str) -> Filter:
    try:
        return Filter.model_validate_json(conditions)
    except ValidationError as error:
        fault = first_fault(error)
        raise QueryError(f"{'.'.join(('--filter', *fault.path))}: {fault.message}") from None


def _warn(results: SearchResults) -> None:
    coverage = results.text_coverage
    if coverage is not None and coverage < LOW_COVERAGE:
        knows = (
            f"knows only {coverage:.0%} of this text, so the songs may not fit it"
            if coverage
            else "knows nothing of this text, so the songs are arbitrary"
        )
        print(
            f"warning: the text model {knows}; try another text, or search by a song or an audio file", file=sys.stderr
        )


def _results(results: SearchResults) -> list[dict[str, Any]]:
    return [
        {
            "song_id": hit.song_id,
            "score": hit.score,
            "semantic_score": hit.semantic_score,
            "preference_score": hit.preference_score,
            "shared_tags": shared_tags,
            **metadata,
        }
        for hit, metadata, shared_tags in zip(results.hits, results.metadata, results.shared_tags, strict=True)
    ]


def _print(results: SearchResults) -> None:
    table = Table("song", "score", "semantic", "preference", *PRINTED_COLUMNS)
    for result in _results(results):
        scores = (result["score"], result["semantic_score"], result["preference_score"])
        table.add_row(
            result["song_id"],
            *("–" if score is None else f"{score:.3f}" for score in scores),
            *(printed(result, name) for name in PRINTED_COLUMNS),
        )
    Console().print(table)
