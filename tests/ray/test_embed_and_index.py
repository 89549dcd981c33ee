"""Features → vectors → index on a real cluster, with real models; compared with the encoder called directly."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from htcl_ray.cli import main
from htcl_ray.config import Config
from htcl_ray.errors import MismatchError, WorkspaceError
from htcl_ray.index.song_index import SongIndex
from htcl_ray.models import HTCL
from htcl_ray.pipelines import embed as embed_pipeline
from htcl_ray.pipelines.embed import embed, plan, read_vectors
from htcl_ray.pipelines.index import build_index
from htcl_ray.schemas import INDEX_SONGS, embeddings_schema
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.manifest import file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import SONGS, small_config, song_id, sound, write_features, write_models

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def embedded(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Features, models of both stages and their vectors; to be left as it is."""
    folder = tmp_path_factory.mktemp("embedded")
    config = small_config(folder / "workspace")
    write_features(config)
    write_models(config, folder)
    assert not embed(config).skipped
    return config


@pytest.fixture
def config(embedded: Config, tmp_path: Path) -> Config:
    """A copy to change."""
    shutil.copytree(embedded.workspace, tmp_path / "workspace")
    return embedded.with_overrides({"workspace": str(tmp_path / "workspace")})


def written(config: Config, path: str) -> dict[str, bytes]:
    workspace = Workspace(config.workspace)
    return {
        name: workspace.read_bytes(f"{path}/{name}") for name in workspace.children(path) if name.endswith(".parquet")
    }


def test_vectors_equal_those_of_each_model_alone(embedded: Config):
    """Batches in actors give what `embed_mel` gives for one clip, and what a query of the same audio gives, within fp16
    storage."""
    config, workspace = embedded, Workspace(embedded.workspace)
    ids, vectors = read_vectors(workspace, plan(workspace, config).path)
    assert ids == [song_id(i) for i in range(SONGS)]
    table = workspace.read_tables("features/features-1")
    mels = table["features"].combine_chunks().to_numpy_ndarray().astype(np.float32)
    for stage, got in (("semantic", vectors.semantic), ("preference", vectors.preference)):
        model = HTCL.from_pretrained(workspace.local_copy(f"models/{stage}/{stage}-0"))
        for i, frames in enumerate(table["valid_frames"].to_pylist()):
            alone = model.embed_mel(mels[i : i + 1, :frames]).numpy()[0]
            np.testing.assert_allclose(got[i], alone, atol=1e-5)
            online = model.embed_audio(sound(i, config.audio), config.audio.sample_rate).numpy()
            np.testing.assert_allclose(got[i], online, atol=5e-3)
    assert np.abs(vectors.semantic - vectors.preference).max() > 0.1


def test_files_follow_the_schema_and_the_manifest_names_its_inputs(embedded: Config):
    workspace = Workspace(embedded.workspace)
    path = plan(workspace, embedded).path
    assert workspace.children(path) == [
        "manifest.json",
        "shard-00000.parquet",
        "shard-00001.parquet",
        "shard-00002.parquet",
    ]
    assert workspace.read_tables(path).schema.equals(embeddings_schema(12))
    manifest = workspace.manifest(path)
    assert manifest["inputs"] == {"features": "features-1", "semantic": "semantic-0", "preference": "preference-0"}
    encoder = SongEncoder.load(
        *(workspace.local_copy(f"models/{stage}/{stage}-0") for stage in ("semantic", "preference"))
    )
    assert manifest["model_versions"] == encoder.model_versions


def test_an_interrupted_run_keeps_what_it_finished(config: Config, monkeypatch: pytest.MonkeyPatch):
    workspace = Workspace(config.workspace)
    path = plan(workspace, config).path
    before = written(config, path)
    for name in ("manifest.json", "shard-00001.parquet"):
        workspace.fs.delete_file(workspace.full(f"{path}/{name}"))
    marker = workspace.full(f"{path}/shard-00002.parquet")
    kept = Path(marker).stat().st_mtime_ns
    embedded = []
    original = embed_pipeline.embed_shards
    monkeypatch.setattr(embed_pipeline, "embed_shards", lambda *a: (embedded.extend(a[3]), original(*a)))
    assert not embed(config).skipped
    assert embedded == ["shard-00001.parquet"]
    assert Path(marker).stat().st_mtime_ns == kept
    assert written(config, path) == before
    assert embed(config).skipped


