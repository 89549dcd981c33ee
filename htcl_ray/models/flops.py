"""Floating-point operations of a model, and the peak rates of GPUs that a utilisation is a share of."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from htcl_ray.models.htcl import HTCL

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
STRIDE = 16
"""Lengths that are counted are multiples of it, so that no tower's strides (8 and 16) round them."""
TRAINING_PASSES = 3
"""Forward and backward cost three forward passes: each product has two gradients of its own size. Recomputation is not
counted."""


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s, or None for a device that is not in PEAK_TFLOPS."""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in device_name), None)


class ForwardFlops:
    """Operations of the forward pass of one song by its length, of any tower; a product [a, b] × [b, c] is 2·a·b·c.

    Counted by torch at three lengths. Matrix products and convolutions grow linearly with the length and attention with
    its square, so a parabola through them is exact, but for rounding of lengths by strides. To be made before the model
    is compiled. Norms, activations and logits (under 1 %) are not counted.
    """

    def __init__(self, model: HTCL, longest_frames: int, longest_tokens: int) -> None:
        self._audio = _parabola(lambda length: _count_audio(model, length), longest_frames)
        self._text = _parabola(lambda length: _count_text(model, length), longest_tokens)

    def of(self, frames: ArrayLike, tokens: ArrayLike) -> float:
        """Sum over songs with `frames` [n] valid frames and texts of `tokens` [m] tokens."""
        of_audio = np.polyval(self._audio, np.asarray(frames, dtype=np.float64))
        of_text = np.polyval(self._text, np.asarray(tokens, dtype=np.float64))
        return float(of_audio.sum() + of_text.sum())


def _parabola(count: Callable[[int], int], longest: int) -> np.ndarray:
    least = max(1, longest // 4)
    least -= least % STRIDE if least > STRIDE else 0
    lengths = [least, 2 * least, 4 * least] if longest >= 4 else sorted({1, longest})
    return np.polyfit(lengths, [count(length) for length in lengths], len(lengths) - 1)


@torch.no_grad()
def _count_audio(model: HTCL, frames: int) -> int:
    was_training = model.training
    features = torch.zeros(1, frames, model.record.input_width, device=model.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval().encode_audio(features, torch.tensor([frames]))
    model.train(was_training)
    return int(counter.get_total_flops())


@torch.no_grad()
def _count_text(model: HTCL, tokens: int) -> int:
    was_training = model.training
    ones = torch.ones(1, tokens, dtype=torch.int64, device=model.device)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.eval().encode_text({"input_ids": ones, "attention_mask": ones})
    model.train(was_training)
    return int(counter.get_total_flops())
