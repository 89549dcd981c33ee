"""Every kind at a size at which its structure is searched: recall, filters, changes, snapshots, threads."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import ConfigError, QueryError
from htcl_ray.index.engines.base import KINDS, Structure, best_rows
from htcl_ray.index.engines.selection import FLAT_UP_TO, GRAPH_UP_TO, kind_for, plan_index
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors

pytestmark = pytest.mark.unit

DIM = 16
COUNT = 4000
SETTINGS = {
    "flat": IndexSettings(kind="flat"),
    "hnsw": IndexSettings(kind="hnsw", hnsw_neighbors=16, ef_construction=60, ef_search=48),
    "ivf": IndexSettings(kind="ivf"),
    "ivf_pq": IndexSettings(kind="ivf_pq"),
}
BLENDS = (0.0, 0.5, 1.0)


def names(rows) -> list[str]:
    return [f"song-{row:05d}" for row in rows]


def clustered(rows: int, seed: int, dim: int = DIM, clusters: int = 60) -> Vectors:
    """Rows of overlapping clusters, the same for every seed; the two halves have different clusters."""
    rng = np.random.default_rng(seed)
    halves = []
    for half in range(2):
        centres = np.random.default_rng(100 + half).normal(size=(clusters, dim))
        values = 0.7 * centres[rng.integers(clusters, size=rows)] + rng.normal(size=(rows, dim))
        halves.append((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32))
    return Vectors(*halves)


STORED, QUERIES = clustered(COUNT, 0), clustered(40, 1)


@cache
def built(kind: str) -> SongIndex:
    return SongIndex.build(names(range(COUNT)), STORED, settings=SETTINGS[kind])


@pytest.fixture(params=SETTINGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def index(kind: str) -> SongIndex:
    """Snapshot of the built index, which the test may change."""
    return built(kind).snapshot()


def true_scores(stored: Vectors, queries: Vectors, blend: float = 0.5) -> np.ndarray:
    wide = [
        (half.astype(np.float64), query.astype(np.float64))
        for half, query in zip(halves(stored), halves(queries), strict=True)
    ]
    return (1 - blend) * wide[0][1] @ wide[0][0].T + blend * wide[1][1] @ wide[1][0].T


def halves(vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
    return vectors.semantic, vectors.preference


def recall(results, scores: np.ndarray, k: int = 10) -> float:
    """Share of the k best by `scores` [queries, songs] that are in the results."""
    best = np.argsort(-scores, axis=1)[:, :k]
    return float(
        np.mean(
            [
                len({hit.song_id for hit in hits} & set(names(rows))) / k
                for hits, rows in zip(results, best, strict=True)
            ]
        )
    )


def structure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Search the structure even when few rows are allowed."""
    for structure in KINDS.values():
        monkeypatch.setattr(structure, "cost", lambda *_: 0)


@pytest.mark.parametrize("blend", BLENDS)
def test_recall_at_every_blend(kind: str, index: SongIndex, blend: float, monkeypatch: pytest.MonkeyPatch):
    structure_only(monkeypatch)
    measured = recall(index.search(QUERIES, 10, blend=blend), true_scores(STORED, QUERIES, blend))
    assert measured == 1.0 if kind == "flat" else measured >= 0.95


def test_structure_is_searched_at_this_size(index: SongIndex, monkeypatch: pytest.MonkeyPatch):
    """Otherwise this file would test exact search four times."""
    monkeypatch.setattr(Structure, "exact", lambda *_: pytest.fail("every row was scored"))
    assert len(index.search(QUERIES, 10)[0]) == 10


def test_scores_are_exact_for_every_code(index: SongIndex):
    scores = true_scores(STORED, QUERIES)
    for row, hits in enumerate(index.search(QUERIES, 20)):
        assert [hit.score for hit in hits] == pytest.approx(
            [scores[row, int(hit.song_id[-5:])] for hit in hits], abs=1e-6
        )


def test_batch_equals_one_by_one(index: SongIndex):
    assert index.search(QUERIES, 7) == [index.search(QUERIES.rows(slice(i, i + 1)), 7)[0] for i in range(len(QUERIES))]


