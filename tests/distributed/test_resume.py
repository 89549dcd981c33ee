"""A run that ends at any step and is resumed by new processes has the weights of one that was never ended, bit for
bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from htcl_ray.losses.collectives import rank, wait_for_all
from htcl_ray.models import HTCL
from htcl_ray.training.checkpoint import load_state
from htcl_ray.training.loop import train
from tests.distributed.conftest import run_workers
from tests.unit.training.test_training import CPU, World

pytestmark = pytest.mark.distributed

STEPS = {1: 4, 2: 6}
"""Of two epochs: 36 songs in batches of 16, and 48 drawn pairs."""
OVERRIDES = {
    "pretrain.epochs": 2,
    "finetune.epochs": 2,
    "finetune.pairs_per_epoch": 48,
    "pretrain.micro_batch_size": 3,
    "finetune.micro_batch_size": 5,
    "pretrain.checkpoint_every_steps": 1,
    "finetune.checkpoint_every_steps": 1,
}


def train_stage(
    world: World, stage: int, folder: Path, resume_at: int | None = None, **more: Any
) -> dict[str, torch.Tensor]:
    """Train from the start, leaving a checkpoint of every step in `folder`, or from one of those; dropout is on."""
    config = world.config.with_overrides({**OVERRIDES, **more})
    model = world.model(stage, config) if resume_at is None else HTCL.from_pretrained(folder / f"step-{resume_at}")
    resume = None if resume_at is None else load_state(folder / f"step-{resume_at}")
    epochs: list[dict[str, float]] = []

    def on_checkpoint(metrics: dict[str, float] | None, step: int, save: Any) -> None:
        if metrics is not None:
            epochs.append(metrics)
        if resume_at is None and rank() == 0:
            save(folder / f"step-{step}")

    settings = config.pretrain if stage == 1 else config.finetune
    train(
        model,
        world.task(stage, config),
        world.loader(model),
        settings,
        CPU,
        on_checkpoint=on_checkpoint,
        say=lambda line: None,
        resume=resume,
    )
    wait_for_all()
    return {**model.state_dict(), "loss": torch.tensor(epochs[-1]["loss"])}


def whole(folder: str) -> None:
    world = World(Path(folder) / "world", write=False)
    for stage in STEPS:
        actual = train_stage(world, stage, Path(folder) / f"stage-{stage}")
        torch.save(actual, Path(folder) / f"whole-{stage}-{rank()}.pt")


NO_DROPOUT = {"model.dropout": 0.0, "text.dropout": 0.0, "pretrain.epochs": 1}


def whole_without_dropout(folder: str) -> None:
    world = World(Path(folder) / "world", write=False)
    torch.save(train_stage(world, 1, Path(folder) / "no-dropout", **NO_DROPOUT), Path(folder) / f"two-{rank()}.pt")


def resumed_alone(folder: str) -> None:
    world = World(Path(folder) / "world", write=False)
    torch.save(train_stage(world, 1, Path(folder) / "no-dropout", resume_at=1, **NO_DROPOUT), Path(folder) / "one.pt")


def resumed(folder: str) -> None:
    torch.manual_seed(99 + rank())
    world = World(Path(folder) / "world", write=False)
    for stage, steps in STEPS.items():
        for step in range(1, steps):
            actual = train_stage(world, stage, Path(folder) / f"stage-{stage}", resume_at=step)
            torch.save(actual, Path(folder) / f"resumed-{stage}-{step}-{rank()}.pt")


def test_resumed_at_any_step_bit_for_bit(tmp_path: Path):
    World(tmp_path / "world")
    run_workers(2, tmp_path, whole, str(tmp_path))
    run_workers(2, tmp_path, resumed, str(tmp_path))
    for stage, steps in STEPS.items():
        expected = torch.load(tmp_path / f"whole-{stage}-0.pt", weights_only=True)
        for step in range(1, steps):
            for worker in range(2):
                actual = torch.load(tmp_path / f"resumed-{stage}-{step}-{worker}.pt", weights_only=True)
                different = [name for name, tensor in expected.items() if not torch.equal(tensor, actual[name])]
                assert not different, (
                    f"stage {stage} resumed after step {step}, worker {worker}: {different[:3]} differ"
                )


def test_resumed_with_another_number_of_workers(tmp_path: Path):
    """Without dropout only the order of sums differs."""
    World(tmp_path / "world")
    run_workers(2, tmp_path, whole_without_dropout, str(tmp_path))
    run_workers(1, tmp_path, resumed_alone, str(tmp_path))
    expected, actual = (torch.load(tmp_path / name, weights_only=True) for name in ("two-0.pt", "one.pt"))
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-3, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
