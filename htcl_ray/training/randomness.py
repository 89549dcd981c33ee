"""The random number generators of a device, which training uses for dropout only."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RngState = dict[str, Tensor]
"""State of the generators, uint8."""


def seed_worker(seed: int, rank: int, step: int = 0) -> None:
    """Seed dropout, differently on every worker and, if a run is resumed with other workers, at every step."""
    base = seed * 1_000_003 + rank + 1
    # The CPU's generator uses only the lowest 32 bits of a seed, so the step is mixed into them.
    torch.manual_seed(base if step == 0 else int(np.random.SeedSequence([base, step]).generate_state(1)[0]))


def get_rng_state(device: torch.device) -> RngState:
    """State of the generators that computations on `device` draw from."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state: RngState, device: torch.device) -> None:
    """Restore the state of the generators."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
