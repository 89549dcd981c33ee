"""Random variation of song texts in training: columns left out and reordered, and short texts of a few tags.

Search queries are a few words, and a song's own text is one fixed line. A training text is a pure function of the song
and of its position in training, as the augmentation of its clip is: see `TextVariation.generators`. Needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from htcl_ray.catalog.songs import COLUMN_SEPARATOR
from htcl_ray.config.sections import StageSettings

MAX_TAGS = 3
"""Largest number of tags in a short text."""
PURPOSE = 1
"""Last number of the seeds of texts, which differ from those of clips by it."""


@dataclass(frozen=True)
class TextVariation:
    """Training texts as `text_dropout`, `short_text_share` and `short_text_templates` of a stage say."""

    settings: StageSettings

    @property
    def active(self) -> bool:
        """Whether any text differs from the song's own."""
        return bool(self.settings.text_dropout or self.settings.short_text_share)

    def generators(self, epoch: int, step: int, first: int, rows: int, songs_per_row: int) -> list[np.random.Generator]:
        """Return one generator for each song of a worker's rows, in batch order.

        They depend on the same numbers as `Augmentation.generators`, so texts are the same with any number of workers,
        with micro-batches of any size, and in a resumed run.
        """
        positions = [(place, row) for place in range(songs_per_row) for row in range(first, first + rows)]
        return [
            np.random.default_rng([self.settings.seed, epoch, step, place, row, PURPOSE]) for place, row in positions
        ]

    def draw(self, random: np.random.Generator, text: str, tags: Sequence[str]) -> str:
        """Draw the training text of a song with this text and these tags. A song without tags has no short text."""
        if tags and random.random() < self.settings.short_text_share:
            count = int(random.integers(1, min(MAX_TAGS, len(tags)) + 1))
            chosen = " ".join(tags[place] for place in random.permutation(len(tags))[:count])
            templates = self.settings.short_text_templates
            return templates[int(random.integers(len(templates)))].replace("{tags}", chosen)
        if not self.settings.text_dropout:
            return text
        columns = text.split(COLUMN_SEPARATOR)
        order = random.permutation(len(columns))
        kept = order[random.random(len(columns)) >= self.settings.text_dropout]
        return COLUMN_SEPARATOR.join(columns[place] for place in (kept if len(kept) else order[:1]))


def vocabulary_texts(texts: Sequence[str], settings: StageSettings) -> list[str]:
    """The texts of the training songs with the words of the templates about as often as training shows them."""
    templates = settings.short_text_templates
    times = round(settings.short_text_share * len(texts) / len(templates))
    return [*texts, *(template.replace("{tags}", "") for template in templates for _ in range(times))]


def text_number(normalized: str) -> int:
    """A non-negative int64 for a normalised text: 63 bits of a hash, the same in every process."""
    return int.from_bytes(hashlib.blake2b(normalized.encode(), digest_size=8).digest(), "big") >> 1
