"""Every index kind against brute force, and the folders that `load` rejects."""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import MismatchError, QueryError, SongNotFoundError, WorkspaceError
from htcl_ray.index.folder import SONGS_FILE, VECTORS_FILE
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors

pytestmark = pytest.mark.unit

DIM = 8
KINDS = ("auto", "flat", "hnsw", "ivf", "ivf_pq")
EVERY_LIST = {"ivf": {"ivf_probes": 1000}, "ivf_pq": {"ivf_probes": 1000}}
"""Among few random songs a nearest song may be in any list; test_index_kinds.py measures recall with fewer lists."""
BLENDS = (0.0, 0.3, 1.0)


def unit(rng: np.random.Generator, rows: int, dim: int = DIM) -> np.ndarray:
    values = rng.normal(size=(rows, dim))
    return (values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32)


def vectors(seed: int, rows: int, *, preference: bool = True) -> Vectors:
    rng = np.random.default_rng(seed)
    return Vectors(unit(rng, rows), unit(rng, rows) if preference else None)


def names(count: int, start: int = 0) -> list[str]:
    return [f"song-{i:04d}" for i in range(start, start + count)]


def build(kind: str, count: int = 300, *, preference: bool = True, seed: int = 0) -> SongIndex:
    return SongIndex.build(names(count), vectors(seed, count, preference=preference), settings=settings_of(kind))


def settings_of(kind: str) -> IndexSettings:
    return IndexSettings(kind=kind, **EVERY_LIST.get(kind, {}))


def brute_force(
    ids: list[str], stored: Vectors, query: Vectors, row: int, k: int, blend: float, exclude: set[str] = frozenset()
):
    """The definition, one song at a time: (id, score) of the k best, ties sorted by id."""
    scored = []
    for i, song_id in enumerate(ids):
        if song_id in exclude:
            continue
        semantic = sum(float(a) * float(b) for a, b in zip(stored.semantic[i], query.semantic[row], strict=True))
        preference = 0.0
        if stored.preference is not None:
            preference = sum(
                float(a) * float(b) for a, b in zip(stored.preference[i], query.preference[row], strict=True)
            )
        scored.append((-((1 - blend) * semantic + blend * preference), song_id))
    return [(song_id, -score) for score, song_id in sorted(scored)[:k]]


def song_ids(hits) -> list[str]:
    return [hit.song_id for hit in hits]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_kinds_are_those_of_the_configuration():
    assert set(KINDS) == set(IndexSettings.model_fields["kind"].annotation.__args__)


