"""Compiled towers: the same numbers as eager ones, and dropout that both passes of the cached gradient share.

In this tier because compiling takes long, not because it takes several processes.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from htcl_ray.losses.stages import pretrain_terms
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.optimization import compile_towers
from htcl_ray.training.randomness import get_rng_state, set_rng_state
from htcl_ray.training.stage_tasks import Task
from tests.worlds.synthetic_features import tiny_config

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++"),
]

CPU = torch.device("cpu")
TEXTS = ["calm piano at night", "fast techno", "calm techno", "slow choir", "piano", "night"]


def batch(model: HTCL, valid: list[int]) -> Batch:
    count = len(valid)
    mel = torch.randn(count, max(valid), 16, generator=torch.Generator().manual_seed(0)) * 12 - 40
    return Batch(
        mel, torch.tensor(valid), model.text_encoder.tokenize(TEXTS[:count]), torch.arange(count)[:, None].repeat(1, 3)
    )


def gradients(model: HTCL) -> dict[str, Tensor]:
    actual = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    return actual


def assert_close(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(actual) == set(expected)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (actual[name] - gradient).abs().max().item() <= 1e-4 * largest, name


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # of the compiler, which looks at every tensor
def test_compiled_towers():
    config = tiny_config("unused")
    vocabulary = train_wordpiece(TEXTS, 60)
    eager, model = HTCL.untrained(config, vocabulary), HTCL.untrained(config, vocabulary)
    names = list(model.state_dict())
    compile_towers(model, batch(model, [32, 9]), CPU, pytest.fail)
    assert list(model.state_dict()) == names
    task = Task("pretrain", 6, 1, lambda epoch: torch.arange(6).numpy(), pretrain_terms, {"text": 1.0})

    # with dropout: two passes equal one graph over the same micro-batches and random numbers, for lengths of several
    # kinds
    for valid in ([32, 9, 20, 31, 12, 5], [17, 28, 8, 11, 30, 21]):
        torch.manual_seed(3)
        start = get_rng_state(CPU)
        compute_gradients(model.train(), batch(model, valid), task, 2)
        actual, after = gradients(model), get_rng_state(CPU)
        set_rng_state(start, CPU)
        encoded = [encode(model, batch(model, valid).part(first, first + 2)) for first in (0, 2, 4)]
        audio, text = (torch.cat(vectors) for vectors in zip(*encoded, strict=True))
        pretrain_terms(model, audio, text, batch(model, valid).ids)["text"].backward()
        assert_close(actual, gradients(model))
        assert torch.equal(after["cpu"], get_rng_state(CPU)["cpu"])
        assert not torch.equal(after["cpu"], start["cpu"]), "dropout drew nothing"

    # without: the eager numbers, and the eager vectors
    for part in (eager, model):
        compute_gradients(part.eval(), batch(part, [32, 9, 20, 31, 12, 5]), task, 2 if part is model else None)
    assert_close(gradients(model), gradients(eager))
