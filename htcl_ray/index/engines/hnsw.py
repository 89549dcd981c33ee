"""HNSW index: a navigable graph over one-byte codes (Malkov and Yashunin 2018)."""

from __future__ import annotations

import math
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from htcl_ray.index.engines.base import IndexPlan, Structure, padded

ENTRY_COST = 20
"""Cost of one entry of the search list, in rows of an exact search: entries are scattered in memory and have
neighbours. Measured at 30,000 and 100,000 songs (docs/decisions/0015-index-kinds.md)."""


class HnswStructure(Structure):
    """Graph over one-byte codes; the default up to 2,000,000 songs."""

    kind = "hnsw"
    faiss_class = "IndexHNSWSQ"
    byte_codes = True

    @staticmethod
    def factory(plan: IndexPlan) -> str:
        """Graph over 8-bit scalar quantization."""
        return f"HNSW{plan.neighbors},SQ8"

    @classmethod
    def configure(cls, index: Any, plan: IndexPlan) -> None:
        """Set the width of the search that links new nodes."""
        index.hnsw.efConstruction = plan.ef_construction

    def extended(self, plan: IndexPlan, kept: NDArray[np.int64], added: NDArray[np.float32]) -> Self:
        """See `Structure.extended`. A graph that loses rows is rebuilt, because FAISS cannot unlink nodes."""
        if len(kept) < len(self):
            return self.remade(plan, kept, added)
        index = self.copied_index()
        index.add(padded(added, index.d))
        return type(self)(plan, index, self.rows_with(kept, added))

    def cost(self, wanted: int, total: int) -> float:
        """Entries of the search list, which grows by the inverse of the allowed share."""
        return ENTRY_COST * max(self.plan.ef_search, wanted) / (total / len(self))

    def parameters(self, wanted: int, total: int, selector: Any) -> Any:
        """The selector and the length of the search list."""
        return faiss.SearchParametersHNSW(
            sel=selector, efSearch=math.ceil(max(self.plan.ef_search, wanted) * (len(self) / total))
        )
