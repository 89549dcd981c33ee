"""A 2-D convolutional audio tower: log-mel frames as an image of time and frequency.

Four blocks (by default) of a 3 × 3 convolution, a norm, ReLU and 2 × 2 average pooling; then the mean over frequency,
mean and maximum over time, and one linear layer. Kernels that span few mel bands are equivariant to shifts of pitch, so
the tower learns from far fewer songs than one whose first convolution spans all bands.

Kernels are weight-standardised (Qiao et al. 2019, arXiv 1903.10520) and the norm is over all channels, frames and bands
of a clip (group norm with one group, Wu and He 2018), in place of batch norm, which would mix the rows of a batch.
Frames after the valid ones are zeros to each convolution and left out of each norm and mean: padding changes nothing.

Shapes: B clips, C channels, T frames, M mel bands.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.base import AudioTower
from htcl_ray.models.towers.normalisation import normalised_frames

EPSILON = 1e-5
"""Added to variances."""


class StandardisedConvolution(nn.Module):
    """3 × 3 convolution with zero padding, without bias, whose kernels have mean 0 and norm 1 per output channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, T, M] → [B, outputs, T, M]."""
        variance, mean = torch.var_mean(self.weight, dim=(1, 2, 3), correction=0, keepdim=True)
        weight = (self.weight - mean) * torch.rsqrt(variance * self.weight[0].numel() + EPSILON)
        return F.conv2d(x, weight, padding=1)


class ClipNorm(nn.Module):
    """Normalisation over all channels, valid frames and bands of a clip, with gain and bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, inside: Tensor | None, cells: Tensor | None) -> Tensor:
        """[B, C, T, M] → the same shape.

        `inside` [B, 1, T, 1] bool: valid frames, None: all; `cells` [B, 1, 1, 1]: valid cells of a clip, over all
        channels. Other frames are left out of the statistics, and zeros in the output.
        """
        if inside is None or cells is None:
            return F.group_norm(x, 1, self.weight, self.bias, EPSILON)
        x = torch.where(inside, x, 0).to(torch.promote_types(x.dtype, torch.float32))
        of_clip = x.permute(0, 2, 3, 1).flatten(1)  # a view of the memory format that CnnTower chooses
        mean = of_clip.sum(dim=1)[:, None, None, None] / cells
        squares = torch.linalg.vecdot(of_clip, of_clip)[:, None, None, None] / cells
        scale = torch.rsqrt((squares - mean.square()).clamp(min=0) + EPSILON) * self.weight[None, :, None, None]
        shift = torch.where(inside, self.bias[None, :, None, None] - mean * scale, 0)
        return torch.addcmul(shift, x, scale)


class Block(nn.Module):
    """Convolution, norm, ReLU and 2 × 2 average pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = StandardisedConvolution(inputs, outputs)
        self.norm = ClipNorm(outputs)

    def forward(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B, inputs, T, M], zeros after the valid frames → [B, outputs, ceil(T / 2), ceil(M / 2)], as well.

        `valid` [B]: valid frames of each clip, None: all; of the output they are ceil(valid / 2).
        """
        x = self.convolution(x)
        if valid is None:
            return F.avg_pool2d(F.relu(self.norm(x, None, None)), 2, ceil_mode=True, count_include_pad=False)
        _, channels, frames, bands = x.shape
        inside = (torch.arange(frames, device=x.device) < valid[:, None])[:, None, :, None]
        x = F.relu(self.norm(x, inside, (valid * channels * bands)[:, None, None, None]))
        x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
        # The last pair of an odd number of frames, where the second is padding, is the mean of the first and a zero.
        pair = torch.arange(x.shape[2], device=x.device)
        is_half = (2 * pair + 1 == valid[:, None]) & (valid[:, None] < frames)
        return x * (1 + is_half.to(x.dtype))[:, None, :, None]


class CnnTower(AudioTower):
    """Log-mel spectrograms of different lengths → one vector each, by 2-D convolutions."""

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        sizes = record.model.cnn
        self.width = sizes.width
        self.blocks = nn.ModuleList(itertools.starmap(Block, itertools.pairwise([1, *sizes.channels])))
        self.projection = nn.Linear(2 * sizes.channels[-1], sizes.width)

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Log-mels [B, F, M] in dB, valid frames [B] int64 on the CPU → [B, width]."""
        frames = int(valid.max())
        x = normalised_frames(features.to(self.dtype), valid, frames)[:, None]
        x = x.contiguous(memory_format=torch.channels_last)
        counts = None if int(valid.min()) == frames else valid.to(x.device)
        for block in self.blocks:
            x = block(x, counts)
            counts = None if counts is None else (counts + 1) // 2
        x = x.mean(dim=3)
        if counts is None:
            return self.projection(torch.cat([x.mean(dim=2), x.amax(dim=2)], dim=1))  # type: ignore[no-any-return]
        inside = (torch.arange(x.shape[2], device=x.device) < counts[:, None])[:, None]
        mean = torch.where(inside, x, 0).sum(dim=2) / counts[:, None]
        largest = torch.where(inside, x, -torch.inf).amax(dim=2)
        return self.projection(torch.cat([mean, largest], dim=1))  # type: ignore[no-any-return]

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """No parameters before the layers; then each block, and the linear layer."""
        return [[], *(list(layer.parameters()) for layer in (*self.blocks, self.projection))]

    def compile_parts(self) -> list[nn.Module]:
        """The blocks."""
        return list(self.blocks)
