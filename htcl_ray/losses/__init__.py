"""Contrastive losses whose values and gradients are exact over any number of workers. Imported when they are used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htcl_ray.losses.contrastive import info_nce, sigmoid_loss

__all__ = ["info_nce", "sigmoid_loss"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` (PEP 562), so that the registry of losses can be read without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("htcl_ray.losses.contrastive"), name)
