"""A tower over the window vectors of a song: standardised, then a small masked Transformer and a mean over windows."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.base import AudioTower
from htcl_ray.models.towers.standardisation import Standardisation
from htcl_ray.models.towers.transformer import TransformerLayer


class WindowTransformerTower(AudioTower):
    """Several vectors a song → one vector. The order of the windows does not matter: they have no positions."""

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        sizes = record.model.window_transformer
        self.width = sizes.width
        self.standardisation = Standardisation(record.input_width)
        self.projection = nn.Linear(record.input_width, sizes.width)
        self.norm = nn.LayerNorm(sizes.width)
        self.dropout = nn.Dropout(sizes.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(sizes.width, sizes.heads, sizes.feed_forward, sizes.dropout) for _ in range(sizes.layers)
        )

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Features [B, F, W], valid frames [B] int64 on the CPU → mean over the valid frames, [B, width]."""
        features = features[:, : int(valid.max())]
        count = valid.to(features.device)[:, None]
        inside = torch.arange(features.shape[1], device=features.device) < count
        x = torch.where(inside[:, :, None], self.standardisation(features.to(self.dtype)), 0)
        x = self.dropout(self.norm(self.projection(x)))
        attended = None if int(valid.min()) == features.shape[1] else inside[:, None, None, :]
        for layer in self.layers:
            x = layer(x, attended)
        return torch.where(inside[:, :, None], x, 0).sum(dim=1) / count

    def fit_input(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set the standardisation, unless the weights bring one."""
        if not self.standardisation.is_fitted:
            self.standardisation.fit(batches)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """The projection and its norm; then each Transformer layer."""
        first = [*self.projection.parameters(), *self.norm.parameters()]
        return [first, *(list(layer.parameters()) for layer in self.layers)]

    def compile_parts(self) -> list[nn.Module]:
        """The layers."""
        return list(self.layers)
