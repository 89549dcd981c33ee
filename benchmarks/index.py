"""Recall@10 against queries a second: the index kinds beside hnswlib, usearch and voyager, on the same vectors with one
thread.

    python -m pip install --target PEERS --no-deps hnswlib usearch voyager numkong tqdm    # once, outside the project's environment
    python -m benchmarks.index --peers PEERS [--songs 100000] [--dims 100 200] [--large]

Vectors of unit norm from overlapping clusters, hard enough that an inverted file that probes one list finds less than
0.8 of the 10 nearest (checked); queries are songs that no index holds. Every structure is built and searched in a
process of its own, one thread, one after the other. Graphs have 16 neighbours (32 on the lowest layer) and 200
candidates while they are built, in every library; what varies along a curve is the search list of graphs and the probed
lists of inverted files.

* raw: the structure alone, all queries in one call, the 10 best by its own scores.
* answers: `SongIndex.search`, with candidates scored again from the exact vectors, ties in order and Python objects as answers; all
  queries in one call, and one call each. Peers are called both ways too.

A peer that is not installed is left out, with a word. Memory is resident memory after the build beyond that of the
process with the vectors loaded. --large: one million songs of 200 dimensions. Writes benchmarks/results/index.json
(index_large.json).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.environment import write_result
from benchmarks.resident_memory import in_own_process, resident_mb

K = 10
QUERIES = 1000
ONE_BY_ONE = 300
NEIGHBORS, WHILE_BUILT = 16, 200
SEARCH_LISTS = (12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
PROBED = (1, 2, 4, 8, 16, 32, 64, 128, 256)
LATENT = 24
CLUSTERS = 1000
BOUNDS = (0.95, 0.99)
OURS = ("flat", "hnsw", "ivf", "ivf_pq")
PEERS = {"hnswlib": "hnswlib", "usearch": "usearch", "usearch i8": "usearch", "voyager": "voyager"}
"""Structure → package. usearch also with its 8-bit codes, which it does not score again."""

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Queries → rows of the 10 best, [n, 10]."""


