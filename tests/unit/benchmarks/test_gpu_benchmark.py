"""The GPU benchmark: records, layer groups, clip lengths, precision and busy time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.gpu.correctness import _gate_bounds, _relative, layer_group
from benchmarks.gpu.step import CASES, COMPILED, busy_seconds
from benchmarks.gpu.units import Part, embedding_precision, read_records, training_precision
from benchmarks.synthetic_songs import clip_lengths
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training import batches
from htcl_ray.training.batches import Batch, encode
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit
CPU = torch.device("cpu")


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return Part("some", "cpu", time.time() + 60, tmp_path / "some.jsonl")


def never() -> dict[str, Any]:
    raise AssertionError("must not run again")


def failing() -> dict[str, Any]:
    raise ValueError("a bad number\nand more")


def test_a_failed_measurement_does_not_stop_the_others(part: Part, capsys: pytest.CaptureFixture[str]):
    part.run({"first": failing, "second": lambda: {"songs": 3, "line": "three", "passed": True}})
    records = read_records(part.records, "done")
    assert records["first"]["error"] == "ValueError: a bad number"
    assert records["second"]["songs"] == 3
    printed = capsys.readouterr().out
    assert "FAIL some  first: ValueError: a bad number" in printed
    assert "ok   some  second: three" in printed


def test_a_killed_run_resumes_after_the_measurement_that_killed_it(part: Part):
    part.run({"before": lambda: {"songs": 1}})
    with part.records.open("a", encoding="utf-8") as file:  # a measurement that began and did not end
        file.write(json.dumps({"unit": "deadly"}) + "\n")
    part.run({"before": never, "deadly": never, "after": lambda: {"songs": 2}})
    records = read_records(part.records, "ended with exit code -11")
    assert list(records) == ["before", "deadly", "after"]
    assert records["deadly"] == {"error": "its process did not finish it (ended with exit code -11)"}
    assert records["after"]["songs"] == 2


@dataclass
class Interval:
    start: float
    end: float


@dataclass
class Event:
    time_range: Interval
    device_type: Any = torch.autograd.DeviceType.CUDA
    is_user_annotation: bool = False


def test_busy_time_is_the_union_of_kernels():
    """In µs: 0–10 and 5–20 overlap, 30–40 contains 32–33; CPU work and annotations do not count."""
    kernels = [(30, 40), (0, 10), (5, 20), (32, 33)]
    events = [Event(Interval(*interval)) for interval in kernels]
    events += [Event(Interval(0, 100), torch.autograd.DeviceType.CPU), Event(Interval(0, 100), is_user_annotation=True)]
    assert busy_seconds(events) == pytest.approx(30e-6)


def test_every_parameter_has_a_layer_group(tmp_path: Path):
    config = tiny_config(tmp_path, **{"model.layers": 3})
    model = HTCL.untrained(config, train_wordpiece(["calm piano", "fast techno"], 100)).to_stage_2(0.074, seed=0)
    groups = {layer_group(name, 3) for name, _ in model.named_parameters()}
    assert groups == {
        "audio convolutions",
        "audio projection and position",
        *(f"audio layers, third {third}" for third in (1, 2, 3)),
        "text embeddings",
        "text layers",
        "text pooler",
        "audio head",
        "text head",
        "fusion",
        "logit scale",
    }


def test_mixed_clip_lengths_follow_the_documented_distribution():
    frames = clip_lengths("mixed", 1251, 60_000, np.random.default_rng(0))
    previews = frames == round(30 / 120 * 1251)
    assert previews.mean() == pytest.approx(1 / 3, abs=0.01)
    assert (frames[~previews] == 1251).mean() == pytest.approx(0.8687, abs=0.01)  # 1 − Φ(ln(120 / 210) / 0.5)
    assert frames.min() >= 1
    assert frames.max() == 1251


@pytest.mark.parametrize("context", [training_precision, embedding_precision])
def test_precision_changes_only_within_the_context(context: Callable[..., Any], tmp_path: Path):
    model = HTCL.untrained(tiny_config(tmp_path), train_wordpiece(["calm piano", "fast techno"], 100)).eval()
    mel = torch.randn(2, 20, model.recipe.n_mels) * 10 - 40
    batch = Batch(mel, torch.tensor([20, 17]), model.text_encoder.tokenize(["calm piano", "techno"]), torch.zeros(2, 3))

    def numbers() -> torch.Tensor:
        return encode(model, batch)[0] if context is training_precision else model.embed_mel(mel)

    exact, before = numbers(), dict(batches.AUTOCAST)
    with context("bf16", CPU):
        rough = numbers()
    with context("fp32", CPU):
        again = numbers()
    assert 1e-5 < _relative(rough, exact) < 0.05
    assert torch.equal(again, exact)
    assert before == batches.AUTOCAST == {"cuda": torch.bfloat16}


def test_a_difference_that_is_not_finite_is_infinite():
    assert _relative(torch.tensor([1.0, float("nan")]), torch.ones(2)) == float("inf")


def test_gate_bounds_are_read_from_the_release_gate():
    assert set(_gate_bounds()) == {"repeat_difference", "batch_difference", "padding_difference", "stored_difference"}


def test_cases_are_unique():
    cases = [case[:3] for case in CASES]
    assert len(set(cases)) == len(cases)
    assert all(COMPILED in sides and len(set(sides)) == len(sides) for *_, sides in CASES)
