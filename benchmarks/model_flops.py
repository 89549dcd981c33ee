"""Floating-point operations of the model's forward pass, and the peak rates that a utilization is a share of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

PEAK_TFLOPS = {
    "B200": 2250,
    "H200": 989,
    "H100 NVL": 835,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "A10": 125,
}
"""Dense bf16 by part of the device's name, from the vendors' data sheets; the first that matches."""
TRAINING_PASSES = 3
"""Forward and backward cost three forward passes: each product has two gradients of its own size. Recomputation is not
counted."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s, or None for a device that is not in PEAK_TFLOPS."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


def forward_flops(model: Any, frames: Sequence[int], text_tokens: Sequence[int]) -> int:
    """Operations of one forward pass of both towers and heads over clips of `frames` valid frames and texts of
    `text_tokens` tokens.

    A product [a, b] × [b, c] counts 2·a·b·c. Padding is not counted, nor are norms, activations and the logits (under 1
    %).
    """
    audio = sum(count * _audio_products(model, length) for length, count in Counter(frames).items())
    text = sum(count * _text_products(model, length) for length, count in Counter(text_tokens).items())
    return 2 * (audio + text)


def _audio_products(model: Any, frames: int) -> int:
    assert model.record.audio.tower_name == "transformer", "only the paper's tower is counted"
    sizes, total, inputs = model.record.model, 0, model.record.input_width
    length = max(frames, 17)  # the receptive field of one token
    for kernel in (5, 3, 3):
        length = (length - kernel) // 2 + 1
        total += length * sizes.conv_channels * inputs * kernel
        inputs = sizes.conv_channels
    width = sizes.width
    total += length * (inputs * width + width * width // sizes.position_groups * sizes.position_kernel)
    total += sizes.layers * _layer_products(length + 1, width, sizes.feed_forward)
    return total + _matrices(model.audio_head)


def _text_products(model: Any, tokens: int) -> int:
    text = model.text_encoder.transformer.config
    layers = text.num_hidden_layers * _layer_products(tokens, text.hidden_size, text.intermediate_size)
    return layers + text.hidden_size**2 + _matrices(model.text_head)


def _layer_products(tokens: int, width: int, feed_forward: int) -> int:
    """Multiplications of a Transformer layer: four projections, scores and mixing, feed-forward."""
    return tokens * (4 * width**2 + 2 * width * feed_forward) + 2 * tokens**2 * width


def _matrices(head: Any) -> int:
    return sum(parameter.numel() for parameter in head.parameters() if parameter.ndim == 2)
