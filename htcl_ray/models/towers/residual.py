"""A tower over a joint space: the mean of a song's unit-norm window vectors, plus a correction that begins at zero."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.base import AudioTower


class ResidualTower(AudioTower):
    """Several vectors of a joint space → one vector of the same space; an MLP of their mean learns what to add to it.

    What is added is multiplied by a gate that begins at zero (ReZero, arXiv 2003.04887), so a new tower gives the mean
    itself. Vectors are not standardised, which would leave the joint space.
    """

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        sizes = record.model.residual
        self.width = record.input_width
        widths = [self.width, *sizes.hidden, self.width]
        self.layers = nn.ModuleList(itertools.starmap(nn.Linear, itertools.pairwise(widths)))
        self.dropout = nn.Dropout(sizes.dropout)
        self.gate = nn.Parameter(torch.zeros(self.width))

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Features [B, F, W], valid frames [B] int64 on the CPU → [B, W]."""
        count = valid.to(features.device)[:, None]
        inside = torch.arange(features.shape[1], device=features.device) < count
        x = torch.where(inside[:, :, None], features.to(self.dtype), 0)
        mean = F.normalize(x, dim=2).sum(dim=1) / count
        change = mean
        for number, layer in enumerate(self.layers):
            change = layer(self.dropout(change if number == 0 else torch.relu(change)))
        return mean + self.gate * change

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """No parameters before the layers; then each linear layer, the last with the gate."""
        groups = [list(layer.parameters()) for layer in self.layers]
        return [[], *groups[:-1], [*groups[-1], self.gate]]

    def compile_parts(self) -> list[nn.Module]:
        """No part: compilation gains nothing."""
        return []
