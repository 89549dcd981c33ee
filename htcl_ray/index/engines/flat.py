"""Flat index: exact search over the uncompressed vectors."""

from __future__ import annotations

import math
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.engines.base import IndexPlan, Structure

GATHER_BELOW = 0.1
"""Share of allowed rows below which copying them and scoring the copy is faster than a selector over all rows."""


class FlatStructure(Structure):
    """Exact search over the vectors themselves; the default up to 20,000 songs."""

    kind = "flat"
    faiss_class = "IndexFlatIP"
    min_songs = 0
    stores_vectors = True

    @staticmethod
    def factory(plan: IndexPlan) -> str:
        """Uncompressed vectors."""
        return "Flat"

    def extended(self, plan: IndexPlan, kept: NDArray[np.int64], added: NDArray[np.float32]) -> Self:
        """See `Structure.extended`."""
        return self.remade(plan, kept, added)

    def cost(self, wanted: int, total: int) -> float:
        """0 while a selector over all rows is faster than gathering the allowed ones, else infinite."""
        return 0 if total / len(self) >= GATHER_BELOW else math.inf

    def parameters(self, wanted: int, total: int, selector: Any) -> Any:
        """The selector alone."""
        return faiss.SearchParameters(sel=selector)
