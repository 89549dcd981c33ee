"""The interface of an index kind, exact search, and the files that all kinds share."""

from __future__ import annotations

import math
import os
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import faiss
import numpy as np
from numpy.typing import NDArray

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import MismatchError
from htcl_ray.index.folder import EXACT_FILE, VECTORS_FILE

BLOCK_ROWS = 65_536
"""Rows that an exact search scores at a time."""
CODE_LANES = 16
"""FAISS has vector instructions for one-byte codes whose width is a multiple of this (8 without AVX-512); other widths
are five times slower. Codes are padded with zeros to a multiple, which changes no inner product."""
THREADS = faiss.omp_get_max_threads()
KINDS: dict[str, type[Structure]] = {}
"""The class of each index kind, by its name in `index.kind`."""


@dataclass(frozen=True)
class IndexPlan:
    """Kind and parameters of a structure. Parameters of other kinds have values too, which are not used."""

    kind: str
    """A key of `KINDS`."""
    songs: int
    """Number of songs that the parameters were chosen for."""
    rerank: float
    """Candidates per requested result, which are re-ranked exactly."""
    neighbors: int
    """Links per node of the HNSW graph."""
    ef_construction: int
    ef_search: int
    lists: int
    """Inverted lists."""
    probes: int
    """Lists that a query reads (nprobe)."""
    code_bytes: int
    """Bytes of a product-quantization code."""


