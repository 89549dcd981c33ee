"""The pairwise sigmoid loss against its formula, entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses import sigmoid_loss
from htcl_ray.losses.contrastive import SigmoidLoss

pytestmark = pytest.mark.unit
ROWS = 11


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    first, second = (torch.randn(ROWS, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return first, second, *(torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, -3.0))


def naive(first: Tensor, second: Tensor, scale: Tensor, bias: Tensor, excluded: Tensor | None = None) -> Tensor:
    entries = []
    for i in range(len(first)):
        for j in range(len(second)):
            logit = F.cosine_similarity(first[i], second[j], dim=0) * scale.exp() + bias
            if i == j:
                entries.append(-torch.log(1 / (1 + torch.exp(-logit))))
            elif excluded is None or not excluded[i, j]:
                entries.append(-torch.log(1 - 1 / (1 + torch.exp(-logit))))
    return torch.stack(entries).sum() / len(first)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 100])
def test_sigmoid_loss_equals_naive_computation(chunk_rows: int | None, masked: bool):
    tensors = inputs()
    mask = torch.rand(ROWS, ROWS, generator=torch.Generator().manual_seed(1)) < 0.3 if masked else None
    expected = naive(*tensors, mask)
    wanted = torch.autograd.grad(expected, tensors)
    loss = sigmoid_loss(*tensors, excluded=mask, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    for gradient, wanted_gradient in zip(torch.autograd.grad(loss, tensors), wanted, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12, rtol=0)


def test_sigmoid_loss_closed_forms():
    same, zero = torch.ones(7, 3), torch.tensor(0.0)
    assert sigmoid_loss(same, same, zero, torch.tensor(-1.0)).item() == pytest.approx(
        7 * math.log(2), abs=1e-5
    )  # every logit is 0
    one_hot, scale = torch.eye(4), torch.tensor(math.log(10.0))
    expected = math.log1p(math.exp(-7)) + 3 * math.log1p(math.exp(-3))
    assert sigmoid_loss(one_hot, one_hot, scale, torch.tensor(-3.0)).item() == pytest.approx(expected, abs=1e-6)
    far = sigmoid_loss(one_hot, -one_hot, torch.tensor(math.log(100.0)), torch.tensor(-50.0))
    assert far.item() == pytest.approx(150, abs=1e-3)  # no overflow in fp32


def test_positive_is_never_excluded():
    first, second, scale, bias = inputs()
    everything = torch.ones(ROWS, ROWS, dtype=torch.bool)
    logits = F.cosine_similarity(first, second) * scale.exp() + bias
    torch.testing.assert_close(
        sigmoid_loss(first, second, scale, bias, excluded=everything), F.softplus(-logits).mean()
    )


def test_sum_rows_of_workers_add_up_to_the_whole_batch():
    first, second, scale, bias = inputs()
    queries, keys = F.normalize(first, dim=1), F.normalize(second, dim=1)
    loss = SigmoidLoss(scale, bias)
    parts = [loss.sum_rows(queries[a:b], keys, first_positive=a) for a, b in ((0, 4), (4, 9), (9, 11))]
    torch.testing.assert_close(
        torch.stack(parts).sum() / ROWS, sigmoid_loss(first, second, scale, bias), atol=1e-12, rtol=0
    )


def test_initial_bias_is_the_log_odds_of_a_match():
    """Where nothing is learned, cosines are about 0, and no constant bias has a lower loss."""
    initial = SigmoidLoss.initial_parameters(temperature=0.074, batch_size=ROWS)
    assert initial == {"logit_scale": -math.log(0.074), "logit_bias": -math.log(ROWS - 1)}
    bias = torch.tensor(initial["logit_bias"], requires_grad=True)
    orthogonal = torch.eye(2 * ROWS)
    sigmoid_loss(orthogonal[:ROWS], orthogonal[ROWS:], torch.tensor(2.6), bias).backward()
    assert bias.grad is not None
    assert abs(bias.grad.item()) < 1e-5
