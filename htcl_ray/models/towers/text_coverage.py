"""The share of a text that a vocabulary knows."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence

SYLLABLES = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL SYLLABLE")
"""Unicode names of characters that are a word or a syllable each begin with one of these."""


def known_share(
    text: str, words: Sequence[int | None], known: Sequence[bool], offsets: Sequence[tuple[int, int]]
) -> float:
    """Compute `TextEncoder.coverage` of one text.

    Per token: `words`, the word it belongs to; `known`, whether it is not special; `offsets`, its place in the text.
    """
    tokens_of, tokens_at = Counter(words), Counter(offsets)
    counts = [unicodedata.category(character)[0] in "LNS" for character in text]
    covered = [False] * len(text)
    for word, is_known, (start, end) in zip(words, known, offsets, strict=True):
        whole_word, whole_syllable = tokens_of[word] == 1, tokens_at[start, end] == 1 and _is_syllable(text[start:end])
        if word is not None and is_known and (sum(counts[start:end]) > 1 or whole_word or whole_syllable):
            covered[start:end] = [True] * (end - start)
    read = max((end for _, end in offsets), default=0)
    counted = [is_covered for is_covered, count in zip(covered[:read], counts, strict=False) if count]
    return sum(counted) / len(counted) if counted else 0.0


def _is_syllable(piece: str) -> bool:
    return unicodedata.name(piece.strip()[:1] or " ", "").startswith(
        SYLLABLES
    )  # SentencePiece adds the space before a word to it
