"""A training checkpoint: a readable model folder, and beside it what training needs to go on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from htcl_ray.errors import WorkspaceError
from htcl_ray.losses.collectives import gather_rows
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.randomness import RngState, get_rng_state

TRAINING_STATE = "training_state.pt"


@dataclass(frozen=True)
class TrainingState:
    """Where a run stands: with the model, all that the next step depends on."""

    step: int
    """Steps done, over all epochs. The epoch and the place in it follow, as every epoch has the same number of
    steps."""
    micro_batch_size: int | None
    """Rows encoded at a time: dropout's random numbers are drawn in that order."""
    probed: bool
    """The micro-batch size was found by `auto`, not given: a resumed run with `auto` goes on with it."""
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    """Generator states of every worker: name → uint8 [workers, bytes]."""
    sums: dict[str, Tensor]
    """Figures of the begun epoch so far, of every worker: name → [workers]."""

    @property
    def workers(self) -> int:
        """How many workers made it."""
        return len(self.rng["cpu"])

    def rng_of(self, rank: int, workers: int) -> RngState | None:
        """One worker's generators, or None when the run had another number of workers."""
        if self.workers != workers:
            return None
        # torch reads a generator's state from the start of the storage, so a row of a matrix would be another's or end
        # the process
        return {name: states[rank].clone() for name, states in self.rng.items()}

    def sums_of(self, rank: int, workers: int) -> dict[str, Tensor]:
        """One worker's figures of the begun epoch; the first gets everyone's when the run had another number of
        workers.
        """
        if self.workers == workers:
            return {name: values[rank] for name, values in self.sums.items()}
        return {name: values.sum() if rank == 0 else torch.zeros_like(values[0]) for name, values in self.sums.items()}


def gather_state(
    step: int,
    micro_batch_size: int | None,
    probed: bool,
    optimizer: torch.optim.Optimizer,
    sums: dict[str, Tensor],
    device: torch.device,
) -> TrainingState:
    """The state of a run. Every worker must call it: their generator states and figures are collected."""
    rng = {name: gather_rows(state.to(device)[None]).cpu() for name, state in get_rng_state(device).items()}
    everyone = {name: gather_rows(value[None]).cpu() for name, value in sums.items()}
    return TrainingState(step, micro_batch_size, probed, optimizer.state_dict(), rng, everyone)


def save_checkpoint(folder: Path, model: HTCL, state: TrainingState) -> None:
    """Write a checkpoint folder. `HTCL.from_pretrained` reads it like any model folder."""
    model.save_pretrained(folder)
    with open(folder / TRAINING_STATE, "wb") as file:  # given a path, torch does not say why it cannot write
        torch.save(vars(state), file)


def load_state(folder: Path) -> TrainingState:
    """The training state of a checkpoint folder. Raises WorkspaceError when it is damaged."""
    try:
        return TrainingState(**torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True))
    except Exception as error:  # what torch raises depends on where a file stops to make sense
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(
            f"{folder / TRAINING_STATE} cannot be read ({reason}); remove the damaged checkpoint to resume from the one before"
        ) from None