def test_stored_vectors_are_exact(index: SongIndex):
    stored = index.vectors_of(names([3999, 0, 7]))
    np.testing.assert_array_equal(stored.semantic, STORED.semantic[[3999, 0, 7]])
    np.testing.assert_array_equal(stored.preference, STORED.preference[[3999, 0, 7]])


class TestFilters:
    @pytest.mark.parametrize("share", [0.5, 0.1, 0.02, 0.003])
    @pytest.mark.parametrize("inside", [False, True], ids=["by cost", "in the structure"])
    def test_filter_returns_k_of_the_allowed_rows(
        self, index: SongIndex, kind: str, share: float, inside: bool, monkeypatch: pytest.MonkeyPatch
    ):
        if inside:
            structure_only(monkeypatch)
        allowed = np.random.default_rng(5).random(COUNT) < share
        results = index.search(QUERIES, 10, allowed=allowed)
        assert {len(hits) for hits in results} == {10}
        assert all(allowed[int(hit.song_id[-5:])] for hits in results for hit in hits)
        scores = np.where(allowed, true_scores(STORED, QUERIES), -np.inf)
        assert recall(results, scores) >= (1.0 if kind == "flat" else 0.95)

    def test_filter_without_rows_near_the_query(self, kind: str, monkeypatch: pytest.MonkeyPatch):
        """Half of the songs are allowed, but none in a list that the query reads, so the structure returns none."""
        structure_only(monkeypatch)
        settings = SETTINGS[kind].model_copy(update={"ivf_probes": 1, "ef_search": 1, "rerank": 1.0})
        index = SongIndex.build(names(range(COUNT)), STORED, settings=settings)
        scores = true_scores(STORED, QUERIES.rows(slice(0, 1)))[0]
        allowed = scores < np.median(scores)
        hits = index.search(QUERIES.rows(slice(0, 1)), 10, allowed=allowed)[0]
        best = np.argsort(-np.where(allowed, scores, -np.inf))[:10]
        assert len(hits) == 10
        if kind != "hnsw":  # a graph reaches the rows, but with so short a search list not exactly
            assert [hit.song_id for hit in hits] == names(best)

    def test_fewer_allowed_rows_than_k_are_all_returned(self, index: SongIndex):
        allowed = np.zeros(COUNT, dtype=bool)
        allowed[[5, 77, 3000]] = True
        for hits in index.search(QUERIES, 10, allowed=allowed):
            assert sorted(hit.song_id for hit in hits) == names([5, 77, 3000])
        assert index.search(QUERIES.rows(slice(0, 1)), 10, allowed=np.zeros(COUNT, dtype=bool)) == [[]]

    def test_filter_with_exclusions_tombstones_and_delta_segment(self, index: SongIndex):
        """All of them at once, against sorting all scores."""
        later = clustered(30, 7)
        deleted = set(range(0, COUNT, 3))
        index.remove(names(deleted))
        index.upsert(names(range(COUNT, COUNT + 30)), later)
        allowed = np.random.default_rng(6).random(COUNT + 30) < 0.05
        allowed[COUNT : COUNT + 20] = True
        both = Vectors(*(np.concatenate([old, new]) for old, new in zip(halves(STORED), halves(later), strict=True)))
        scores = np.where(allowed, true_scores(both, QUERIES), -np.inf)
        scores[:, sorted(deleted)] = -np.inf
        first = np.argsort(-scores, axis=1)[:, :4]
        excluded = [set(names(rows)) for rows in first]
        np.put_along_axis(scores, first, -np.inf, axis=1)
        expected = [names(rows) for rows in np.argsort(-scores, axis=1)[:, :12]]
        results = index.search(QUERIES, 12, allowed=allowed, exclude=excluded)
        assert [[hit.song_id for hit in hits] for hits in results] == expected

    def test_mismatched_masks_are_rejected(self, index: SongIndex):
        with pytest.raises(QueryError, match=r"\(3,\).*4000 songs"):
            index.search(QUERIES, allowed=np.ones(3, dtype=bool))
        with pytest.raises(QueryError, match="int64"):
            index.search(QUERIES, allowed=np.ones(COUNT, dtype=np.int64))


