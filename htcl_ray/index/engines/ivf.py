"""IVF indexes: inverted lists of one-byte codes (ivf) or product-quantization codes (ivf_pq)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import ConfigError
from htcl_ray.index.engines.base import IndexPlan, Structure, best_rows, padded

TUNING_SONGS = 128
TUNING_K = 10
NPROBE_STEP = 1.3
"""Factor between two values of nprobe that are tried."""
BLENDS = (0.0, 0.5, 1.0)


class IvfStructure(Structure):
    """Inverted lists of one-byte codes; a query reads the `plan.probes` (nprobe) nearest lists."""

    kind = "ivf"
    faiss_class = "IndexIVFScalarQuantizer"
    byte_codes = True

    @staticmethod
    def factory(plan: IndexPlan) -> str:
        """Lists of 8-bit scalar quantization."""
        return f"IVF{plan.lists},SQ8"

    @classmethod
    def configure(cls, index: Any, plan: IndexPlan) -> None:
        """Silence a warning of k-means about small lists; the plan bounds their number."""
        index.cp.min_points_per_centroid = 1

    def extended(self, plan: IndexPlan, kept: NDArray[np.int64], added: NDArray[np.float32]) -> Self:
        """See `Structure.extended`. All rows are encoded again with the learned lists and codes."""
        vectors = self.rows_with(kept, added)
        index = self.copied_index()
        index.reset()
        index.add(padded(vectors, index.d))
        return type(self)(plan, index, vectors)

    def cost(self, wanted: int, total: int) -> float:
        """Rows of the lists that a query reads."""
        return len(self) * self.plan.probes / self.plan.lists

    def parameters(self, wanted: int, total: int, selector: Any) -> Any:
        """The selector and nprobe."""
        nprobe = min(math.ceil(self.plan.probes * (len(self) / total)), self.plan.lists)
        return faiss.SearchParametersIVF(sel=selector, nprobe=nprobe)

    def tuned(self, dim: int, settings: IndexSettings) -> Self:
        """The structure with the smallest nprobe whose recall is halfway from `index.min_recall` to 1.

        How many lists a query must read depends on how the songs cluster, so recall@10 is measured on indexed songs, at
        both ends and in the middle of the blend. `index.ivf_probes` fixes nprobe. (Unseen songs are reserved for the
        recall of the finished index, see `recall.py`.)
        """
        if settings.ivf_probes is not None:
            return self
        rows = np.sort(np.random.default_rng(0).permutation(len(self))[:TUNING_SONGS])
        queries = _blended(self.vectors[rows], dim)
        wanted = min(TUNING_K + 1, len(self))  # the nearest song of an indexed song is usually the song itself
        expected = best_rows(self.vectors, queries, wanted)
        nprobe = 1
        while nprobe < self.plan.lists:
            actual = self.planned(replace(self.plan, probes=nprobe)).nearest(queries, wanted)
            if _recall(expected, actual) >= (1 + settings.min_recall) / 2:
                break
            nprobe = math.ceil(nprobe * NPROBE_STEP)
        return self.planned(replace(self.plan, probes=min(nprobe, self.plan.lists)))


class IvfPqStructure(IvfStructure):
    """Inverted lists of product-quantization codes (Jégou et al. 2011); the default above 2,000,000 songs."""

    kind = "ivf_pq"
    faiss_class = "IndexIVFPQ"
    min_songs = 256
    default_rerank = 8.0
    byte_codes = False

    @staticmethod
    def factory(plan: IndexPlan) -> str:
        """Lists of product quantization."""
        return f"IVF{plan.lists},PQ{plan.code_bytes}"

    @classmethod
    def check(cls, settings: IndexSettings, width: int) -> None:
        """Raise ConfigError when `index.pq_bytes` does not divide the width."""
        if settings.pq_bytes is not None and width % settings.pq_bytes:
            raise ConfigError(
                f"index.pq_bytes is {settings.pq_bytes}, but the vectors have {width} numbers; expected a divisor of "
                "that, or null"
            )

    @classmethod
    def configure(cls, index: Any, plan: IndexPlan) -> None:
        """See `IvfStructure.configure`; also skip polysemous training, which is not used and takes 1.5 s per byte."""
        super().configure(index, plan)
        index.pq.cp.min_points_per_centroid = 1
        index.do_polysemous_training = False


def _blended(rows: NDArray[np.float32], dim: int) -> NDArray[np.float32]:
    """The rows as queries at each blend, one blend after the other, [blends · rows, width]."""
    if rows.shape[1] == dim:
        return rows
    weights = np.repeat(np.array([(1 - blend, blend) for blend in BLENDS], dtype=np.float32), dim, axis=1)
    return np.concatenate([rows * weight for weight in weights])


def _recall(expected: NDArray[np.int64], actual: NDArray[np.int64]) -> float:
    """Mean fraction of the expected rows that are among the candidates."""
    return float(np.mean([np.isin(rows, candidates).mean() for rows, candidates in zip(expected, actual, strict=True)]))