class Structure(ABC):
    """An immutable vector index of one kind, searched by inner product from any number of threads.

    A subclass with a `kind` registers itself in `KINDS`. Apart from flat, kinds hold compressed codes next to the exact
    vectors: codes select candidates, and the caller re-ranks them exactly. A search uses the cheapest method:

    * When few rows are allowed, or almost all rows are requested, exactly the allowed rows are scored.
    * Otherwise the structure is searched with the allowed rows as selector, and with a search effort multiplied by the
      inverse of their share.
    * Queries that return too few rows are repeated exactly.
    """

    kind: ClassVar[str]
    """Name in `index.kind` and in manifests."""
    faiss_class: ClassVar[str]
    """Class of the FAISS index, checked when it is read."""
    min_songs: ClassVar[int] = 1
    """Songs that the kind needs to learn its lists and codes; an index over fewer songs is flat."""
    default_rerank: ClassVar[float] = 1.0
    """Candidates per requested result when `index.rerank` is null."""
    byte_codes: ClassVar[bool] = False
    """Codes have one byte per number, and are padded to `CODE_LANES`."""
    stores_vectors: ClassVar[bool] = False
    """The FAISS index holds the exact vectors itself, so that no second file is needed."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    def __init__(self, plan: IndexPlan, index: Any, vectors: NDArray[np.float32]) -> None:
        self.plan = plan
        self.vectors = vectors
        """Exact vectors, float32 [n, width]; memory-mapped after `read`."""
        self._faiss = index

    @staticmethod
    @abstractmethod
    def factory(plan: IndexPlan) -> str:
        """Description of the FAISS index for `faiss.index_factory`."""

    @abstractmethod
    def extended(self, plan: IndexPlan, kept: NDArray[np.int64], added: NDArray[np.float32]) -> Self:
        """Another structure over the rows `kept`, followed by `added`, without learning lists and codes again."""

    @abstractmethod
    def cost(self, wanted: int, total: int) -> float:
        """Estimated work of one query for `wanted` of `total` allowed rows, in rows of an exact search."""

    @abstractmethod
    def parameters(self, wanted: int, total: int, selector: Any) -> Any:
        """FAISS search parameters for `wanted` of `total` allowed rows."""

    @classmethod  # noqa: B027  # an optional hook
    def check(cls, settings: IndexSettings, width: int) -> None:
        """Raise ConfigError when the settings do not fit vectors of `width` numbers."""

    @classmethod  # noqa: B027  # an optional hook
    def configure(cls, index: Any, plan: IndexPlan) -> None:
        """Set parameters of an empty FAISS index that the factory cannot set."""

    def tuned(self, dim: int, settings: IndexSettings) -> Self:
        """The structure with search parameters measured on its own rows; `dim` is the width of one half."""
        return self

    @classmethod
    def make(cls, plan: IndexPlan, vectors: NDArray[np.float32]) -> Self:
        """Build a structure over the rows of [n, width], from which lists and codes are learned."""
        faiss.omp_set_num_threads(THREADS)
        index = faiss.index_factory(cls.code_width(vectors.shape[1]), cls.factory(plan), faiss.METRIC_INNER_PRODUCT)
        cls.configure(index, plan)
        wide = padded(vectors, index.d)
        if not index.is_trained:
            index.train(wide)
        index.add(wide)
        return cls(plan, index, _flat_rows(index) if cls.stores_vectors else vectors)

    @classmethod
    def code_width(cls, width: int) -> int:
        """Dimension of the FAISS index over vectors of `width` numbers."""
        return math.ceil(width / CODE_LANES) * CODE_LANES if cls.byte_codes else width

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def width(self) -> int:
        """Numbers of a vector."""
        return int(self.vectors.shape[1])

    def planned(self, plan: IndexPlan) -> Self:
        """The same structure with other search parameters."""
        return type(self)(plan, self._faiss, self.vectors)

    def nearest(
        self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Candidates for the `count` best rows of each query, in no particular order, [q, >= min(count, allowed rows)].

        `allowed`: mask of the rows, [n]. Kinds that are not exact return up to `plan.rerank` times as many candidates;
        -1 is no row.
        """
        # The number applies to this thread. Waking other threads costs more than a single query.
        faiss.omp_set_num_threads(1 if len(queries) == 1 else THREADS)
        total = len(self) if allowed is None else int(np.count_nonzero(allowed))
        wanted = min(math.ceil(count * self.plan.rerank), total)
        if not wanted:
            return np.empty((len(queries), 0), dtype=np.int64)
        if self.cost(wanted, total) >= total:
            return self.exact(queries, wanted, allowed)
        selector = None
        if allowed is not None and total < len(self):
            selector = faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))
        rows: NDArray[np.int64] = self._faiss.search(
            padded(queries, self._faiss.d), wanted, params=self.parameters(wanted, total, selector)
        )[1]
        short = np.flatnonzero(rows[:, min(count, total) - 1] < 0)
        if len(short):
            rows[short] = self.exact(queries[short], wanted, allowed)
        return rows

    def exact(self, queries: NDArray[np.float32], count: int, allowed: NDArray[np.bool_] | None) -> NDArray[np.int64]:
        """The `count` best of the allowed rows by exact search, [q, count]."""
        return best_rows(self.vectors, queries, count, None if allowed is None else np.flatnonzero(allowed))

    def write(self, folder: Path) -> list[str]:
        """Write the files and return their names.

        Each file is complete before it gets its name, so that processes that have mapped an older file keep it.
        """
        _replace(folder / VECTORS_FILE, lambda path: faiss.write_index(self._faiss, path))
        if self.stores_vectors:
            return [VECTORS_FILE]
        _replace(folder / EXACT_FILE, lambda path: _save_rows(path, self.vectors))
        return [VECTORS_FILE, EXACT_FILE]

    @classmethod
    def read(cls, folder: Path, plan: IndexPlan, width: int, songs: int) -> Self:
        """Map the files that `write` wrote; pages are read on demand and shared by all processes of a machine.

        Raises MismatchError for files that cannot be read or do not match the plan, `width` and `songs`.
        """
        try:
            index = faiss.read_index(str(folder / VECTORS_FILE), faiss.IO_FLAG_MMAP_IFC)
            rows = None if cls.stores_vectors else np.asarray(np.load(folder / EXACT_FILE, mmap_mode="r"))
        except (RuntimeError, ValueError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise MismatchError(
                f"{folder} holds no {plan.kind} index that can be read ({reason}); run 'htcl index' again"
            ) from None
        if type(index).__name__ != cls.faiss_class:
            raise MismatchError(
                f"{folder} holds an {type(index).__name__}, but its manifest says {plan.kind}, an {cls.faiss_class}; "
                "run 'htcl index' again"
            )
        vectors = _flat_rows(index) if rows is None else rows
        coded = (index.ntotal, index.d)
        for name, shape, numbers in (
            (VECTORS_FILE, coded, cls.code_width(width)),
            (EXACT_FILE, vectors.shape, width),
        ):
            if shape != (songs, numbers):
                raise MismatchError(
                    f"{folder / name} holds {shape[0]} vectors of {shape[-1]} numbers, "
                    f"but its manifest and songs say {songs} of {numbers}; run 'htcl index' again"
                )
        if vectors.dtype != np.float32 or not vectors.flags.c_contiguous:
            raise MismatchError(
                f"{folder / EXACT_FILE} holds {vectors.dtype}; expected float32 in C order; run 'htcl index' again"
            )
        return cls(plan, index, vectors)

    def remade(self, plan: IndexPlan, kept: NDArray[np.int64], added: NDArray[np.float32]) -> Self:
        """A structure over the rows `kept` and then `added`, built from the start."""
        return self.make(plan, self.rows_with(kept, added))

    def rows_with(self, kept: NDArray[np.int64], added: NDArray[np.float32]) -> NDArray[np.float32]:
        """The exact vectors of the rows `kept`, followed by `added`."""
        return np.concatenate([self.vectors if len(kept) == len(self) else self.vectors[kept], added])

    def copied_index(self) -> Any:
        """A copy of the FAISS index that can grow; `clone_index` would keep the memory of a mapped file."""
        faiss.omp_set_num_threads(THREADS)
        return faiss.deserialize_index(faiss.serialize_index(self._faiss))


def best_rows(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], count: int, rows: NDArray[np.int64] | None = None
) -> NDArray[np.int64]:
    """The `count` best rows of each query by exact search in single precision, [q, count], best first.

    `rows`: rows to score; default all.
    """
    total = len(vectors) if rows is None else len(rows)
    best: list[NDArray[np.int64]] = []
    scores: list[NDArray[np.float32]] = []
    for start in range(0, total, BLOCK_ROWS):
        end = min(start + BLOCK_ROWS, total)
        block = vectors[start:end] if rows is None else vectors[rows[start:end]]
        block_scores, hits = faiss.knn(queries, block, min(count, end - start), metric=faiss.METRIC_INNER_PRODUCT)
        scores.append(block_scores)
        best.append(hits + start if rows is None else rows[hits + start])
    if len(best) == 1:
        return best[0]
    order = np.argsort(-np.concatenate(scores, axis=1), axis=1, kind="stable")[:, :count]
    return np.take_along_axis(np.concatenate(best, axis=1), order, axis=1)


def padded(vectors: NDArray[np.float32], width: int) -> NDArray[np.float32]:
    """The rows padded with zeros to [n, width]; the array itself when it has that width."""
    if vectors.shape[1] == width:
        return vectors
    wide = np.zeros((len(vectors), width), dtype=np.float32)
    wide[:, : vectors.shape[1]] = vectors
    return wide


def _flat_rows(index: Any) -> NDArray[np.float32]:
    """The memory of a flat FAISS index as [n, width]; valid as long as the index exists."""
    if not index.ntotal:
        return np.empty((0, index.d), dtype=np.float32)
    rows: NDArray[np.float32] = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d).reshape(
        index.ntotal, index.d
    )
    return rows


def _save_rows(path: str, vectors: NDArray[np.float32]) -> None:
    with open(path, "wb") as file:
        np.save(file, vectors)


def _replace(path: Path, write: Callable[[str], None]) -> None:
    temporary = path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        write(str(temporary))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