class TestTies:
    def test_equal_scores_are_sorted_by_song_id(self, kind: str):
        """The k best of 300 copies of one song, built or upserted, are those with the smallest ids, for every k."""
        one = QUERIES.rows(slice(0, 1))
        copies = Vectors(*(np.repeat(half, 300, axis=0) for half in halves(one)))
        both = Vectors(*(np.concatenate(pair) for pair in zip(halves(STORED), halves(copies), strict=True)))
        shuffled = [f"same-{i:03d}" for i in np.random.default_rng(0).permutation(300)]
        index = SongIndex.build([*names(range(COUNT)), *shuffled], both, settings=SETTINGS[kind])
        index.upsert(["same-1000", "same-000"], copies.rows(slice(0, 2)))
        for k in (1, 4, 40, 300):
            expected = sorted([*shuffled, "same-1000"])[:k]
            assert [hit.song_id for hit in index.search(one, k)[0]] == expected


class TestChanges:
    def test_snapshot_is_immutable(self, index: SongIndex):
        before, results, songs = index.snapshot(), index.search(QUERIES, 15), index.songs
        index.remove([hits[0].song_id for hits in results[:1]])
        changed = index.snapshot()
        changed_results = changed.search(QUERIES, 15)
        index.upsert([*names([COUNT]), results[1][0].song_id], QUERIES.rows(slice(2, 4)))
        index.compact()
        assert before.search(QUERIES, 15) == results
        assert before.songs is songs
        assert changed.search(QUERIES, 15) == changed_results != results
        assert index.search(QUERIES.rows(slice(2, 3)), 1)[0][0].song_id == names([COUNT])[0]
        before.remove(names([1]))
        assert names([1])[0] in index

    def test_compaction_keeps_results_and_the_plan(self, index: SongIndex, kind: str):
        """Upserts alone do not change the plan either."""
        before = index.state.structure
        later = clustered(200, 8)
        index.upsert(names(range(COUNT, COUNT + 200)), later)
        index.compact()
        both = Vectors(*(np.concatenate(pair) for pair in zip(halves(STORED), halves(later), strict=True)))
        assert recall(index.search(QUERIES, 10), true_scores(both, QUERIES)) >= 0.95
        assert index.state.structure.plan == before.plan
        assert not index.state.delta_ids
        index.remove(names(range(0, COUNT, 2)))
        left = index.search(QUERIES, 10)
        index.compact()
        assert len(index) == COUNT // 2 + 200 == index.songs.num_rows
        scores = true_scores(both, QUERIES)
        scores[:, 0:COUNT:2] = -np.inf
        assert recall(left, scores) >= 0.95
        assert recall(index.search(QUERIES, 10), scores) >= 0.95
        np.testing.assert_array_equal(index.vectors_of(names([COUNT + 3])).semantic, later.semantic[3:4])

    def test_compaction_of_a_grown_catalogue_makes_a_new_plan(self):
        index = SongIndex.build(names(range(300)), STORED.rows(slice(0, 300)), settings=IndexSettings(kind="ivf"))
        lists = index.state.structure.plan.lists
        index.upsert(names(range(300, COUNT)), STORED.rows(slice(300, COUNT)))
        index.compact()
        assert index.state.structure.plan.lists > 2 * lists
        assert recall(index.search(QUERIES, 10), true_scores(STORED, QUERIES)) >= 0.95

    def test_rows_and_ids_match(self, index: SongIndex):
        index.remove(names([4]))
        index.upsert(
            ["b", "a", *names([9])], QUERIES.rows(slice(0, 3)), metadata=pa.table({"title": ["B", "A", "nine"]})
        )
        index.upsert(["c"], QUERIES.rows(slice(3, 4)), metadata=pa.table({"title": ["C"]}))
        index.remove(["b"])
        for song_id in ("a", "c", *names([9, 10])):
            row = index.row_of(song_id)
            assert index.ids_of([row]) == [song_id]
            assert index.songs["song_id"][row].as_py() == song_id
        assert [index.metadata_of(song_id)["title"] for song_id in ("a", "c", *names([9, 10]))] == [
            "A",
            "C",
            "nine",
            None,
        ]
        assert len(index) == COUNT + 1
        np.testing.assert_array_equal(index.vectors_of(["c", "a"]).semantic, QUERIES.semantic[[3, 1]])

    def test_concurrent_searches_read_one_state(self, index: SongIndex):
        """A writer repeatedly swaps the vectors of two songs, and compacts; no result mixes two states."""
        pair = ["left", "right"]
        near, far = QUERIES.rows(np.array([0, 1])), QUERIES.rows(np.array([1, 0]))
        index.upsert(pair, near)
        query, wrong, done = QUERIES.rows(slice(0, 1)), [], threading.Event()
        searches = [0]

        def check(hits) -> None:
            ids = [hit.song_id for hit in hits]
            best = [hit.song_id for hit in hits[:2] if hit.score > 1 - 1e-6]
            if len(best) != 1 or best[0] not in pair or len(ids) != len(set(ids)) or len(hits) != 200:
                wrong.append(ids[:3])

        def search() -> None:
            while not done.is_set():
                now = index.snapshot()
                check(index.search(query, 200)[0])
                check(now.search(query, 200, allowed=np.ones(now.songs.num_rows, dtype=bool))[0])
                searches[0] += 1

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(search) for _ in range(4)]
            try:
                for step in range(12):
                    index.upsert(pair, far if step % 2 == 0 else near)
                    if step == 6:
                        index.upsert([f"delta-{i}" for i in range(50)], clustered(50, 9))
                        if index.kind != "hnsw":
                            index.compact()
                    index.upsert([f"once-{step}"], clustered(1, 20 + step))
                    index.remove([f"once-{step}"])
                while searches[0] < 20 and not wrong and not any(future.done() for future in running):
                    done.wait(0.01)
            finally:
                done.set()
            for future in running:
                future.result()
        assert not wrong
        assert searches[0] >= 20

    def test_concurrent_writers_lose_no_songs(self):
        index = SongIndex.build(names(range(10)), STORED.rows(slice(0, 10)))
        groups = [[f"writer-{writer}-{i}" for i in range(20)] for writer in range(6)]

        def write(ids: list[str]) -> None:
            for song_id in ids:
                index.upsert([song_id], QUERIES.rows(slice(0, 1)))
            index.remove(ids[:5])

        threads = [threading.Thread(target=write, args=(ids,)) for ids in groups]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(index) == 10 + 6 * 15
        assert all(song_id in index for ids in groups for song_id in ids[5:])


