"""Recall@10 and queries per second of the index kinds, hnswlib, usearch and voyager, on the same vectors.

    # once, outside the project's environment
    python -m pip install --target PEERS --no-deps hnswlib usearch voyager numkong tqdm
    python -m benchmarks.index --peers PEERS [--songs 100000] [--dims 100 200] [--large]

Unit-norm vectors from overlapping clusters, hard enough that an inverted file with nprobe 1 has recall@10 below 0.8
(checked); queries are songs that no index contains. Structures are built and searched one after the other, each in its
own process with one thread. Graphs have 16 links per node (32 on the lowest layer) and efConstruction 200 in every
library; the search list of graphs and nprobe of inverted files vary along a curve.

* raw: the structure alone, all queries in one call, the 10 best by its own scores.
* results: `SongIndex.search`, with exactly re-ranked candidates, sorted ties and Python objects as results; all queries
  in one call, and one call each. Peers are measured both ways too.

Peers that are not installed are skipped with a note. Memory is resident memory after the build beyond that of the
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
KINDS = ("flat", "hnsw", "ivf", "ivf_pq")
PEERS = {"hnswlib": "hnswlib", "usearch": "usearch", "usearch i8": "usearch", "voyager": "voyager"}
"""Structure → package. usearch also with 8-bit codes, which it does not re-rank."""

COMPLETE = "answers"
"""Name in the results file of the measurement through `SongIndex.search`, or through a peer's own search."""

