"""`htcl search`: one query from the shell, answered in this process, without a server."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from htcl_ray.config import Config
from htcl_ray.retrieval.service import Answer, SearchService


def search(
    config: Config,
    index: str | None,
    *,
    text: str | None,
    audio: Path | None,
    song_id: str | None,
    k: int,
    blend: float | None,
    as_json: bool,
) -> None:
    """Answer by words, by an audio file, or by a song of the index, and print the songs."""
    service = SearchService.open(config, index, encoder=song_id is None)
    if song_id is not None:
        answer = service.search_songs([song_id], k=k, blend=blend)
    elif audio is not None:
        answer = service.search_audio(str(audio), k=k, blend=blend)
    else:
        answer = service.search_text(text or "", k=k, blend=blend)
    if as_json:
        print(json.dumps({"k": answer.k, "blend": answer.blend, "results": _results(answer)}, ensure_ascii=False, indent=2))
    else:
        _print(answer)


def _results(answer: Answer) -> list[dict]:
    return [
        {
            "song_id": hit.song_id,
            "score": hit.score,
            "semantic_score": hit.semantic_score,
            "preference_score": hit.preference_score,
            **metadata,
        }
        for hit, metadata in zip(answer.hits, answer.metadata, strict=True)
    ]


def _print(answer: Answer) -> None:
    table = Table("song", "score", "semantic", "preference", "title", "artist", "genre", "mood", "tags")
    for result in _results(answer):
        scores = (result["score"], result["semantic_score"], result["preference_score"])
        words = (result[name] for name in ("title", "artist", "genre", "mood", "tags"))
        table.add_row(
            result["song_id"],
            *("–" if score is None else f"{score:.3f}" for score in scores),
            *(", ".join(value) if isinstance(value, list) else str(value or "") for value in words),
        )
    Console().print(table)
