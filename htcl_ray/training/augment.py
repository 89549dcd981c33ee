"""Augmentation of training clips: random crops, circular shifts in time, and masks (SpecAugment). Needs no torch.

Each clip has its own random generator, seeded by the position of the clip in training: see `generators`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from htcl_ray.config.sections import StageSettings
from htcl_ray.models.towers.registry import Extractor


@dataclass(frozen=True)
class Augmentation:
    """Crops of `window` frames (None: whole clips); of log-mels also shifts and SpecAugment (arXiv 1904.08779)."""

    settings: StageSettings
    window: int | None
    extractor: Extractor = "log_mel"
    """Extractor of the features. Those of others than `log_mel` are cropped only."""

    def generators(self, epoch: int, step: int, first: int, rows: int, songs_per_row: int) -> list[np.random.Generator]:
        """Return one generator for each song of a worker's rows, in batch order: all first songs, then all second ones.

        `step` counts within the epoch; `first` is the position of the worker's first row in the global batch. The
        generators depend on nothing else, so augmentation is the same with any number of workers, with micro-batches
        of any size, and in a resumed run.
        """
        positions = [(place, row) for place in range(songs_per_row) for row in range(first, first + rows)]
        return [np.random.default_rng([self.settings.seed, epoch, step, place, row]) for place, row in positions]

    def crop(self, random: np.random.Generator, frames: int) -> tuple[int, int]:
        """Draw the first frame and the end of a crop, uniformly over all offsets."""
        if self.window is None or frames <= self.window:
            return 0, frames
        start = int(random.integers(frames - self.window + 1))
        return start, start + self.window

    def alter(self, random: np.random.Generator, clip: npt.NDArray[np.float16]) -> None:
        """Shift and mask the features of a cropped clip [valid frames, width], in place."""
        if self.extractor == "log_mel":
            if self.settings.time_shift:
                clip[:] = np.roll(clip, int(random.integers(len(clip))), axis=0)
            self.mask(random, clip)

    def mask(self, random: np.random.Generator, mel: npt.NDArray[np.float16]) -> None:
        """Mask stretches of frames and groups of mel bands of a clip [valid frames, n_mels] in dB, in place.

        Masked cells take the mean of the others. The masked input recipe subtracts the clip's mean, which is then the
        same number, so they become zeros, as padding does. Widths are uniform from 0 to the configured one,
        then places are uniform. All time masks together hide at most half of the frames and all mel masks leave at
        least one band, so that some cells are left.
        """
        frames, bands = mel.shape
        settings = self.settings
        hidden = np.zeros(mel.shape, dtype=bool)
        for _ in range(settings.time_masks):
            start, stop = _stretch(random, min(settings.time_mask_frames, frames // (2 * settings.time_masks)), frames)
            hidden[start:stop] = True
        for _ in range(settings.mel_masks):
            start, stop = _stretch(random, min(settings.mel_mask_bands, (bands - 1) // settings.mel_masks), bands)
            hidden[:, start:stop] = True
        if hidden.any():
            mel[hidden] = mel[~hidden].mean(dtype=np.float64)


def _stretch(random: np.random.Generator, widest: int, length: int) -> tuple[int, int]:
    width = int(random.integers(widest + 1))
    start = int(random.integers(length - width + 1))
    return start, start + width
