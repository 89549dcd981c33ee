"""Vectors in a FAISS structure that is never changed once it is made. The only file that knows FAISS."""

from __future__ import annotations

import math
import os
import uuid
from pathlib import Path
from typing import Any, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from htcl_ray.errors import MismatchError
from htcl_ray.index.folder import EXACT_FILE, VECTORS_FILE
from htcl_ray.index.plan import IndexPlan

CLASSES = {"flat": "IndexFlatIP", "hnsw": "IndexHNSWSQ", "ivf": "IndexIVFScalarQuantizer", "ivf_pq": "IndexIVFPQ"}
GATHER_BELOW = 0.1
"""Of a flat structure: below this share of allowed rows, copying them together and scoring the copy beats asking about
every row."""
GRAPH_WORK = 20
"""What one entry of a graph's search list costs, in rows of an exact search: it is far from the last in memory, and it
has neighbours. Measured at 30,000 and 100,000 songs (docs/decisions/0015-index-kinds.md)."""
BLOCK_ROWS = 65_536
"""Rows scored at a time in an exact search."""
CODE_LANES = 16
"""FAISS has vector instructions for one-byte codes of widths that this divides (8 without AVX-512); others take five
times as long. Codes are padded with zeros to such a width, which changes no inner product."""
THREADS = faiss.omp_get_max_threads()


