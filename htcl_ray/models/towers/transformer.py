"""The paper's audio tower: log-mel frames → convolutions → tokens → post-norm Transformer → one vector a clip.

Shapes: B clips, L frames, T tokens, S = T + 1 tokens with [CLS], M mel bands, D width. Default sizes are the paper's
(88,500,511 parameters).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from htcl_ray.models.record import InputRecipe, ModelRecord
from htcl_ray.models.towers.base import AudioTower
from htcl_ray.models.towers.normalisation import EPSILON, normalised_frames

KERNELS = (5, 3, 3)
TOKEN_STRIDE = 8
"""Frames from one token to the next: three strides of 2."""
RECEPTIVE_FIELD = 17
"""Frames that one token depends on: kernels 5, 3, 3."""


def masked_input(mel: Tensor, valid_frames: Tensor) -> tuple[Tensor, Tensor | None]:
    """Normalise each clip by its own frames and pad it with zeros.

    mel [B, F, M] in dB; frames from `valid_frames` [B] (int64, on the CPU, 1 to F) on are never read. Returns the
    prepared frames [B, L, M] and the valid tokens [B, T] (None when all are). L = 8·(T − 1) + 17 with T = ceil(longest
    / 8) whatever F is: the last token of a clip always sees the same zeros behind it, so neither padding nor the rest
    of the batch changes an embedding.
    """
    tokens = -(-valid_frames // TOKEN_STRIDE)
    count = int(tokens.max())
    length = TOKEN_STRIDE * (count - 1) + RECEPTIVE_FIELD
    all_valid = bool((tokens == count).all())
    token_valid = None if all_valid else torch.arange(count, device=mel.device) < tokens.to(mel.device)[:, None]
    return normalised_frames(mel, valid_frames, length), token_valid


def official_input(mel: Tensor, valid_frames: Tensor, *, frames: int, top_db: float) -> tuple[Tensor, None]:
    """Apply the published recipe: pad to `frames` at the maximum − `top_db`, normalise the whole matrix, no mask.

    mel [B, F, M] in dB, valid_frames [B] as in `masked_input` → [B, frames, M]; longer clips are cut.
    """
    mel = F.pad(mel[:, :frames], (0, 0, 0, max(0, frames - mel.shape[1])))
    inside = (torch.arange(frames, device=mel.device) < valid_frames.to(mel.device)[:, None])[:, :, None]
    floor = torch.where(inside, mel, -torch.inf).amax(dim=(1, 2), keepdim=True) - top_db
    padded = torch.where(inside, mel, floor)
    mean = padded.mean(dim=(1, 2), keepdim=True)
    deviation = padded.std(dim=(1, 2), keepdim=True, correction=0)
    return (padded - mean) / (deviation + EPSILON), None


class ConvolutionLayer(nn.Module):
    """Conv1d (stride 2, no bias) → LayerNorm over channels → GELU, on [B, L, channels]."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.convolution = nn.Conv1d(inputs, outputs, kernel, stride=2, bias=False)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, inputs] → [B, (L − kernel) // 2 + 1, outputs]."""
        convolved = self.as_product(x) if x.is_cuda else self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.norm(convolved))

    def as_product(self, x: Tensor) -> Tensor:
        """The convolution as one matrix product over unfolded frames.

        On an H100 it takes half the time of cuDNN's, which copies its input and output to another order of memory
        (benchmarks/results/gpu.json); on a CPU both take the same time.
        """
        unfolded = x.unfold(1, self.convolution.kernel_size[0], 2)  # [B, L', inputs, kernel]
        return F.linear(unfolded.flatten(2), self.convolution.weight.flatten(1))


class PositionEmbedding(nn.Module):
    """Position embedding: a grouped convolution over neighbouring tokens, weight-normalised over its kernel."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        convolution = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.convolution = weight_norm(convolution, name="weight", dim=2)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] → [B, T, D], to be added to the tokens."""
        convolved = self.as_image(x) if x.is_cuda else self.convolution(x.transpose(1, 2)).transpose(1, 2)
        return F.gelu(self.norm(convolved))

    def as_image(self, x: Tensor) -> Tensor:
        """The convolution over an image of height 1, whose order of memory cuDNN takes as it is: 1.5 times as fast."""
        convolution = self.convolution
        image = x.transpose(1, 2)[:, :, None]
        padding, weight = (0, convolution.padding[0]), convolution.weight[:, :, None]
        convolved = F.conv2d(image, weight, convolution.bias, padding=padding, groups=convolution.groups)
        return convolved[:, :, 0].transpose(1, 2)


