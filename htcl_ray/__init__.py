"""HTCL on Ray: music representations learned from audio, text and listening.

The names in `__all__` are the public API. They are imported on first use: `import htcl_ray` loads neither Ray nor
PyTorch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htcl_ray.audio import log_mel
    from htcl_ray.client import AsyncClient, Client
    from htcl_ray.evaluation import metrics
    from htcl_ray.index.song_index import SongIndex
    from htcl_ray.losses import info_nce
    from htcl_ray.models import HTCL

__version__ = "0.1.0"
__all__ = ["HTCL", "AsyncClient", "Client", "SongIndex", "info_nce", "log_mel", "metrics"]

_MODULES = {
    "HTCL": "htcl_ray.models",
    "AsyncClient": "htcl_ray.client",
    "Client": "htcl_ray.client",
    "SongIndex": "htcl_ray.index.song_index",
    "info_nce": "htcl_ray.losses",
    "log_mel": "htcl_ray.audio",
    "metrics": "htcl_ray.evaluation",
}
"""Module from which each public name is imported."""


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    try:
        return getattr(module, name)
    except AttributeError:  # a submodule that has not been imported yet
        return importlib.import_module(f"{_MODULES[name]}.{name}")


def __dir__() -> list[str]:
    """All names of the module, including public names that have not been imported yet."""
    return sorted({*globals(), *__all__})