def test_padded_codes_do_not_change_results(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A width that is no multiple of 16, through all operations on codes; unpadded FAISS is the reference."""
    dim = 9
    stored, queries, later = clustered(COUNT, 0, dim), clustered(40, 1, dim), clustered(200, 8, dim)
    structure_only(monkeypatch)
    index = SongIndex.build(names(range(COUNT)), stored, settings=SETTINGS[kind])
    with monkeypatch.context() as unpadded:
        unpadded.setattr("htcl_ray.index.engines.base.CODE_LANES", 1)
        reference = SongIndex.build(names(range(COUNT)), stored, settings=SETTINGS[kind])
    true = true_scores(stored, queries)
    if kind in ("flat", "ivf"):
        assert index.search(queries, 10) == reference.search(queries, 10)
    else:  # threads link a graph in an order of their own
        assert recall(index.search(queries, 10), true) >= recall(reference.search(queries, 10), true) - 0.02
    index.save(tmp_path)
    coded, width = (2 * dim, 2 * dim) if kind in ("flat", "ivf_pq") else (math.ceil(dim / 8) * 16, 2 * dim)
    assert (faiss.read_index(str(tmp_path / "index.faiss")).d, index.state.structure.width) == (coded, width)
    loaded = SongIndex.load(tmp_path)
    assert loaded.search(queries, 10) == index.search(queries, 10)
    loaded.upsert(names(range(COUNT, COUNT + 200)), later)
    loaded.compact()
    both = Vectors(*(np.concatenate(pair) for pair in zip(halves(stored), halves(later), strict=True)))
    assert (
        recall(loaded.search(queries, 10), true_scores(both, queries)) >= recall(index.search(queries, 10), true) - 0.02
    )
    np.testing.assert_array_equal(loaded.vectors_of(names([COUNT + 3])).semantic, later.semantic[3:4])


class TestSaveAndLoad:
    def test_loaded_index_behaves_like_the_saved_one(self, index: SongIndex, tmp_path: Path):
        index.save(tmp_path / "index")
        loaded = SongIndex.load(tmp_path / "index")
        assert loaded.kind == index.kind
        assert loaded.search(QUERIES, 10) == index.search(QUERIES, 10)
        later = clustered(20, 11)
        for one in (index, loaded):
            one.upsert(names(range(COUNT, COUNT + 20)), later)
            one.remove(names([1, 2]))
            one.compact()
        assert recall(loaded.search(QUERIES, 10), _after(later)) >= 0.95
        loaded.save(tmp_path / "index")
        assert SongIndex.load(tmp_path / "index").search(QUERIES, 10) == loaded.search(QUERIES, 10)

    def test_saving_over_a_folder_keeps_mapped_readers(self, index: SongIndex, tmp_path: Path):
        index.save(tmp_path)
        mapped = SongIndex.load(tmp_path)
        results = mapped.search(QUERIES, 10)
        SongIndex.build(["x"], QUERIES.rows(slice(0, 1))).save(tmp_path)
        assert mapped.search(QUERIES, 10) == results
        np.testing.assert_array_equal(mapped.vectors_of(names([5])).semantic, STORED.semantic[5:6])

    def test_manifest_has_the_configured_and_the_chosen_kind(self, tmp_path: Path):
        for kind, chosen in {"auto": "flat", "ivf_pq": "flat", "ivf": "ivf"}.items():
            index = SongIndex.build(names(range(200)), STORED.rows(slice(0, 200)), settings=IndexSettings(kind=kind))
            index.save(tmp_path / kind)
            assert index.kind == chosen
            assert index.manifest["index"]["kind"] == kind
            assert index.manifest["structure"]["kind"] == chosen
            assert SongIndex.load(tmp_path / kind).settings.kind == kind


def _after(later: Vectors) -> np.ndarray:
    both = Vectors(*(np.concatenate(pair) for pair in zip(halves(STORED), halves(later), strict=True)))
    scores = true_scores(both, QUERIES)
    scores[:, [1, 2]] = -np.inf
    return scores


class TestPlan:
    def test_auto_depends_on_the_number_of_songs(self):
        auto = IndexSettings()
        assert auto.kind == "auto"
        kinds = [kind_for(auto, songs) for songs in (0, FLAT_UP_TO, FLAT_UP_TO + 1, GRAPH_UP_TO, GRAPH_UP_TO + 1)]
        assert kinds == ["flat", "flat", "hnsw", "hnsw", "ivf_pq"]

    def test_configured_kind_is_flat_below_its_minimum(self):
        assert [kind_for(IndexSettings(kind=kind), 5) for kind in SETTINGS] == ["flat", "hnsw", "ivf", "flat"]
        assert [kind_for(IndexSettings(kind=kind), 0) for kind in SETTINGS] == ["flat"] * 4

    def test_parameters_depend_on_the_number_of_songs_unless_configured(self):
        plan = plan_index(IndexSettings(kind="ivf_pq"), 1_000_000, 200)
        assert (plan.lists, plan.probes, plan.code_bytes) == (4000, 500, 50)
        given = plan_index(
            IndexSettings(kind="ivf_pq", ivf_lists=100, ivf_probes=7, pq_bytes=25, rerank=3), 1_000_000, 200
        )
        assert (given.lists, given.probes, given.code_bytes, given.rerank) == (100, 7, 25, 3)

    def test_pq_bytes_that_do_not_divide_the_width_are_rejected(self):
        with pytest.raises(ConfigError, match=r"pq_bytes is 7.*200"):
            plan_index(IndexSettings(kind="ivf_pq", pq_bytes=7), 1000, 200)


def test_exact_search_over_several_blocks_equals_sorting(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("htcl_ray.index.engines.base.BLOCK_ROWS", 100)
    rows = np.flatnonzero(np.random.default_rng(2).random(COUNT) < 0.3)
    for chosen in (None, rows):
        best = best_rows(STORED.semantic, QUERIES.semantic, 150, chosen)
        scores = QUERIES.semantic @ STORED.semantic.T
        if chosen is not None:
            scores[:, np.setdiff1d(np.arange(COUNT), chosen)] = -np.inf
        expected = np.sort(scores, axis=1)[:, ::-1][:, :150]
        np.testing.assert_allclose(np.take_along_axis(scores, best, axis=1), expected, atol=1e-6)