class TestEveryKind:
    @pytest.mark.parametrize("blend", BLENDS)
    def test_equals_brute_force(self, kind: str, blend: float):
        stored, queries = vectors(0, 300), vectors(1, 5)
        results = build(kind).search(queries, 10, blend=blend)
        for row, hits in enumerate(results):
            expected = brute_force(names(300), stored, queries, row, 10, blend)
            assert song_ids(hits) == [song_id for song_id, _ in expected]
            assert [hit.score for hit in hits] == pytest.approx([score for _, score in expected], abs=1e-6)

    def test_scores_are_cosines_and_their_blend(self, kind: str):
        stored, query = vectors(0, 300), vectors(1, 1)
        for hit in build(kind).search(query, 300, blend=0.3)[0]:
            row = int(hit.song_id[-4:])
            assert hit.semantic_score == pytest.approx(float(stored.semantic[row] @ query.semantic[0]), abs=1e-6)
            assert hit.preference_score == pytest.approx(float(stored.preference[row] @ query.preference[0]), abs=1e-6)
            assert hit.score == pytest.approx(0.7 * hit.semantic_score + 0.3 * hit.preference_score, abs=1e-9)

    def test_batch_equals_one_by_one(self, kind: str):
        index, queries = build(kind), vectors(1, 30)
        alone = [index.search(queries.rows(slice(i, i + 1)), 7)[0] for i in range(30)]
        assert index.search(queries, 7) == alone

    def test_k_above_the_number_of_songs_returns_all(self, kind: str):
        hits = build(kind, 6).search(vectors(1, 1), 50)[0]
        assert sorted(song_ids(hits)) == names(6)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)

    def test_empty_index(self, kind: str):
        index = build(kind, 0)
        assert len(index) == 0
        assert index.search(vectors(1, 3), 5) == [[], [], []]

    def test_empty_batch_returns_no_results(self, kind: str):
        assert build(kind).search(vectors(1, 0), 5) == []

    def test_excluded_songs_are_replaced_by_the_next(self, kind: str):
        index, stored, queries = build(kind), vectors(0, 300), vectors(1, 2)
        excluded = {*song_ids(index.search(queries, 40)[0]), "not-in-the-index"}
        first, second = index.search(queries, 40, exclude=[excluded, ()])
        assert song_ids(first) == [
            song_id for song_id, _ in brute_force(names(300), stored, queries, 0, 40, 0.5, excluded)
        ]
        assert song_ids(second) == song_ids(index.search(queries, 40)[1])

    def test_excluding_all_but_a_few(self, kind: str):
        hits = build(kind).search(vectors(1, 1), 10, exclude=[names(297)])[0]
        assert sorted(song_ids(hits)) == names(3, start=297)

    def test_equal_scores_are_sorted_by_song_id(self, kind: str):
        """The k best of 30 identical vectors in random order are the k smallest ids, for every k."""
        one, other = vectors(2, 1), vectors(3, 10)
        rows = Vectors(np.repeat(one.semantic, 30, axis=0), np.repeat(one.preference, 30, axis=0))
        both = Vectors(
            np.concatenate([rows.semantic, other.semantic]), np.concatenate([rows.preference, other.preference])
        )
        shuffled = [f"same-{i:02d}" for i in np.random.default_rng(0).permutation(30)]
        index = SongIndex.build([*shuffled, *names(10)], both, settings=settings_of(kind))
        for k in (1, 3, 12, 30):
            assert song_ids(index.search(one, k)[0]) == [f"same-{i:02d}" for i in range(k)]

    def test_removed_songs_are_never_returned(self, kind: str):
        index, stored, query = build(kind), vectors(0, 300), vectors(1, 1)
        deleted = song_ids(index.search(query, 250)[0])
        index.remove(deleted)
        assert len(index) == 50
        assert deleted[0] not in index
        expected = [song_id for song_id, _ in brute_force(names(300), stored, query, 0, 50, 0.5, set(deleted))]
        assert song_ids(index.search(query, 60)[0]) == expected
        index.compact()
        assert song_ids(index.search(query, 60)[0]) == expected
        with pytest.raises(SongNotFoundError, match=deleted[0]):
            index.vectors_of([deleted[0]])

    def test_few_live_songs_among_many_tombstones_are_all_returned(self, kind: str):
        """A graph search that visits only live nodes would stop after two or three of them."""
        index = build(kind, 1000)
        kept = names(1000)[::100]
        index.remove([song_id for song_id in names(1000) if song_id not in kept])
        for hits in index.search(vectors(1, 20), 10):
            assert sorted(song_ids(hits)) == kept

    def test_removing_an_unknown_song_removes_nothing(self, kind: str):
        index = build(kind, 5)
        with pytest.raises(SongNotFoundError, match="missing"):
            index.remove([names(1)[0], "missing"])
        assert len(index) == 5

    def test_upsert_adds_and_replaces(self, kind: str):
        index = build(kind, 20)
        changed = vectors(9, 2)
        index.upsert(["song-0003", "new"], changed, metadata=pa.table({"title": ["third", "fresh"]}))
        assert len(index) == 21
        assert index.metadata_of("new")["title"] == "fresh"
        assert index.metadata_of("song-0003")["title"] == "third"
        assert index.metadata_of("song-0004")["title"] is None
        assert [hits[0].song_id for hits in index.search(changed, 1)] == ["song-0003", "new"]
        np.testing.assert_array_equal(index.vectors_of(["new"]).preference, changed.preference[1:])

    def test_save_and_load_keep_ids_vectors_metadata(self, kind: str, tmp_path: Path):
        index, queries = build(kind), vectors(1, 4)
        index.remove(names(20))
        index.upsert(["ä/ö ?", "new"], vectors(5, 2), metadata=pa.table({"genre": pa.array([["a", "b"], None])}))
        index.save(tmp_path / "index")
        loaded = SongIndex.load(tmp_path / "index", dim=DIM, model_versions=index.model_versions)
        assert loaded.search(queries, 25) == index.search(queries, 25)
        assert len(loaded) == 282
        assert loaded.metadata_of("ä/ö ?")["genre"] == ["a", "b"]
        assert loaded.songs.column_names == index.songs.column_names
        np.testing.assert_array_equal(loaded.vectors_of(["new"]).semantic, index.vectors_of(["new"]).semantic)

    def test_without_stage_2_only_blend_0_is_valid(self, kind: str):
        index, stored = build(kind, preference=False), vectors(0, 300, preference=False)
        assert index.default_blend == 0
        query = vectors(1, 1, preference=False)
        hits = index.search(query, 10)[0]
        assert song_ids(hits) == [song_id for song_id, _ in brute_force(names(300), stored, query, 0, 10, 0.0)]
        assert {hit.preference_score for hit in hits} == {None}
        assert all(hit.score == hit.semantic_score for hit in hits)
        with pytest.raises(QueryError, match=r"0\.5.*expected 0"):
            index.search(query, 10, blend=0.5)

    def test_semantic_query_on_an_index_with_preference(self, kind: str):
        query = vectors(1, 1)
        semantic_only = Vectors(query.semantic)
        index = build(kind)
        assert song_ids(index.search(semantic_only, 10, blend=0)[0]) == song_ids(index.search(query, 10, blend=0)[0])
        with pytest.raises(QueryError, match="no preference vector"):
            index.search(semantic_only, 10)


