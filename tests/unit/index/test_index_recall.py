"""Recall on songs that the index has not seen, and a build that stops when it is too low."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from htcl_ray.config import Config
from htcl_ray.config.sections import IndexSettings
from htcl_ray.errors import StepError
from htcl_ray.index.recall import build_measured, measure_recall
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.pipelines.embed import plan
from htcl_ray.pipelines.index import build_index
from htcl_ray.schemas import INDEX_SONGS, embeddings_schema
from htcl_ray.search import song_map
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import small_config, write_models

pytestmark = pytest.mark.unit

WEAK = IndexSettings(kind="ivf", ivf_lists=50, ivf_probes=2)


def scattered(rows: int, seed: int = 0, dim: int = 12, preference: bool = True) -> Vectors:
    """Vectors without clusters, so that one list holds few of a song's neighbours."""
    values = np.random.default_rng(seed).normal(size=(2, rows, dim))
    unit = (values / np.linalg.norm(values, axis=2, keepdims=True)).astype(np.float32)
    return Vectors(unit[0], unit[1] if preference else None)


def names(count: int) -> list[str]:
    return [f"song-{i:05d}" for i in range(count)]


def test_recall_equals_a_manual_count():
    """The share of the 10 best by exhaustive scores among the 10 hits."""
    stored, queries = scattered(3000), scattered(100, seed=1)
    index = SongIndex.build(names(3000), stored, settings=WEAK)
    measured = measure_recall(index, stored, queries)
    assert measured.queries == 100
    for blend, value in measured.by_blend.items():
        share = float(blend)
        scores = (1 - share) * queries.semantic.astype(float) @ stored.semantic.T.astype(float)
        scores += share * queries.preference.astype(float) @ stored.preference.T.astype(float)
        best = np.argsort(-scores, axis=1)[:, :10]
        results = index.search(queries, 10, blend=share)
        counted = [
            len({hit.song_id for hit in hits} & {names(3000)[i] for i in rows})
            for hits, rows in zip(results, best, strict=True)
        ]
        assert value == pytest.approx(np.sum(counted) / 1000, abs=1e-12)
        assert 0.05 < value < 0.9
    assert measured.worst == min(measured.by_blend.values())
    assert list(measured.by_blend) == ["0.0", "0.5", "1.0"]


def test_queries_are_not_in_the_measured_index(monkeypatch: pytest.MonkeyPatch):
    batches = []
    original = SongIndex.search

    def search(index: SongIndex, queries: Vectors, *rest: object, **options: object):
        batches.append(len(queries))
        best = original(index, queries, 1, blend=0)
        assert max(hits[0].score for hits in best) < 1 - 1e-3
        return original(index, queries, *rest, **options)

    monkeypatch.setattr(SongIndex, "search", search)
    index, recall = build_measured(names(1000), scattered(1000))
    monkeypatch.undo()
    assert batches == [100] * 3
    assert recall.queries == 100
    assert len(index) == 1000
    assert [hits[0].song_id for hits in index.search(scattered(1000), 1)] == names(1000)


@pytest.mark.parametrize(("songs", "queries"), [(0, 0), (1, 0), (2, 1), (30, 3), (6000, 256)])
def test_at_most_256_songs_and_a_tenth_are_held_out(songs: int, queries: int):
    index, recall = build_measured(names(songs), scattered(songs))
    assert (recall.queries, recall.worst, len(index)) == (queries, 1.0, songs)


@pytest.mark.parametrize("kind", ["hnsw", "ivf", "ivf_pq"])
def test_automatic_parameters_reach_the_default_recall_without_clusters(kind: str):
    index, recall = build_measured(names(4000), scattered(4000), settings=IndexSettings(kind=kind))
    assert index.kind == kind
    assert recall.worst >= IndexSettings().min_recall


def test_every_song_keeps_its_vector_and_metadata():
    vectors = scattered(50)
    metadata = pa.table({"title": [f"title {i}" for i in range(50)]})
    index, _ = build_measured(names(50), vectors, metadata=metadata)
    np.testing.assert_array_equal(index.vectors_of(names(50)).preference, vectors.preference)
    assert [index.metadata_of(song_id)["title"] for song_id in names(50)] == metadata["title"].to_pylist()


def test_without_stage_2_one_blend_is_measured():
    _, recall = build_measured(names(100), scattered(100, preference=False))
    assert recall.by_blend == {"0.0": 1.0}


class TestPipeline:
    @pytest.fixture(scope="class")
    @staticmethod
    def embedded(tmp_path_factory: pytest.TempPathFactory) -> Path:
        """Workspace with models, features and embeddings; tests build indexes in copies."""
        folder = tmp_path_factory.mktemp("embedded")
        config = small_config(folder / "workspace")
        workspace = Workspace(config.workspace)
        write_models(config, folder)
        songs = pa.table(
            {"song_id": names(3000), **{field.name: pa.nulls(3000, field.type) for field in list(INDEX_SONGS)[1:]}}
        )
        workspace.write_table("features/features-1/shard-00000.parquet", songs)
        workspace.finish(
            "features/features-1", build_manifest("features", config=config.model_dump(mode="json"), inputs={})
        )
        job, vectors = plan(workspace, config), scattered(3000)
        columns = {"song_id": names(3000), "semantic": list(vectors.semantic), "preference": list(vectors.preference)}
        workspace.write_table(f"{job.path}/shard-00000.parquet", pa.table(columns, schema=embeddings_schema(12)))
        workspace.finish(job.path, build_manifest("embeddings", config={}, inputs=job.inputs))
        return folder / "workspace"

    def configured(self, embedded: Path, tmp_path: Path, **overrides: object) -> Config:
        shutil.copytree(embedded, tmp_path / "workspace")
        return small_config(tmp_path / "workspace", **overrides)

    def test_recall_below_the_bound_publishes_nothing(self, embedded: Path, tmp_path: Path):
        config = self.configured(embedded, tmp_path, index__kind="ivf", index__ivf_lists=50, index__ivf_probes=2)
        with pytest.raises(StepError, match=r"finds 0\.\d{3} .* index\.min_recall is 0\.95; raise index\.ivf_probes"):
            build_index(config)
        assert Workspace(config.workspace).children("index") == []

    def test_manifest_contains_the_measured_recall(
        self, embedded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(song_map, "ITERATIONS", 250)  # the least of t-SNE; this test does not look at the map
        config = self.configured(
            embedded, tmp_path, index__kind="ivf", index__ivf_lists=50, index__ivf_probes=2, index__min_recall=0.1
        )
        result = build_index(config)
        manifest = Workspace(result.location).manifest("")
        quality = manifest["quality"]
        assert quality["recall_at_10"] == min(quality["recall_at_10_by_blend"].values())
        assert 0.1 <= quality["recall_at_10"] < 0.95
        assert quality["recall_queries"] == 256
        assert f"3000 songs, ivf, recall@10 {quality['recall_at_10']:.3f}" in result.summary
        assert manifest["structure"]["probes"] == 2
        assert build_index(config).skipped
