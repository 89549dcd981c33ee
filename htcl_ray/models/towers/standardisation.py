"""Standardisation of feature vectors by fixed statistics of the training songs, which are part of the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

LEAST_DEVIATION = 1e-4
"""Numbers of a vector that vary less, relative to the largest deviation, are not scaled up."""


class Standardisation(nn.Module):
    """(x − mean) / deviation, one of each for every number of a vector; the identity until `fit`.

    Pretrained encoders differ in scale, and some have single numbers that are a hundred times larger than the others.
    Statistics are computed once, before training, and never from a batch.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    @property
    def is_fitted(self) -> bool:
        """Whether `fit` was called, on this model or on the one that the weights come from."""
        return bool((self.mean != 0).any() or (self.deviation != 1).any())

    def fit(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the statistics from (features [B, F, W], valid frames [B]), over all valid frames."""
        count = 0
        total, squares = (torch.zeros(len(self.mean), dtype=torch.float64) for _ in range(2))
        for features, valid in batches:
            frames = features[torch.arange(features.shape[1]) < valid[:, None]].double()
            count += len(frames)
            total += frames.sum(dim=0)
            squares += frames.square().sum(dim=0)
        mean = total / count
        deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
        least = LEAST_DEVIATION * float(deviation.max())
        self.mean.copy_(mean)
        self.deviation.copy_(deviation.clamp(min=least) if least else torch.ones_like(deviation))

    def forward(self, x: Tensor) -> Tensor:
        """[..., W] → [..., W]."""
        return (x - self.mean) / self.deviation