@pytest.mark.parametrize("blend", [-0.1, 1.1, float("nan")])
def test_blend_out_of_range_is_rejected(blend: float):
    with pytest.raises(QueryError, match="expected 0"):
        build("flat", 5).search(vectors(1, 1), blend=blend)


def test_mismatched_queries_are_rejected():
    index = build("flat", 5)
    with pytest.raises(QueryError, match=r"\b3\b.*\b8\b"):
        index.search(Vectors(np.ones((1, 3), np.float32)))
    with pytest.raises(QueryError, match="not finite"):
        index.search(Vectors(np.full((1, DIM), np.nan, np.float32)), blend=0)
    with pytest.raises(QueryError, match="k is 0"):
        index.search(vectors(1, 1), 0)
    with pytest.raises(QueryError, match="2 collections"):
        index.search(vectors(1, 1), exclude=[(), ()])


@pytest.mark.parametrize("bad", [np.nan, np.inf, 2.0, 0.0])
def test_rows_without_unit_norm_are_rejected(bad: float):
    rows = vectors(0, 3)
    rows.semantic[1] *= bad
    with pytest.raises(ValueError, match="unit norm"):
        SongIndex.build(names(3), rows)


def test_build_rejects_mismatched_arguments():
    with pytest.raises(ValueError, match="1 song ids are repeated"):
        SongIndex.build(["a", "a"], vectors(0, 2))
    with pytest.raises(ValueError, match="2 vectors for 3 songs"):
        SongIndex.build(names(3), vectors(0, 2))
    with pytest.raises(ValueError, match="1 rows for 2 songs"):
        SongIndex.build(names(2), vectors(0, 2), metadata=pa.table({"title": ["x"]}))
    with pytest.raises(ValueError, match=r"8 wide.*16"):
        build("flat", 2).upsert(["x"], vectors(0, 1, preference=False))