class TransformerLayer(nn.Module):
    """Post-norm encoder layer with scaled-dot-product attention; dropout where nn.TransformerEncoderLayer has it."""

    def __init__(self, width: int, heads: int, feed_forward: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_in = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, feed_forward)
        self.feed_out = nn.Linear(feed_forward, width)
        self.feed_norm = nn.LayerNorm(width)
        nn.init.xavier_uniform_(self.attention_in.weight)
        nn.init.zeros_(self.attention_in.bias)
        nn.init.zeros_(self.attention_out.bias)

    def forward(self, x: Tensor, attended: Tensor | None) -> Tensor:
        """X [B, S, D]; attended [B, 1, 1, S] bool, False for tokens that are not attended to; None: all are."""
        dropout = self.dropout if self.training else 0.0
        batch, tokens, width = x.shape
        q, k, v = self.attention_in(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attended, dropout_p=dropout)
        mixed = self.attention_out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        x = self.attention_norm(x + F.dropout(mixed, dropout))
        fed = self.feed_out(F.dropout(F.gelu(self.feed_in(x)), dropout))
        output: Tensor = self.feed_norm(x + F.dropout(fed, dropout))
        return output


class TransformerTower(AudioTower):
    """Log-mel spectrograms of different lengths → one vector each, by convolutions over frames and a Transformer."""

    def __init__(self, record: ModelRecord) -> None:
        super().__init__(record)
        settings = record.model
        self.width = settings.width
        self.recipe, self.input_recipe = record.audio.recipe, record.input
        channels = [record.input_width] + [settings.conv_channels] * len(KERNELS)
        self.convolutions = nn.Sequential(*map(ConvolutionLayer, channels[:-1], channels[1:], KERNELS))
        self.projection_norm = nn.LayerNorm(settings.conv_channels)
        self.projection = nn.Linear(settings.conv_channels, settings.width)
        self.position = PositionEmbedding(settings.width, settings.position_kernel, settings.position_groups)
        self.norm = nn.LayerNorm(settings.width)
        self.dropout = nn.Dropout(settings.dropout)
        self.cls = nn.Parameter(torch.randn(1, 1, settings.width))
        self.layers = nn.ModuleList(
            TransformerLayer(settings.width, settings.heads, settings.feed_forward, settings.dropout)
            for _ in range(settings.layers)
        )

    def forward(self, features: Tensor, valid: Tensor) -> Tensor:
        """Log-mels [B, F, M] in dB, valid frames [B] → mean over [CLS] and the valid tokens, [B, D]."""
        frames, token_valid = self.prepare(features.to(self.cls.dtype), valid)
        x: Tensor = self.projection(self.projection_norm(self.convolutions(frames)))
        if token_valid is not None:
            x = torch.where(token_valid[:, :, None], x, 0)
        x = self.dropout(self.norm(x + self.position(x)))
        x = torch.cat([self.cls.expand(len(x), 1, -1).to(x.dtype), x], dim=1)
        attended = None if token_valid is None else F.pad(token_valid, (1, 0), value=True)
        for layer in self.layers:
            x = layer(x, None if attended is None else attended[:, None, None, :])
        if attended is None:
            return x.mean(dim=1)
        return torch.where(attended[:, :, None], x, 0).sum(dim=1) / attended.sum(dim=1, keepdim=True)

    def prepare(self, mel: Tensor, valid_frames: Tensor) -> tuple[Tensor, Tensor | None]:
        """Apply the input recipe; see `masked_input` and `official_input`."""
        if self.input_recipe is InputRecipe.MASKED:
            return masked_input(mel, valid_frames)
        return official_input(mel, valid_frames, frames=self.recipe.max_frames, top_db=self.recipe.top_db)

    def layer_groups(self) -> list[list[nn.Parameter]]:
        """Convolutions, projection, position embedding and [CLS]; then each Transformer layer."""
        layers = [list(layer.parameters()) for layer in self.layers]
        in_layers = {id(parameter) for layer in layers for parameter in layer}
        return [[parameter for parameter in self.parameters() if id(parameter) not in in_layers], *layers]

    def compile_parts(self) -> list[nn.Module]:
        """The convolutions, the position embedding and the layers."""
        return [self.convolutions, self.position, *self.layers]
