"""The model: audio tower, text tower, heads and fusion network, and its folder on disk. Imported when it is used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htcl_ray.models.folder import weights_fingerprint
    from htcl_ray.models.htcl import HTCL

__all__ = ["HTCL", "weights_fingerprint"]

_MODULES = {"HTCL": "htcl_ray.models.htcl", "weights_fingerprint": "htcl_ray.models.folder"}


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` (PEP 562), so that the registry of audio towers can be read without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
