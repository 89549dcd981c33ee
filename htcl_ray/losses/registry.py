"""Losses that a stage can be trained with, by the name in configurations and model records. Imports no torch.

To add a loss, write a subclass of `htcl_ray.losses.base.ContrastiveLoss` and name it in `LOSSES`.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

if TYPE_CHECKING:
    from htcl_ray.losses.base import ContrastiveLoss


@dataclass(frozen=True)
class LossEntry:
    """A loss of the registry."""

    module: str
    class_name: str
    corrects_popularity: bool = False
    """Whether the class takes `log_q`, which `finetune.popularity_correction` needs."""
    several_positives: bool = False
    """Whether the class has `several_positives`, which `finetune.several_positives` needs."""


LOSSES = {
    "softmax": LossEntry("htcl_ray.losses.contrastive", "InfoNCE", corrects_popularity=True, several_positives=True),
    "sigmoid": LossEntry("htcl_ray.losses.contrastive", "SigmoidLoss"),
}

if TYPE_CHECKING:
    LossName = str
else:
    LossName = Literal[tuple(LOSSES)]
    """A key of `LOSSES`, as a type that pydantic checks."""


def loss_class(name: LossName) -> type[ContrastiveLoss]:
    """The class of a loss, imported now."""
    entry = LOSSES[name]
    return cast("type[ContrastiveLoss]", getattr(importlib.import_module(entry.module), entry.class_name))