Search = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Queries → rows of the 10 best, [n, 10]."""


def overlapping_clusters(rows: int, dim: int, seed: int) -> NDArray[np.float32]:
    """Unit-norm vectors [rows, dim] of clusters in 24 dimensions whose spread exceeds the distance of their centres."""
    world, rng = np.random.default_rng(dim), np.random.default_rng(seed)
    centres = world.normal(size=(CLUSTERS, LATENT)).astype(np.float32)
    embed = world.normal(size=(LATENT, dim)).astype(np.float32) / np.sqrt(LATENT)
    values = 0.7 * centres[rng.integers(CLUSTERS, size=rows)] + rng.standard_normal((rows, LATENT), dtype=np.float32)
    values = values @ embed + 0.1 * rng.standard_normal((rows, dim), dtype=np.float32)
    return values / np.linalg.norm(values, axis=1, keepdims=True)


def recall(rows: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Recall@10."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(rows.tolist(), truth.tolist(), strict=True)]))


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
    """Build one structure and measure its curve; runs in its own process."""
    sys.path.append(case["peers"] or "")
    vectors, queries, truth = (np.load(f"{case['folder']}/{name}.npy") for name in ("vectors", "queries", "truth"))
    importlib.import_module("htcl_ray.index" if case["structure"] in KINDS else PEERS[case["structure"]])
    before = resident_mb()["now"]
    started = time.perf_counter()
    settings, curves = (with_song_index if case["structure"] in KINDS else PEER[case["structure"].split()[0]])(
        vectors, case
    )
    built = time.perf_counter() - started
    result: dict[str, Any] = {
        "build_seconds": round(built, 1),
        "memory_mb": round(resident_mb()["now"] - before, 1),
        "points": [],
    }
    for setting in settings:
        for name, search in curves(setting):
            rows = search(queries)
            point = {
                "what": name,
                "setting": setting,
                "recall": round(recall(rows, truth), 4),
                "qps": round(queries_per_second(search, queries, len(queries))),
            }
            if name != "raw":
                point["qps_one_by_one"] = round(queries_per_second(search, queries[:ONE_BY_ONE], 1))
            result["points"].append(point)
        if min(point["recall"] for point in result["points"] if point["setting"] == setting) > 0.9995:
            break
    return result


Curves = Callable[[int], Iterator[tuple[str, Search]]]


def with_song_index(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """A SongIndex of semantic vectors alone, and the structure in it."""
    from dataclasses import replace

    from htcl_ray.config.sections import IndexSettings
    from htcl_ray.index.song_index import SongIndex
    from htcl_ray.index.vectors import Vectors

    kind = case["structure"]
    given = IndexSettings(kind=kind, hnsw_neighbors=NEIGHBORS, ef_construction=WHILE_BUILT, ivf_probes=1)
    index = SongIndex.build([f"{row:07d}" for row in range(len(vectors))], Vectors(vectors), settings=given)
    state = index.state

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        structure = state.structure.planned(
            replace(state.structure.plan, ef_search=setting, probes=min(setting, state.structure.plan.lists))
        )
        alone = structure.planned(replace(structure.plan, rerank=1.0))
        searched = SongIndex(replace(state, structure=structure), dim=index.dim, settings=given, model_versions={})

        def results(queries: NDArray[np.float32]) -> NDArray[np.int64]:
            return np.array([[int(hit.song_id) for hit in hits] for hits in searched.search(Vectors(queries), K)])

        yield "raw", lambda queries: alone.nearest(queries, K)
        yield COMPLETE, results

    return (1,) if kind == "flat" else SEARCH_LISTS if kind == "hnsw" else PROBED, curves


def with_hnswlib(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """float32, one thread."""
    import hnswlib

    index = hnswlib.Index(space="ip", dim=vectors.shape[1])
    index.init_index(max_elements=len(vectors), M=NEIGHBORS, ef_construction=WHILE_BUILT)
    index.add_items(vectors, num_threads=1)

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        index.set_ef(setting)
        yield COMPLETE, lambda queries: index.knn_query(queries, k=K, num_threads=1)[0].astype(np.int64)

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
        yield COMPLETE, lambda queries: np.atleast_2d(index.search(queries, K, threads=1).keys).astype(np.int64)

    return SEARCH_LISTS, curves


def with_voyager(vectors: NDArray[np.float32], case: dict[str, Any]) -> tuple[tuple[int, ...], Curves]:
    """float32, one thread."""
    import voyager

    index = voyager.Index(
        voyager.Space.Cosine, vectors.shape[1], M=NEIGHBORS, ef_construction=WHILE_BUILT, max_elements=len(vectors)
    )
    index.add_items(vectors, num_threads=1)

    def curves(setting: int) -> Iterator[tuple[str, Search]]:
        yield COMPLETE, lambda queries: index.query(queries, k=K, num_threads=1, query_ef=setting)[0].astype(np.int64)

    return SEARCH_LISTS, curves


PEER = {"hnswlib": with_hnswlib, "usearch": with_usearch, "voyager": with_voyager}


def best_at(result: dict[str, Any], bound: float, what: str, rate: str) -> int | None:
    """Maximum queries per second at a recall of at least `bound`."""
    rates = [
        point[rate]
        for point in result["points"]
        if point["what"] == what and point["recall"] >= bound and rate in point
    ]
    return max(rates, default=None)


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """The best own kind and the best peer for each bound of recall, in one call and one by one."""
    best: dict[str, Any] = {}
    ways = {"raw": ("raw", "qps"), COMPLETE: (COMPLETE, "qps"), "one by one": (COMPLETE, "qps_one_by_one")}
    for bound in BOUNDS:
        for way, (what, rate) in ways.items():
            peers = {name: best_at(results[name], bound, COMPLETE, rate) for name in results if name in PEERS}
            own = {name: best_at(results[name], bound, what, rate) for name in results if name in KINDS}
            both = [max(((rate or 0, name) for name, rate in side.items()), default=(0, None)) for side in (own, peers)]
            best[f"recall {bound}, {way}"] = {"ours": both[0], "best peer": both[1]}
    return best


def run(songs: int, dim: int, peers: str | None, console: Console) -> dict[str, Any]:
    """Every structure on vectors of one size."""
    missing = sorted({package for package in PEERS.values() if importlib.util.find_spec(package) is None})
    for package in missing:
        console.print(f"{package} is not installed and is skipped; see --peers")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        vectors, queries = overlapping_clusters(songs, dim, 0), overlapping_clusters(QUERIES, dim, 1)
        parts = np.array_split(queries, max(songs // 20_000, 1))
        truth = np.concatenate([np.argpartition(-(part @ vectors.T), K, axis=1)[:, :K] for part in parts])
        for name, values in (("vectors", vectors), ("queries", queries), ("truth", truth)):
            np.save(f"{folder}/{name}.npy", values)
        del vectors
        for structure in (*KINDS, *(name for name, package in PEERS.items() if package not in missing)):
            results[structure] = in_own_process(
                "benchmarks.index", {"structure": structure, "folder": folder, "peers": peers}
            )
            outcome = results[structure].get("error") or results[structure]["build_seconds"]
            console.print(f"{dim} dimensions, {structure}: {outcome}")
    console.print(curves_table(songs, dim, results))
    one_list = next(point["recall"] for point in results["ivf"]["points"] if point["what"] == COMPLETE)
    console.print(f"An inverted file with nprobe 1 has recall@10 {one_list:.3f}.")
    if one_list >= 0.8:
        raise SystemExit(f"nprobe 1 has recall@10 {one_list:.3f}; expected less than 0.8, harder vectors are needed")
    return {"songs": songs, "dim": dim, "one_list_recall": one_list, "structures": results, "summary": summary(results)}


def curves_table(songs: int, dim: int, results: dict[str, Any]) -> Table:
    """One row for each structure."""
    table = Table(title=f"{songs:,} songs, {dim} dimensions, one thread: queries per second at recall@10 of at least")
    table.add_column("")
    for column in (
        "build s",
        "MB",
        *(f"{bound} {way}" for bound in BOUNDS for way in ("raw", COMPLETE, "one by one")),
    ):
        table.add_column(column, justify="right")
    for name, result in results.items():
        if "error" in result:
            table.add_row(name, result["error"])
            continue
        ways = (("raw", "qps"), (COMPLETE, "qps"), (COMPLETE, "qps_one_by_one"))
        cells = [best_at(result, bound, what, rate) for bound in BOUNDS for what, rate in ways]
        table.add_row(
            name,
            str(result["build_seconds"]),
            str(result["memory_mb"]),
            *("-" if cell is None else f"{cell:,}" for cell in cells),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description="Index kinds compared with other libraries.")
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
        for name, best in result["summary"].items():
            own, peer = best.values()
            console.print(f"{result['dim']} dimensions, {name}: own {own}, best peer {peer}")
    versions = {package: _version(package, peers) for package in sorted(set(PEERS.values()))}
    write_result("index_large" if arguments.large else "index", {"peers": versions, "threads": 1, "sizes": measured})


def _version(package: str, folder: str | None) -> str | None:
    from importlib.metadata import distributions

    path = [folder] if folder else sys.path
    return next((distribution.version for distribution in distributions(name=package, path=path)), None)


if __name__ == "__main__":
    main()