class Structure:
    """The nearest rows to a query by inner product. Searches may run in any number of threads.

    flat holds the vectors themselves. The others hold codes, one byte a number (hnsw, ivf) or less (ivf_pq), beside the
    exact vectors: codes find candidates, and the caller scores them again. A search picks by what it would cost:

    * Few allowed rows, or almost all rows wanted: exactly the allowed rows are scored, gathered from the vectors.
    * Otherwise the structure is searched with the allowed rows as selector, wider by the inverse of their share.
    * Queries that come back with too few rows are repeated exactly.
    """

    def __init__(self, plan: IndexPlan, index: Any, vectors: NDArray[np.float32]) -> None:
        self.plan = plan
        self.vectors = vectors
        """Exact, float32 [n, width]; after `read` mapped from the file."""
        self._faiss = index

    @classmethod
    def make(cls, plan: IndexPlan, vectors: NDArray[np.float32]) -> Self:
        """A structure over the rows of [n, width]; learns lists and codes from them."""
        faiss.omp_set_num_threads(THREADS)
        index = _empty(plan, _code_width(plan, vectors.shape[1]))
        wide = _padded(vectors, index.d)
        if not index.is_trained:
            index.train(wide)
        index.add(wide)
        return cls(plan, index, _flat_rows(index) if plan.kind == "flat" else vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return self.vectors.shape[1]

    def changed(self, plan: IndexPlan, kept: NDArray[np.int64], more: NDArray[np.float32]) -> Self:
        """Another structure over some of these rows and then `more`, with the same lists and codes.

        Rows are encoded again but nothing is learned again. A graph that loses rows is built anew: FAISS cannot unlink
        them.
        """
        whole = len(kept) == len(self)
        vectors = np.concatenate([self.vectors if whole else self.vectors[kept], more])
        if plan.kind == "flat" or (plan.kind == "hnsw" and not whole):
            return self.make(plan, vectors)
        faiss.omp_set_num_threads(THREADS)
        index = faiss.deserialize_index(
            faiss.serialize_index(self._faiss)
        )  # clone_index would keep a mapped file's memory, which cannot grow
        if plan.kind == "hnsw":
            index.add(_padded(more, index.d))
        else:
            index.reset()
            index.add(_padded(vectors, index.d))
        return type(self)(plan, index, vectors)

    def planned(self, plan: IndexPlan) -> Self:
        """The same structure, searched with other numbers."""
        return type(self)(plan, self._faiss, self.vectors)

    def nearest(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Candidates for the `count` best rows of each of q queries, in no promised order: [q, at least min(count,
        allowed rows)].

        `allowed` has one entry per row. Where a kind is not exact, candidates are up to as many more as `plan.rerank`
        says; -1 is none.
        """
        faiss.omp_set_num_threads(
            1 if len(queries) == 1 else THREADS
        )  # of this thread; a single query is not worth waking others
        total = len(self) if allowed is None else int(np.count_nonzero(allowed))
        wanted = min(math.ceil(count * self.plan.rerank), total)
        if not wanted:
            return np.empty((len(queries), 0), dtype=np.int64)
        if self._scored(wanted, total) >= total:
            return self._exact(queries, wanted, allowed)
        rows: NDArray[np.int64] = self._faiss.search(
            _padded(queries, self._faiss.d), wanted, params=self._parameters(wanted, total, allowed)
        )[1]
        short = np.flatnonzero(rows[:, min(count, total) - 1] < 0)
        if len(short):
            rows[short] = self._exact(queries[short], wanted, allowed)
        return rows

    def write(self, folder: Path) -> list[str]:
        """Write the files, each whole before it gets its name, so that who has mapped an older one keeps it. Returns
        their names.
        """
        _replace(folder / VECTORS_FILE, lambda path: faiss.write_index(self._faiss, path))
        if self.plan.kind == "flat":
            return [VECTORS_FILE]
        _replace(folder / EXACT_FILE, lambda path: _save_rows(path, self.vectors))
        return [VECTORS_FILE, EXACT_FILE]

    @classmethod
    def read(cls, folder: Path, plan: IndexPlan, width: int, songs: int) -> Self:
        """Map what `write` wrote; pages are read when they are needed and shared by all processes. Raises
        MismatchError.
        """
        try:
            index = faiss.read_index(str(folder / VECTORS_FILE), faiss.IO_FLAG_MMAP_IFC)
            rows = None if plan.kind == "flat" else np.asarray(np.load(folder / EXACT_FILE, mmap_mode="r"))
        except (RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise MismatchError(
                f"{folder} holds no {plan.kind} index that can be read ({reason}); run 'htcl index' again"
            ) from None
        if type(index).__name__ != CLASSES[plan.kind]:
            raise MismatchError(
                f"{folder} holds an {type(index).__name__}, but its manifest says {plan.kind}, an {CLASSES[plan.kind]}; "
                "run 'htcl index' again"
            )
        vectors = _flat_rows(index) if rows is None else rows
        coded = (index.ntotal, index.d)
        for what, shape, numbers in (
            (VECTORS_FILE, coded, _code_width(plan, width)),
            (EXACT_FILE, vectors.shape, width),
        ):
            if shape != (songs, numbers):
                raise MismatchError(
                    f"{folder / what} holds {shape[0]} vectors of {shape[-1]} numbers, "
                    f"but its manifest and songs say {songs} of {numbers}; run 'htcl index' again"
                )
        if vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
            raise MismatchError(
                f"{folder / EXACT_FILE} holds {vectors.dtype}; expected float32 in C order; run 'htcl index' again"
            )
        return cls(plan, index, vectors)

    def _scored(self, wanted: int, total: int) -> float:
        """About how many rows the structure would score for one query, in rows of an exact search."""
        share = total / len(self)
        if self.plan.kind == "flat":
            return 0 if share >= GATHER_BELOW else math.inf
        if self.plan.kind == "hnsw":
            return GRAPH_WORK * max(self.plan.ef_search, wanted) / share
        return len(self) * self.plan.probes / self.plan.lists

    def _parameters(self, wanted: int, total: int, allowed: NDArray[np.bool_] | None) -> Any:
        selector = (
            None
            if allowed is None or total == len(self)
            else faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        )
        wider = len(self) / total
        if self.plan.kind == "hnsw":
            return faiss.SearchParametersHNSW(
                sel=selector, efSearch=math.ceil(max(self.plan.ef_search, wanted) * wider)
            )
        if self.plan.kind == "flat":
            return faiss.SearchParameters(sel=selector)
        return faiss.SearchParametersIVF(sel=selector, nprobe=min(math.ceil(self.plan.probes * wider), self.plan.lists))

    def _exact(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        rows = None if allowed is None else np.flatnonzero(allowed)
        return best_rows(self.vectors, queries, count, rows)


def best_rows(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], count: int, rows: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """Every one of `rows` (default: all) scored in single precision: the `count` best of each query, [q, count], best
    first.
    """
    total = len(vectors) if rows is None else len(rows)
    best: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    for start in range(0, total, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, total)
        block = vectors[start:end] if rows is None else vectors[rows[start:end]]
        block_scores, found = faiss.knn(queries, block, min(count, end - start), metric=faiss.METRIC_INNER_PRODUCT)
        scores.append(block_scores)
        best.append(found + start if rows is None else rows[found + start])
    if len(best) == 1:
        return best[0]
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :count]
    return np.take_along_axis(np.concatenate(best, axis=1), order, axis=1)


def _code_width(plan: IndexPlan, width: int) -> int:
    return math.ceil(width / CODE_LANES) * CODE_LANES if plan.kind in ("hnsw", "ivf") else width


def _padded(vectors: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """[n, width]: the vectors and zeros after them; the vectors themselves where they are as wide."""
    if vectors.shape[1] == width:
        return vectors
    wide = np.zeros((len(vectors), width), dtype=np.float32)
    wide[:, : vectors.shape[1]] = vectors
    return wide


def _empty(plan: IndexPlan, width: int) -> Any:
    codes = {
        "flat": "Flat",
        "hnsw": f"HNSW{plan.neighbors},SQ8",
        "ivf": f"IVF{plan.lists},SQ8",
        "ivf_pq": f"IVF{plan.lists},PQ{plan.code_bytes}",
    }
    index = faiss.index_factory(width, codes[plan.kind], faiss.METRIC_INNER_PRODUCT)
    if plan.kind == "hnsw":
        index.hnsw.efConstruction = plan.ef_construction
    if plan.kind.startswith("ivf"):
        index.cp.min_points_per_centroid = 1  # silences a warning; the plan bounds the lists
    if plan.kind == "ivf_pq":
        index.pq.cp.min_points_per_centroid = 1
        index.do_polysemous_training = (
            False  # 1.5 s for each byte of the code, for a comparison by bits that nothing here uses
        )
    return index


def _flat_rows(index: Any) -> NDArray[np.float32]:
    """The memory of a flat index as [n, width]; lives as long as the index."""
    if not index.ntotal:
        return np.empty((0, index.d), dtype=np.float32)
    rows: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(
        index.ntotal, index.d
    )
    return rows


def _save_rows(path: str, vectors: NDArray[np.float32]) -> None:
    with open(path, "wb") as file:
        np.save(file, vectors)


def _replace(path: Path, write: Any) -> None:
    beside = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write(str(beside))
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
