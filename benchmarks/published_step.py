"""The published training step, restated plainly from its description (DESIGN.md §1 of the project): the reference of
the training benchmarks.

Every clip padded to full length at its maximum − 80 dB and normalised whole, no mask anywhere, nn.TransformerEncoder
layers, fp32, the batch in one pass, the full logits matrix, other workers' rows gathered without gradient (with one
process has none), Adam in the authors' groups, no clipping, no schedule. Not the authors' code.

Shapes: B clips, F frames as given, L frames of a full clip, M mel bands, T tokens, D width.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from htcl_ray.config.sections import AudioRecipe, ModelSettings
from htcl_ray.training.batches import Batch

TEXT_RATE, ENCODER_RATE, RATE = 1e-5, 1e-5, 1e-4


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over channels."""

    def forward(self, x: Tensor) -> Tensor:
        """On [B, channels, L]."""
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class PublishedAudioEncoder(nn.Module):
    """Log-mel spectrograms → one vector each."""

    def __init__(self, sizes: ModelSettings, recipe: AudioRecipe) -> None:
        super().__init__()
        self.frames, self.top_db = recipe.max_frames, recipe.top_db
        channels = [recipe.n_mels] + [sizes.conv_channels] * 3
        blocks: list[nn.Module] = []
        for (inputs, outputs), kernel in zip(pairwise(channels), (5, 3, 3), strict=True):
            blocks += [nn.Conv1d(inputs, outputs, kernel, stride=2, bias=False), ChannelNorm(outputs), nn.GELU()]
        self.convolutions = nn.Sequential(*blocks)
        self.projection = nn.Sequential(nn.LayerNorm(sizes.conv_channels), nn.Linear(sizes.conv_channels, sizes.width))
        kernel = sizes.position_kernel
        position = nn.Conv1d(sizes.width, sizes.width, kernel, padding=kernel // 2, groups=sizes.position_groups)
        self.position = nn.Sequential(weight_norm(position, dim=2), ChannelNorm(sizes.width), nn.GELU())
        self.norm, self.dropout = nn.LayerNorm(sizes.width), nn.Dropout(sizes.dropout)
        self.cls = nn.Parameter(torch.randn(1, 1, sizes.width))
        layer = nn.TransformerEncoderLayer(
            sizes.width,
            sizes.heads,
            sizes.feed_forward,
            sizes.dropout,
            activation="gelu",
            batch_first=True,
            norm_first=False,
        )
        self.transformer = nn.TransformerEncoder(layer, sizes.layers, enable_nested_tensor=False)

    def forward(self, mel: Tensor, valid_frames: Tensor) -> Tensor:
        """Mel [B, F, M] in dB → [B, D]."""
        x = self.convolutions(self.pad(mel.float(), valid_frames).transpose(1, 2)).transpose(1, 2)
        x = self.projection(x)
        x = self.dropout(self.norm(x + self.position(x.transpose(1, 2)).transpose(1, 2)))
        return self.transformer(torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1)).mean(dim=1)

    def pad(self, mel: Tensor, valid_frames: Tensor) -> Tensor:
        """To [B, L, M], each clip at its maximum − `top_db`, then zero mean and unit (population) deviation over the
        padded matrix.
        """
        mel = F.pad(mel[:, : self.frames], (0, 0, 0, self.frames - mel.shape[1]))
        behind = (torch.arange(self.frames) >= valid_frames[:, None]).to(mel.device)[:, :, None]
        quietest = mel.masked_fill(behind, -torch.inf).amax((1, 2), keepdim=True) - self.top_db
        mel = torch.where(behind, quietest, mel)
        return (mel - mel.mean((1, 2), keepdim=True)) / (mel.std((1, 2), correction=0, keepdim=True) + 1e-8)


class PublishedModel(nn.Module):
    """Both towers, heads, fusion from stage 2 on, and one temperature a loss term. `text`: a transformers BERT."""

    def __init__(self, sizes: ModelSettings, recipe: AudioRecipe, text: nn.Module, stage: int) -> None:
        super().__init__()
        self.audio, self.text, dim = PublishedAudioEncoder(sizes, recipe), text, sizes.dim
        self.audio_head = perceptron(sizes.width, *sizes.head_hidden, dim)
        self.text_head = perceptron(text.config.hidden_size, *sizes.head_hidden, dim)
        self.fusion = perceptron(2 * dim, 2 * dim, dim, dim) if stage == 2 else None
        self.scales = nn.Parameter(torch.full((3 if stage == 2 else 1,), -math.log(0.074)))

    def loss(self, batch: Batch) -> Tensor:
        """Stage 1: audio ↔ text. Stage 2: that over both songs of a pair, trigger ↔ recalled audio, and audio ↔ the
        other's fusion.
        """
        audio = self.audio_head(self.audio(batch.features, batch.valid_frames))
        text = self.text_head(self.text(**batch.tokens).pooler_output)
        semantic = contrast(audio, text, self.scales[0])
        if self.fusion is None:
            return semantic
        fused = self.fusion(torch.cat([audio, text], dim=1))
        (trigger, recalled), (trigger_fused, recalled_fused) = audio.chunk(2), fused.chunk(2)
        fusion = contrast(trigger, recalled_fused, self.scales[2]) + contrast(recalled, trigger_fused, self.scales[2])
        return semantic + contrast(trigger, recalled, self.scales[1]) + fusion / 2

    def optimizer(self) -> torch.optim.Optimizer:
        """Adam in the authors' groups."""
        towers = {*self.text.parameters(), *(self.audio.parameters() if self.fusion is not None else ())}
        groups = [
            {"params": list(self.text.parameters()), "lr": TEXT_RATE},
            {"params": [p for p in self.audio.parameters() if p in towers], "lr": ENCODER_RATE},
            {"params": [p for p in self.parameters() if p not in towers], "lr": RATE},
        ]
        return torch.optim.Adam([group for group in groups if group["params"]])


def perceptron(*widths: int) -> nn.Sequential:
    layers = [layer for inputs, outputs in pairwise(widths) for layer in (nn.Linear(inputs, outputs), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def contrast(first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over the rows; row i of both belong together, every other row is a negative."""
    logits = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T * scale.exp()
    rows = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, rows)) / 2
