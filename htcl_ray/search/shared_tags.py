"""Why a song was found, in its own words: tags, genres and moods that it shares with what was asked for."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

TAG_COLUMNS = ("genre", "mood", "tags")


def tags_of(songs: Iterable[Mapping[str, Any]]) -> set[str]:
    """Tags, genres and moods of songs, in lower case."""
    return {tag.lower() for song in songs for column in TAG_COLUMNS for tag in song.get(column) or ()}


def shared_with_songs(song: Mapping[str, Any], asked: Collection[str]) -> list[str]:
    """The song's tags that are among `asked` (of `tags_of`), as the song writes them, each once."""
    return _own_tags(song, lambda tag: tag.lower() in asked)


def shared_with_text(song: Mapping[str, Any], text: str) -> list[str]:
    """The song's tags that stand in a text as whole words."""
    words = f" {_words(text)} "
    return _own_tags(song, lambda tag: bool(_words(tag)) and f" {_words(tag)} " in words)


def _own_tags(song: Mapping[str, Any], wanted: Any) -> list[str]:
    own = {tag.lower(): tag for column in TAG_COLUMNS for tag in song.get(column) or () if wanted(tag)}
    return list(own.values())


def _words(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))
