"""Finding songs: the encoder that makes vectors, the index that searches them, and the service that answers with both.

Names are imported on first use: the encoder and the vectors need neither FAISS nor an audio library.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from htcl_ray.retrieval.index import SongIndex
    from htcl_ray.retrieval.ranking import Hit
    from htcl_ray.retrieval.service import SearchService
    from htcl_ray.retrieval.vectors import Vectors

__all__ = ["Hit", "SearchService", "SongIndex", "Vectors"]

_MODULES = {"Hit": "ranking", "SearchService": "service", "SongIndex": "index", "Vectors": "vectors"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
