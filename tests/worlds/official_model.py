"""The published model in plain torch, with the authors' names as attributes: what an imported file is compared with.

Written from the description of the method, apart from `htcl_ray`. Everything is as in their code: each clip padded at
its maximum − 80 dB to 1,251 frames, normalised whole by mean and population standard deviation + 1e-8, no mask, mean
over [CLS] and all tokens.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import BertConfig, BertModel

FRAMES, MELS = 1251, 128


def prepared(mel: np.ndarray) -> np.ndarray:
    """One clip, [frames, mels] in dB → [1251, mels]."""
    padded = np.full((FRAMES, mel.shape[1]), mel.max() - 80.0)
    padded[: len(mel)] = mel[:FRAMES]
    return (padded - padded.mean()) / (padded.std() + 1e-8)


def batch_of(mels: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack([prepared(mel) for mel in mels])).float()


def container(**modules: nn.Module) -> nn.Module:
    module = nn.Module()
    for name, child in modules.items():
        module.add_module(name, child)
    return module


def mlp(*widths: int) -> nn.Sequential:
    layers = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(0.0)]
    return nn.Sequential(*layers[:-2])


class AudioModel(nn.Module):
    def __init__(
        self, channels: int = 512, width: int = 768, layers: int = 12, feed_forward: int = 3072, kernel: int = 31
    ) -> None:
        super().__init__()
        inputs = (MELS, channels, channels)
        self.feature_extractor = container(
            layers=nn.ModuleList(
                nn.Sequential(
                    nn.Identity(),
                    nn.Conv1d(i, channels, k, stride=2, bias=False),
                    nn.Identity(),
                    nn.LayerNorm(channels),
                )
                for i, k in zip(inputs, (5, 3, 3), strict=True)
            )
        )
        self.feature_projection = container(layer_norm=nn.LayerNorm(channels), projection=nn.Linear(channels, width))
        conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=16)
        self.pos_conv_embed = container(conv=weight_norm(conv, dim=2), layer_norm=nn.LayerNorm(width))
        self.layer_norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, width // 64, feed_forward, 0.1, activation="gelu", batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, 1251, 128] → mean over all tokens, [B, width]."""
        gelu = nn.functional.gelu
        for layer in self.feature_extractor.layers:
            x = gelu(layer[3](layer[1](x.mT).mT))
        x = self.feature_projection.projection(self.feature_projection.layer_norm(x))
        x = self.layer_norm(x + gelu(self.pos_conv_embed.layer_norm(self.pos_conv_embed.conv(x.mT).mT)))
        return self.transformer_encoder(torch.cat([self.cls_token.repeat(len(x), 1, 1), x], dim=1)).mean(dim=1)


class Wrapper(nn.Module):
    """What their training scripts save, of either stage."""

    def __init__(
        self,
        stage: int,
        audio_model: AudioModel,
        bert: BertConfig,
        hidden: tuple[int, int] = (384, 192),
        dim: int = 100,
    ) -> None:
        super().__init__()
        self.audio_model = audio_model
        self.text_model = BertModel(bert)
        self.audio_mlp = mlp(audio_model.cls_token.shape[2], *hidden, dim)
        self.text_mlp = mlp(bert.hidden_size, *hidden, dim)
        if stage == 2:
            self.fusion_mlp = mlp(2 * dim, 2 * dim, dim, dim)
        for name in ["tau"] if stage == 1 else ["tau_1", "tau_2", "tau_3"]:
            self.register_parameter(name, nn.Parameter(torch.tensor(2.6)))

    def audio(self, mels: list[np.ndarray]) -> Tensor:
        return self.audio_mlp(self.audio_model(batch_of(mels)))

    def text(self, **tokens: Tensor) -> Tensor:
        return self.text_mlp(self.text_model(**tokens).pooler_output)


def small_wrapper(stage: int) -> Wrapper:
    """A model of their kind that is small enough for a test, without a tokenizer of its own."""
    torch.manual_seed(stage)
    bert = BertConfig(
        vocab_size=10,
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=96,
        max_position_embeddings=16,
    )
    return Wrapper(
        stage, AudioModel(channels=24, width=128, layers=2, feed_forward=80, kernel=7), bert, hidden=(40, 30), dim=20
    )