def test_results_do_not_depend_on_the_order_of_changes():
    """Songs upserted in any order, with detours, give the results of a single build."""
    stored, queries = vectors(0, 12), vectors(1, 3)
    expected = SongIndex.build(names(12), stored).search(queries, 12)
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(12)
        index = SongIndex.build([names(12)[i] for i in order[:5]], stored.rows(order[:5]))
        index.upsert(names(3, start=90), vectors(7, 3))
        index.upsert([names(12)[i] for i in order[3:]], stored.rows(order[3:]))
        index.remove(names(3, start=90))
        assert index.search(queries, 12) == expected


class TestLoadRejects:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        versions = {"semantic": "aaaa", "preference": "bbbb"}
        SongIndex.build(names(5), vectors(0, 5), model_versions=versions).save(tmp_path / "index")
        return tmp_path / "index"

    def change_manifest(self, folder: Path, **changes: object) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps(manifest | changes))

    def test_missing_or_unfinished_index(self, folder: Path):
        (folder / "manifest.json").unlink()
        with pytest.raises(WorkspaceError, match="no finished index"):
            SongIndex.load(folder)

    def test_another_dimension(self, folder: Path):
        with pytest.raises(MismatchError, match=r"dimension 8.*64"):
            SongIndex.load(folder, dim=64)

    @pytest.mark.parametrize("stage", ["semantic", "preference"])
    def test_another_model(self, folder: Path, stage: str):
        versions = {"semantic": "aaaa", "preference": "bbbb"}
        with pytest.raises(MismatchError, match=rf"{stage} model {versions[stage]}.*cccc"):
            SongIndex.load(folder, model_versions=versions | {stage: "cccc"})

    def test_a_missing_stage(self, folder: Path):
        with pytest.raises(MismatchError, match=r"preference model bbbb.*None"):
            SongIndex.load(folder, model_versions={"semantic": "aaaa", "preference": None})

    @pytest.mark.parametrize("name", [VECTORS_FILE, SONGS_FILE])
    def test_a_changed_file(self, folder: Path, name: str):
        recorded = json.loads((folder / "manifest.json").read_text())["files"][name]
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)
        with pytest.raises(MismatchError, match=rf"{name} has SHA-256 \w+, but its manifest says {recorded}"):
            SongIndex.load(folder)

    def test_a_missing_file(self, folder: Path):
        (folder / SONGS_FILE).unlink()
        with pytest.raises(WorkspaceError, match=SONGS_FILE):
            SongIndex.load(folder)

    def test_a_newer_format(self, folder: Path):
        self.change_manifest(folder, format_version=99)
        with pytest.raises(MismatchError, match="99"):
            SongIndex.load(folder)

    def test_another_artifact(self, folder: Path):
        self.change_manifest(folder, kind="embeddings")
        with pytest.raises(MismatchError, match=r"embeddings.*index"):
            SongIndex.load(folder)

    def test_vectors_of_another_width(self, folder: Path):
        other = faiss.IndexFlatIP(4)
        other.add(np.ones((5, 4), np.float32))
        faiss.write_index(other, str(folder / VECTORS_FILE))
        from htcl_ray.workspace.manifest import file_sha256

        files = {name: file_sha256(folder / name) for name in (VECTORS_FILE, SONGS_FILE)}
        self.change_manifest(folder, files=files)
        with pytest.raises(MismatchError, match=r"5 vectors of 4.*5 of 16"):
            SongIndex.load(folder)


def test_interrupted_save_looks_unfinished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    index = build("flat", 5)
    index.save(tmp_path)
    monkeypatch.setattr(faiss, "write_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        index.save(tmp_path)
    monkeypatch.undo()
    with pytest.raises(WorkspaceError, match="no finished index"):
        SongIndex.load(tmp_path)
