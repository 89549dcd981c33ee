"""InfoNCE against a naive computation, values and gradients."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from htcl_ray.losses import info_nce
from htcl_ray.losses.base import parameters_of
from htcl_ray.losses.contrastive import InfoNCE, SigmoidLoss
from htcl_ray.losses.false_negatives import false_negatives, pair_codes
from htcl_ray.losses.registry import LOSSES, loss_class

pytestmark = pytest.mark.unit


def naive(first: Tensor, second: Tensor, scale: Tensor, excluded: Tensor | None = None) -> Tensor:
    """Row by row, entry by entry."""
    losses = []
    for a, b, mask in ((first, second, excluded), (second, first, None if excluded is None else excluded.T)):
        for i in range(len(a)):
            logits = [
                F.cosine_similarity(a[i], b[j], dim=0) * scale.exp()
                for j in range(len(b))
                if mask is None or i == j or not mask[i, j]
            ]
            positive = F.cosine_similarity(a[i], b[i], dim=0) * scale.exp()
            losses.append(torch.logsumexp(torch.stack(logits), dim=0) - positive)
    return torch.stack(losses).mean()


def inputs(rows: int = 13, dim: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    first, second = (torch.randn(rows, dim, dtype=torch.float64, requires_grad=True) for _ in range(2))
    return first, second, torch.tensor(2.0, dtype=torch.float64, requires_grad=True)


def random_mask(rows: int = 13) -> Tensor:
    return torch.rand(rows, rows, generator=torch.Generator().manual_seed(1)) < 0.3


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("chunk_rows", [None, 1, 4, 13, 100])
def test_info_nce_equals_naive_computation(chunk_rows: int | None, masked: bool):
    first, second, scale = inputs()
    mask = random_mask() if masked else None
    expected = naive(first, second, scale, mask)
    wanted = torch.autograd.grad(expected, [first, second, scale])
    loss = info_nce(first, second, scale, excluded=mask, chunk_rows=chunk_rows)
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    for gradient, wanted_gradient in zip(torch.autograd.grad(loss, [first, second, scale]), wanted, strict=True):
        torch.testing.assert_close(gradient, wanted_gradient, atol=1e-12, rtol=0)


def test_info_nce_closed_forms():
    same = torch.ones(7, 3)
    assert info_nce(same, same, torch.tensor(2.6)).item() == pytest.approx(math.log(7), abs=1e-5)
    one_hot, scale = torch.eye(4), torch.tensor(math.log(10.0))
    assert info_nce(one_hot, one_hot, scale).item() == pytest.approx(math.log(math.exp(10) + 3) - 10, abs=1e-6)


def test_positive_is_never_excluded():
    first, second, scale = inputs()
    everything = torch.ones(13, 13, dtype=torch.bool)
    assert info_nce(first, second, scale, excluded=everything).item() == 0  # only the positive is left


@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_log_q_divides_every_candidate_by_its_draw_probability(chunk_rows: int | None):
    first, second, scale = inputs()
    mask, log_q = random_mask(), torch.linspace(-7, -1, 13, dtype=torch.float64)
    queries, keys = F.normalize(first, dim=1), F.normalize(second, dim=1)
    expected = torch.zeros((), dtype=torch.float64)
    for i in range(13):
        weights = [torch.exp(queries[i] @ keys[j] * scale.exp()) / log_q[j].exp() for j in range(13)]
        expected = expected - torch.log(weights[i] / sum(weights[j] for j in range(13) if j == i or not mask[i, j]))
    actual = InfoNCE(scale).sum_rows(queries, keys, excluded=lambda a, b: mask[a:b], log_q=log_q, chunk_rows=chunk_rows)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=0)
    for gradient, wanted_gradient in zip(
        torch.autograd.grad(actual, [first, scale], retain_graph=True),
        torch.autograd.grad(expected, [first, scale]),
        strict=True,
    ):
        torch.testing.assert_close(gradient, wanted_gradient, atol=1e-10, rtol=0)


def test_sum_rows_of_workers_add_up_to_the_whole_batch():
    first, second, scale = inputs()
    queries, keys = F.normalize(first, dim=1), F.normalize(second, dim=1)
    whole = InfoNCE(scale).sum_rows(queries, keys)
    parts = [InfoNCE(scale).sum_rows(queries[a:b], keys, first_positive=a) for a, b in ((0, 4), (4, 9), (9, 13))]
    torch.testing.assert_close(torch.stack(parts).sum(), whole, atol=1e-12, rtol=0)


def test_chunked_backward_memory_is_linear_in_rows():
    """Memory kept for the backward pass grows with rows, not with rows squared."""
    rows = 512
    first, second = (torch.randn(rows, 8, requires_grad=True) for _ in range(2))

    def kept(chunk_rows: int) -> int:
        seen: list[weakref.ref[Tensor]] = []

        def note(tensor: Tensor) -> Tensor:
            seen.append(weakref.ref(tensor))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = info_nce(first, second, torch.tensor(2.0, requires_grad=True), chunk_rows=chunk_rows)
        assert loss.requires_grad
        return sum(tensor.numel() for reference in seen if (tensor := reference()) is not None)

    assert kept(16) <= 12 * rows * 8
    assert kept(rows) >= rows * rows  # the measurement sees a kept matrix


def test_chunks_without_gradient():
    first, second, scale = torch.randn(7, 4), torch.randn(7, 4), torch.tensor(1.5)
    whole = info_nce(first, second, scale)
    torch.testing.assert_close(info_nce(first, second, scale, chunk_rows=2), whole)
    with torch.no_grad():
        torch.testing.assert_close(info_nce(first.requires_grad_(), second, scale, chunk_rows=3), whole)
    fixed = second.requires_grad_()
    (gradient,) = torch.autograd.grad(3 * info_nce(first.detach(), fixed, scale, chunk_rows=3), fixed)
    (expected,) = torch.autograd.grad(3 * info_nce(first.detach(), fixed, scale), fixed)
    torch.testing.assert_close(gradient, expected)


def test_chance_level_is_the_loss_of_equal_embeddings_where_it_is_fixed():
    same = torch.ones(9, 3, dtype=torch.float64)
    for temperature in (0.05, 1.0):
        parameters = InfoNCE.initial_parameters(temperature, batch_size=9)
        loss = InfoNCE(torch.tensor(parameters["logit_scale"], dtype=torch.float64))
        assert loss(same, same).item() == pytest.approx(InfoNCE.chance_level(9))
    assert SigmoidLoss.chance_level(9) is None


@pytest.mark.parametrize("name", LOSSES)
def test_registry_names_classes_with_initial_values_of_all_parameters(name: str):
    loss = loss_class(name)
    assert tuple(loss.initial_parameters(0.1, 16)) == parameters_of(loss)
    assert loss.directions in (1, 2)


def test_false_negatives_entry_by_entry():
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(0, 9, (count, 3), generator=generator) for count in (11, 14))
    pairs = {(0, 5), (2, 3), (8, 8), (1, 7)}
    codes = torch.tensor(sorted((a << 32) | b for a, b in pairs))
    actual = false_negatives(rows, columns, codes)
    for i in range(len(rows)):
        for j in range(len(columns)):
            a, b = int(rows[i, 0]), int(columns[j, 0])
            expected = bool((rows[i] == columns[j]).any()) or (min(a, b), max(a, b)) in pairs
            assert bool(actual[i, j]) == expected


def test_pair_codes_are_unique():
    low, high = torch.tensor([0, 0, 1, 2**31 - 2]), torch.tensor([1, 2**31 - 1, 2, 2**31 - 1])
    assert len(set(pair_codes(low, high).tolist())) == 4
