"""A tower over given vectors: standardised, averaged over the frames of a song, then an MLP."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.base import AudioTower
from htcl_ray.models.towers.standardisation import Standardisation


class MlpTower(AudioTower):
    """One vector a song, or the mean of several → one vector."""

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        sizes = record.model.mlp
        self.width = sizes.width
        self.standardisation = Standardisation(record.input_width)
        widths = [record.input_width, *sizes.hidden, sizes.width]
        self.layers = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(widths)))
        self.dropout = nn.Dropout(sizes.dropout)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Features [B, F, W], valid frames [B] int64 on the CPU → [B, width]."""
        frames = features.shape[1]
        count = valid.to(features.device)[:, None]
        inside = torch.arange(frames, device=features.device) < count
        x = torch.where(inside[:, :, None], self.standardisation(features.to(self.dtype)), 0).sum(dim=1) / count
        for number, layer in enumerate(self.layers):
            x = layer(self.dropout(x if number == 0 else torch.relu(x)))
        return x

    def fit_input(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the standardisation, unless the weights bring one."""
        if not self.standardisation.is_fitted:
            self.standardisation.fit(batches)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """No parameters before the layers; then each linear layer."""
        return [[], *(list(layer.parameters()) for layer in self.layers)]

    def compile_parts(self) -> list[nn.Module]:
        """No part: compilation gains nothing."""
        return []
