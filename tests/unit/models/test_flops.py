"""Counts of floating-point operations, against sums of the products of each layer written out."""

from __future__ import annotations

import pytest
import torch

from htcl_ray.models import HTCL
from htcl_ray.models.flops import ForwardFlops, peak_tflops
from htcl_ray.models.towers.vocabulary import train_wordpiece
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit
FRAMES, TOKENS = 400, 12


@pytest.fixture(scope="module")
def model() -> HTCL:
    return HTCL.untrained(tiny_config("unused"), train_wordpiece(["calm piano", "fast techno"], 100))


def layer_products(tokens: int, width: int, feed_forward: int) -> int:
    """Multiplications of a Transformer layer: four projections, scores and mixing, feed-forward."""
    return tokens * (4 * width**2 + 2 * width * feed_forward) + 2 * tokens**2 * width


def head_products(head: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in head.parameters() if parameter.ndim == 2)


def audio_products(model: HTCL, frames: int) -> int:
    sizes, total, inputs = model.record.model, 0, model.record.input_width
    length = 8 * (-(-frames // 8) - 1) + 17  # frames that the tower computes, see `masked_input`
    for kernel in (5, 3, 3):
        length = (length - kernel) // 2 + 1
        total += length * sizes.conv_channels * inputs * kernel
        inputs = sizes.conv_channels
    width = sizes.width
    total += length * (inputs * width + width * width // sizes.position_groups * sizes.position_kernel)
    return (
        total + sizes.layers * layer_products(length + 1, width, sizes.feed_forward) + head_products(model.audio_head)
    )


def text_products(model: HTCL, tokens: int) -> int:
    bert = model.text_encoder.transformer.config
    layers = bert.num_hidden_layers * layer_products(tokens, bert.hidden_size, bert.intermediate_size)
    pooler = bert.hidden_size**2 if model.text_encoder.settings.pooling == "pooler" else 0
    return layers + pooler + head_products(model.text_head)


def test_operations_are_those_of_the_layers(model: HTCL):
    model.train()
    flops = ForwardFlops(model, FRAMES, TOKENS)
    assert model.training
    for tokens in (3, 7, 12):
        assert flops.of([], [tokens]) == pytest.approx(2 * text_products(model, tokens), rel=1e-9)
    for frames in (80, 256, 400):
        assert flops.of([frames], []) == pytest.approx(2 * audio_products(model, frames), rel=1e-9)
    assert flops.of([80, 400], [3]) == pytest.approx(flops.of([80], []) + flops.of([400], []) + flops.of([], [3]))


def test_one_length(model: HTCL):
    assert ForwardFlops(model, 1, 1).of([1], []) == pytest.approx(2 * audio_products(model, 1))


def test_peak_tflops_matches_part_of_the_device_name():
    assert peak_tflops("NVIDIA H100 PCIe") == 756
    assert peak_tflops("NVIDIA H100 80GB HBM3") == 989
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312
    assert peak_tflops("Some Other Card") is None
