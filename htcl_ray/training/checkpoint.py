"""Training checkpoints: a model folder with the state that training needs to resume."""

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
    """State of a run: together with the model, everything that the next step depends on."""

    step: int
    """Steps done, over all epochs. The epoch and the place in it follow, as every epoch has the same number of
    steps."""
    micro_batch_size: int | None
    """Rows encoded at a time, which decides the order of dropout's random numbers."""
    probed: bool
    """Whether the micro-batch size was measured by `auto`: a resumed run with `auto` keeps it."""
    optimizer: dict[str, Any]
    rng: dict[str, Tensor]
    """Generator states of every worker: name → uint8 [workers, bytes]."""
    sums: dict[str, Tensor]
    """Sums of the metrics of the current epoch, of every worker: name → [workers]."""

    @property
    def workers(self) -> int:
        """Number of workers of the run."""
        return len(self.rng["cpu"])

    def rng_of(self, rank: int, workers: int) -> RngState | None:
        """Generator states of one worker, or None if the run had another number of workers."""
        if self.workers != workers:
            return None
        # torch reads a generator's state from the start of the storage, so a row of a matrix must be cloned.
        return {name: states[rank].clone() for name, states in self.rng.items()}

    def sums_of(self, rank: int, workers: int) -> dict[str, Tensor]:
        """Sums of one worker; if the run had another number of workers, the first worker gets the sums of all."""
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
    """Gather the state of a run from all workers, each of which must call it."""
    rng = {name: gather_rows(state.to(device)[None]).cpu() for name, state in get_rng_state(device).items()}
    sums_of_all = {name: gather_rows(value[None]).cpu() for name, value in sums.items()}
    return TrainingState(step, micro_batch_size, probed, optimizer.state_dict(), rng, sums_of_all)


def save_checkpoint(folder: Path, model: HTCL, state: TrainingState) -> None:
    """Write a checkpoint folder. `HTCL.from_pretrained` reads it like any model folder."""
    model.save_pretrained(folder)
    with open(folder / TRAINING_STATE, "wb") as file:  # given a path, torch hides the reason of a failure
        torch.save(vars(state), file)


def load_state(folder: Path) -> TrainingState:
    """Read the training state of a checkpoint folder. Raises WorkspaceError when it is damaged."""
    try:
        return TrainingState(**torch.load(folder / TRAINING_STATE, map_location="cpu", weights_only=True))
    except Exception as error:  # a damaged file makes torch raise any error  # noqa: BLE001
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WorkspaceError(
            f"{folder / TRAINING_STATE} cannot be read ({reason}); "
            "remove the damaged checkpoint to resume from the one before"
        ) from None
