"""A training checkpoint: a readable model folder, and beside it what training needs to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcl_ray.models.htcl import HTCL
from htcl_ray.objectives.gather import gather_rows
from htcl_ray.training.randomness import RngState, get_rng_state

TRAINING_STATE = "training_state.pt"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands after whole epochs."""

    epoch: int
    """Epochs done."""
    step: int
    """Steps done, over all epochs."""
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    """Generator states of every worker: name → uint8 [workers, bytes]."""

    def rng_of(self, rank: int, workers: int) -> RngState | None:
        """One worker's generators, or None when the run had another number of workers."""
        if any(len(states) != workers for states in self.rng.values()):
            return None
        # torch reads a generator's state from the start of the storage, so a row of a matrix would be another's or end the process
        return {name: states[rank].clone() for name, states in self.rng.items()}


def gather_state(epoch: int, step: int, optimizer: torch.optim.Optimizer, device: torch.device) -> TrainingState:
    """The state of a run. Every worker must call it: their generator states are collected."""
    rng = {name: gather_rows(state.to(device)[None]).cpu() for name, state in get_rng_state(device).items()}
    return TrainingState(epoch, step, optimizer.state_dict(), rng)


def save_checkpoint(folder: Path, model: HTCL, state: TrainingState) -> None:
    """Write a checkpoint folder. `HTCL.from_pretrained` reads it like any model folder."""
    model.save_pretrained(folder)
    torch.save({"epoch": state.epoch, "step": state.step, "optimizer": state.optimizer, "rng": state.rng}, folder / TRAINING_STATE)


def load_state(folder: Path) -> TrainingState:
    """The training state of a checkpoint folder."""
    return TrainingState(**torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True))
