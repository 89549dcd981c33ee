"""The base class of audio towers: the features of a song → one vector.

Features are a sequence of vectors [frames, width] with a number of valid frames, whatever made them: log-mel frames,
window vectors of a pretrained encoder, or one vector of the catalogue. `htcl_ray.models.towers.registry` states which
extractors a tower takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from htcl_ray.models.record import ModelRecord


class AudioTower(nn.Module, ABC):
    """Features of different lengths → one vector each.

    The vector of a song depends on its own valid frames alone: neither padding nor the other rows of a batch change it.
    So no tower may compute statistics across the rows of a batch, such as batch norm, because micro-batches, padding
    and the number of workers would then change results.
    """

    width: int
    """Size of the vector."""

    def __init__(self, record: ModelRecord) -> None:
        """Draw the weights at random; `record` gives the sizes of the tower and of its input."""
        super().__init__()

    @abstractmethod
    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Features [B, F, W], valid frames [B] int64 on the CPU, 1 to F → [B, width], with gradient.

        Frames after the valid ones are never read; they may hold any number, or NaN.
        """

    @abstractmethod
    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Every parameter once, in groups from the input to the output.

        The first group holds the parameters before the first layer, and may be empty; then follows one group for each
        layer. Freezing takes whole groups from the first on, and learning rates may differ between groups.
        """

    @abstractmethod
    def compile_parts(self) -> list[nn.Module]:
        """Modules to compile each: as large as possible without breaks of the graph; equal layers share a compilation.

        Lengths computed on the CPU break a graph, so most towers cannot be compiled as a whole.
        """

    def fit_input(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the statistics of the input that are part of the weights, from (features, valid frames) of some songs.

        Called once, before a new model is trained. Towers without such statistics do not read `batches`.
        """

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return next(self.parameters()).dtype