def replace_weights(folder: Path, change: Callable[[HTCL], object]) -> None:
    """A model of the workspace with other weights, which its manifest records."""
    model = HTCL.from_pretrained(folder)
    with torch.no_grad():
        change(model)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"]["model.safetensors"] = file_sha256(folder / "model.safetensors")
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda model: model.audio_head[0].weight[0, 0].fill_(torch.nan),
            r"model\.safetensors holds NaN or infinity under audio_head\.0\.weight",
        ),
        (
            lambda model: model.audio_head[-1].weight.mul_(1e38),
            r"song 'song-\d+' cannot be embedded: the stage-1 model gives input 0",
        ),
    ],
)
def test_a_model_that_gives_no_vectors_embeds_nothing(
    config: Config, change: Callable[[HTCL], object], message: str, capsys: pytest.CaptureFixture
):
    """One sentence of the command, and no file."""
    workspace = Workspace(config.workspace)
    replace_weights(Path(workspace.full("models/semantic/semantic-0")), change)
    file = Path(config.workspace) / "config.yaml"
    file.write_text(config.as_yaml())
    assert main(["embed", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert re.search(rf"^htcl: error: .*{message}.*choose another one$", said, re.MULTILINE), said
    assert "Traceback" not in said
    assert not workspace.children(plan(workspace, config).path)


def test_other_weights_under_the_same_name_are_embedded_again(config: Config):
    before = plan(Workspace(config.workspace), config).version
    folder = Path(Workspace(config.workspace).full("models/semantic/semantic-0"))
    replace_weights(folder, lambda model: model.audio_head[0].weight.mul_(-1))
    assert plan(Workspace(config.workspace), config).version != before
    with pytest.raises(WorkspaceError, match="run 'htcl embed' first"):
        build_index(config)


def test_without_stage_2_the_preference_column_is_null(tmp_path: Path):
    config = small_config(tmp_path / "workspace")
    write_features(config)
    write_models(config, tmp_path, preference=False)
    embed(config)
    build_index(config)
    workspace = Workspace(config.workspace)
    table = workspace.read_tables(plan(workspace, config).path)
    assert table.schema.equals(embeddings_schema(12))
    assert table["preference"].null_count == SONGS
    service = SearchService.open(config)
    assert service.search_text("rock").blend == 0
    assert {hit.preference_score for hit in service.search_text("rock").hits} == {None}


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
def test_index_holds_every_song_with_its_metadata(config: Config, kind: str):
    config = config.with_overrides({"index.kind": kind})
    result = build_index(config)
    assert "recall@10 1.000" in result.summary
    workspace = Workspace(config.workspace)
    folder = Path(result.location)
    vectors = [] if kind == "flat" else ["vectors.npy"]
    assert sorted(file.name for file in folder.iterdir()) == [
        "index.faiss",
        "manifest.json",
        "map.parquet",
        "songs.parquet",
        *vectors,
    ]
    index = SongIndex.load(folder)
    assert index.kind == kind
    assert index.songs.schema.equals(INDEX_SONGS)
    assert sorted(index.song_map["song_id"].to_pylist()) == sorted(index.songs["song_id"].to_pylist())
    assert index.metadata_of("song-003")["title"] == "number 3"
    assert index.metadata_of("song-003")["year"] == 1993
    assert index.manifest["quality"]["recall_at_10"] == 1.0
    assert index.manifest["inputs"] == {
        "features": "features-1",
        "semantic": "semantic-0",
        "preference": "preference-0",
        "embeddings": plan(workspace, config).version,
    }
    ids, vectors = read_vectors(workspace, plan(workspace, config).path)
    np.testing.assert_array_equal(index.vectors_of(ids).preference, vectors.preference)
    assert build_index(config).skipped


def test_what_is_missing_is_said_before_ray_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embed_pipeline, "connect", lambda config: pytest.fail("Ray was started"))
    config = small_config(tmp_path / "workspace")
    with pytest.raises(WorkspaceError, match="run 'htcl preprocess' first"):
        embed(config)
    write_features(config)
    with pytest.raises(WorkspaceError, match="run 'htcl pretrain' first"):
        embed(config)
    write_models(config.with_overrides({"audio.hop_length": 512}), tmp_path)
    with pytest.raises(MismatchError, match=r"audio\.hop_length=512.*1536"):
        embed(config)