def overlapping_clusters(rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """[rows, dim] of unit norm: clusters in a space of 24 dimensions whose spread exceeds the distance of their
    centres, embedded.
    """
    world, rng = np.random.default_rng(dim), np.random.default_rng(seed)
    centres = world.normal(size=(CLUSTERS, LATENT)).astype(np.float32)
    embed = world.normal(size=(LATENT, dim)).astype(np.float32) / np.sqrt(LATENT)
    values = 0.7 * centres[rng.integers(CLUSTERS, size=rows)] + rng.standard_normal((rows, LATENT), dtype=np.float32)
    values = values @ embed + 0.1 * rng.standard_normal((rows, dim), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def recall(found: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the true 10 that were found."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), truth.tolist(), strict=True)]))


def queries_per_second(search: Search, queries: NDArray[np.float32], each: int) -> float:
    """The best of three passes, `each` queries a call."""
    best = 0.0
    for _ in range(3):
        started = time.perf_counter()
        for start in range(0, len(queries), each):
            search(queries[start : start + each])
        best = max(best, len(queries) / (time.perf_counter() - started))
    return best


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """Build one structure and walk its curve. Runs in a process of its own."""
    sys.path.append(case["peers"] or "")
    vectors, queries, truth = (np.load(f"{case['folder']}/{name}.npy") for name in ("vectors", "queries", "truth"))
    importlib.import_module("htcl_ray.index" if case["structure"] in OURS else PEERS[case["structure"]])
    before = resident_mb()["now"]
    started = time.perf_counter()
    settings, curves = (ours if case["structure"] in OURS else PEER[case["structure"].split()[0]])(vectors, case)
    built = time.perf_counter() - started
    result: dict[str, Any] = {
        "build_seconds": round(built, 1),
        "memory_mb": round(resident_mb()["now"] - before, 1),
        "points": [],
    }
    for setting in settings:
        for name, search in curves(setting):
            found = search(queries)
            point = {
                "what": name,
                "setting": setting,
                "recall": round(recall(found, truth), 4),
                "qps": round(queries_per_second(search, queries, len(queries))),
            }
            if name != "raw":
                point["qps_one_by_one"] = round(queries_per_second(search, queries[:ONE_BY_ONE], 1))
            result["points"].append(point)
        if min(point["recall"] for point in result["points"] if point["setting"] == setting) > 0.9995:
            break
    return result


Curves = Callable[[int], Iterator[tuple[str, Search]]]


def ours(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """A SongIndex of semantic vectors alone, and the structure in it."""
    from dataclasses import replace

    from htcl_ray.config.sections import IndexSettings
    from htcl_ray.index.song_index import SongIndex
    from htcl_ray.index.vectors import Vectors

    kind = case["structure"]
    given = IndexSettings(kind=kind, hnsw_neighbors=NEIGHBORS, ef_construction=WHILE_BUILT, ivf_probes=1)
    index = SongIndex.build([f"{row:07d}" for row in range(len(vectors))], Vectors(vectors), settings=given)
    state = index._state

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        structure = state.structure.planned(
            replace(state.structure.plan, ef_search=setting, probes=min(setting, state.structure.plan.lists))
        )
        alone = structure.planned(replace(structure.plan, rerank=1.0))
        index._state = replace(state, structure=structure)

        def answers(queries: NDArray[np.float32]) -> NDArray[np.int64]:
            return np.array([[int(hit.song_id) for hit in hits] for hits in index.search(Vectors(queries), K)])

        yield "raw", lambda queries: alone.nearest(queries, K)
        yield "answers", answers

    return (1,) if kind == "flat" else SEARCH_LISTS if kind == "hnsw" else PROBED, curves


def with_hnswlib(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """float32, one thread."""
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=NEIGHBORS, ef_construction=WHILE_BUILT)
    index.add_items(vectors, num_threads=1)

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        index.set_ef(setting)
        yield "answers", lambda queries: index.knn_query(queries, k=K, num_threads=1)[0].astype(np.int64)

    return SEARCH_LISTS, curves


def with_usearch(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """float32 or i8, one thread."""
    from usearch.index import Index

    codes = "i8" if "i8" in case["structure"] else "f32"
    metric = "cos" if codes == "i8" else "ip"
    index = Index(ndim=vectors.shape[1], metric=metric, dtype=codes, connectivity=NEIGHBORS, expansion_add=WHILE_BUILT)
    index.add(np.arange(len(vectors)), vectors, threads=1)

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        index.expansion_search = setting
        yield "answers", lambda queries: np.atleast_2d(index.search(queries, K, threads=1).keys).astype(np.int64)

    return SEARCH_LISTS, curves


def with_voyager(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """float32, one thread."""
    import voyager

    index = voyager.Index(
        voyager.Space.Cosine, vectors.shape[1], M=NEIGHBORS, ef_construction=WHILE_BUILT, max_elements=len(vectors)
    )
    index.add_items(vectors, num_threads=1)

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        yield "answers", lambda queries: index.query(queries, k=K, num_threads=1, query_ef=setting)[0].astype(np.int64)

    return SEARCH_LISTS, curves


PEER = {"hnswlib": with_hnswlib, "usearch": with_usearch, "voyager": with_voyager}


def best_at(result: dict[str, Any], bound: float, what: str, rate: str) -> int | None:
    """The most queries a second at a recall of at least `bound`."""
    rates = [
        point[rate]
        for point in result["points"]
        if point["what"] == what and point["recall"] >= bound and rate in point
    ]
    return max(rates, default=None)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """For each bound of recall: our best kind and the best peer, in one call and one by one."""
    found: dict[str, Any] = {}
    ways = {"raw": ("raw", "qps"), "answers": ("answers", "qps"), "one by one": ("answers", "qps_one_by_one")}
    for bound in BOUNDS:
        for way, (what, rate) in ways.items():
            peers = {name: best_at(results[name], bound, "answers", rate) for name in results if name in PEERS}
            mine = {name: best_at(results[name], bound, what, rate) for name in results if name in OURS}
            both = [
                max(((rate or 0, name) for name, rate in side.items()), default=(0, None)) for side in (mine, peers)
            ]
            found[f"recall {bound}, {way}"] = {"ours": both[0], "best peer": both[1]}
    return found


def run(songs: int, dim: int, peers: str | None, console: Console) -> dict[str, Any]:
    """Every structure on vectors of one size."""
    missing = sorted({package for package in PEERS.values() if importlib.util.find_spec(package) is None})
    for package in missing:
        console.print(f"{package} is not installed and is left out; see --peers")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        vectors, queries = overlapping_clusters(songs, dim, 0), overlapping_clusters(QUERIES, dim, 1)
        parts = np.array_split(queries, max(songs // 20_000, 1))
        truth = np.concatenate([np.argpartition(-(part @ vectors.T), K, axis=1)[:, :K] for part in parts])
        for name, values in (("vectors", vectors), ("queries", queries), ("truth", truth)):
            np.save(f"{folder}/{name}.npy", values)
        del vectors
        for structure in (*OURS, *(name for name, package in PEERS.items() if package not in missing)):
            results[structure] = in_own_process(
                "benchmarks.index", {"structure": structure, "folder": folder, "peers": peers}
            )
            console.print(
                f"{dim} dimensions, {structure}: {results[structure].get('error') or results[structure]['build_seconds']}"
            )
    console.print(curves_table(songs, dim, results))
    one_list = next(point["recall"] for point in results["ivf"]["points"] if point["what"] == "answers")
    console.print(f"An inverted file that probes one list finds {one_list:.3f} of the 10 nearest.")
    if one_list >= 0.8:
        raise SystemExit(f"one probed list finds {one_list:.3f}; expected less than 0.8, harder vectors are needed")
    return {"songs": songs, "dim": dim, "one_list_recall": one_list, "structures": results, "summary": summary(results)}


def curves_table(songs: int, dim: int, results: dict[str, Any]) -> Table:
    """One row for each structure."""
    table = Table(title=f"{songs:,} songs, {dim} dimensions, one thread: queries a second at recall@10 of at least")
    table.add_column("")
    for column in (
        "build s",
        "MB",
        *(f"{bound} {way}" for bound in BOUNDS for way in ("raw", "answers", "one by one")),
    ):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, result["error"])
            continue
        ways = (("raw", "qps"), ("answers", "qps"), ("answers", "qps_one_by_one"))
        cells = [best_at(result, bound, what, rate) for bound in BOUNDS for what, rate in ways]
        table.add_row(
            name,
            str(result["build_seconds"]),
            str(result["memory_mb"]),
            *("-" if cell is None else f"{cell:,}" for cell in cells),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Index kinds beside other libraries.")
    parser.add_argument("--songs", type=int, default=100_000)
    parser.add_argument("--dims", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--large", action="store_true", help="one million songs of 200 dimensions instead")
    parser.add_argument("--peers", help="folder that hnswlib, usearch and voyager were installed into")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(json.loads(arguments.measure))))
        return
    os.environ |= {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    peers = None if arguments.peers is None else str(Path(arguments.peers).resolve())
    sys.path.append(peers or "")
    console = Console(width=160)
    sizes = [(1_000_000, 200)] if arguments.large else [(arguments.songs, dim) for dim in arguments.dims]
    measured = [run(songs, dim, peers, console) for songs, dim in sizes]
    for result in measured:
        for question, answer in result["summary"].items():
            console.print(
                f"{result['dim']} dimensions, {question}: ours {answer['ours']}, best peer {answer['best peer']}"
            )
    versions = {package: _version(package, peers) for package in sorted(set(PEERS.values()))}
    write_result("index_large" if arguments.large else "index", {"peers": versions, "threads": 1, "sizes": measured})


def _version(package: str, folder: str | None) -> str | None:
    from importlib.metadata import distributions

    path = [folder] if folder else sys.path
    return next((found.version for found in distributions(name=package, path=path)), None)


if __name__ == "__main__":
    main()
