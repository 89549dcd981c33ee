"""Given vectors and a pretrained encoder, from preprocessing to search, with real vectors and real audio."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from htcl_ray.api.requests import Filter
from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.errors import MismatchError, QueryError
from htcl_ray.models import HTCL
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.index import build_index, determined_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.pipelines.train import pretrain
from htcl_ray.schemas import TAG_COLUMNS
from htcl_ray.search.service import SearchService
from htcl_ray.workspace.storage import Workspace
from tests.conftest import REPOSITORY
from tests.worlds.synthetic_features import tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

MUSICNN = REPOSITORY / ".models" / "musicnn"
SHORT = {
    "data.max_rejected_share": 0.5,
    "text.max_tokens": 64,
    "text.vocab_size": 800,
    "model.mlp.hidden": [32],
    "model.mlp.width": 32,
    "pretrain.epochs": 2,
    "pretrain.num_workers": 1,
    "index.kind": "flat",
}


def finished(config: Config, kind: str) -> tuple[str, dict]:
    (name, manifest), *others = Workspace(config.workspace).finished(kind)
    assert not others
    return f"{kind}/{name}", manifest


def test_given_vectors_from_the_catalogue_to_search(tmp_path: Path, shared_data: Path):
    """No audio file is read, and every vector that was stored is the given one in float16."""
    table = tmp_path / "songs.csv"
    with open(shared_data / "music.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    with open(table, "w", encoding="utf-8", newline="") as file:  # without audio paths
        writer = csv.DictWriter(file, ["song_id", "title", "artist", "genre", "tags"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, {"song_id": "no-vector", "title": "a song without a vector"}])
    config = tiny_config(
        tmp_path / "workspace",
        **{
            **SHORT,
            "audio.extractor": "vectors",
            "data.catalog": [str(table)],
            "data.vectors": [str(shared_data / "music_vectors.parquet")],
        },
    )
    preprocess(config)
    path, manifest = finished(config, "features")
    assert (manifest["feature_width"], manifest["quality"]["songs"]) == (200, len(rows))
    assert manifest["quality"]["rejected"] == {"missing_vector": 1}
    given = dict(zip(*pq.read_table(shared_data / "music_vectors.parquet").to_pydict().values(), strict=True))
    stored = Workspace(config.workspace).read_tables(path)
    for song_id, frames, valid in zip(
        stored["song_id"].to_pylist(),
        stored["features"].combine_chunks().to_numpy_ndarray(),
        stored["valid_frames"].to_pylist(),
        strict=True,
    ):
        assert valid == 1
        np.testing.assert_array_equal(frames, np.array([given[song_id]], np.float32).astype(np.float16))

    pretrain(config)
    embed(config)
    build_index(config)
    service = SearchService.open(config)
    assert len(service.search_text("classical strings", k=5).hits) == 5
    some = rows[7]["song_id"]
    query = service.encoder.encode_given(given[some])
    assert service.search(query, k=1).hits[0].song_id == some
    with pytest.raises(QueryError, match=r"this model takes no audio, because it was trained on given vectors"):
        service.search_audio(str(shared_data / rows[7]["audio_path"]))
    with pytest.raises(QueryError, match="the vector has 199 numbers; this model was trained on vectors of 200"):
        service.encoder.encode_given(given[some][:199])
    model = HTCL.from_pretrained(Path(config.workspace) / finished(config, "models/semantic")[0])
    assert model.record.audio.tower_name == "mlp"
    with pytest.raises(QueryError, match="this model takes no audio"):
        model.embed_audio(np.zeros(16_000, np.float32), 16_000)

    narrow = tmp_path / "narrow.parquet"
    vectors = pq.read_table(shared_data / "music_vectors.parquet")
    cut = [vector[:100] for vector in vectors["vector"].to_pylist()]
    pq.write_table(vectors.set_column(1, "vector", [cut]), narrow)
    other = config.with_overrides({"data.vectors": [str(narrow)]})
    preprocess(other)
    with pytest.raises(
        MismatchError, match=r"was trained on vectors of 200 numbers, but those of the features .* have 100"
    ):
        embed(other, finished(config, "models/semantic")[0].rpartition("/")[2])


@pytest.mark.skipif(not MUSICNN.is_dir(), reason="run 'make pretrained-audio' first")
def test_a_pretrained_encoder_on_real_audio(tmp_path: Path, shared_data: Path):
    """Stored windows are those of the encoder, a search by audio finds the song itself, and another encoder is refused."""
    table = tmp_path / "songs.csv"
    with open(shared_data / "music.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[1:21:4]
    with open(table, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["song_id", "audio_path", "title", "artist", "genre"], extrasaction="ignore")
        writer.writeheader()
        for row in rows:  # the first has a genre, the others have none
            genre = "Opera" if row is rows[0] else ""
            writer.writerow({**row, "audio_path": str(shared_data / row["audio_path"]), "genre": genre})
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    for file in MUSICNN.iterdir():
        (encoder / file.name).write_bytes(file.read_bytes())
    config = tiny_config(
        tmp_path / "workspace",
        **{
            **SHORT,
            "audio.extractor": "pretrained",
            "audio.name_or_path": str(encoder),
            "audio.clip_seconds": 10,
            "audio.tower": "mlp",
            "data.catalog": [str(table)],
            "data.split_shares": [1, 0, 0],
            "data.songs_per_shard": 3,
            "pretrain.batch_size": 4,
        },
    )
    preprocess(config)
    path, manifest = finished(config, "features")
    assert (manifest["feature_width"], manifest["extractor"]["licence"]) == (200, "isc")
    stored = Workspace(config.workspace).read_tables(path)
    valid = dict(zip(stored["song_id"].to_pylist(), stored["valid_frames"].to_pylist(), strict=True))
    assert valid == {row["song_id"]: 1 if float(row["duration_s"]) < 6 else 3 for row in rows}
    pretrain(config)
    embed(config)
    build_index(config)
    service = SearchService.open(config)
    audio = service.encoder.audio_features
    for row in rows[:2]:
        waveform = decode(str(shared_data / row["audio_path"]), audio.decoding)
        index = stored["song_id"].to_pylist().index(row["song_id"])
        frames = stored["features"].combine_chunks().to_numpy_ndarray()[index, : valid[row["song_id"]]]
        np.testing.assert_allclose(frames, audio([waveform])[0].astype(np.float16), rtol=2e-3, atol=2e-3)
        hit = service.search_audio(str(shared_data / row["audio_path"]), k=1).hits[0]
        assert hit.song_id == row["song_id"]
        assert hit.score > 0.999
    check_auto_tags(config, {row["song_id"] for row in rows}, rows[0]["song_id"])
    folder = Path(config.workspace) / finished(config, "models/semantic")[0]
    model = HTCL.from_pretrained(folder)
    assert model.record.extractor.fingerprint == manifest["extractor"]["fingerprint"]
    assert "licence of their encoder: isc" in (folder / "README.md").read_text(encoding="utf-8")
    tree = json.loads((encoder / "config.json").read_text())
    (encoder / "config.json").write_text(json.dumps({**tree, "changed": True}))
    with pytest.raises(MismatchError, match=r"but the model was trained on vectors of .*; put back that audio model"):
        model.embed_audio(np.zeros(48_000, np.float32), 16_000)


def check_auto_tags(config: Config, songs: set[str], stated: str) -> None:
    """Estimates reach the index with their mark and origin; nothing else is made again, and no stated value changes."""
    workspace = Workspace(config.workspace)
    kinds = ("features", "models/semantic", "embeddings")
    before = {kind: workspace.finished(kind) for kind in kinds}
    stored = workspace.read_tables(finished(config, "features")[0])
    tagged = config.with_overrides({"catalog.auto_tags": True, "catalog.auto_tags_min_score": 0.1})
    assert not preprocess(tagged).skipped
    assert embed(tagged).skipped
    assert not build_index(tagged).skipped
    assert preprocess(tagged).skipped
    assert build_index(tagged).skipped
    assert {kind: workspace.finished(kind) for kind in kinds} == before
    assert workspace.read_tables(finished(config, "features")[0]).equals(stored)

    estimates, manifest = finished(config, "estimates")
    assert manifest["auto_tags"]["tagger"]["licence"] == "isc"
    index = SearchService.open(tagged, determined_index(workspace, tagged)).index
    assert index.manifest["auto_tags"] == manifest["auto_tags"]
    assert f"estimates/{index.manifest['inputs']['estimates']}" == estimates
    by_id = {song["song_id"]: song for song in index.songs.to_pylist()}
    assert by_id.keys() == songs
    assert by_id[stated]["genre"] == ["Opera"]
    for song_id, song in by_id.items():  # the catalogue states one genre and nothing else
        given = {"genre"} if song_id == stated else set()
        assert set(song["estimated"] or ()) == {name for name in TAG_COLUMNS if song[name]} - given
    trumpet = next(song for song_id, song in by_id.items() if "trumpet" in song_id)
    assert trumpet["genre"][0] == "jazz"
    service = SearchService(index)
    hits = {hit.song_id for hit in service.search_songs([stated], k=9, filter=Filter(genre=trumpet["genre"])).hits}
    assert trumpet["song_id"] in hits
    only_stated = Filter(genre=trumpet["genre"], include_estimated=False)
    assert not service.search_songs([stated], k=9, filter=only_stated).hits
    plain = SearchService.open(config, determined_index(workspace, config)).index
    assert plain.songs["estimated"].null_count == len(songs)
    assert "estimates" not in plain.manifest["inputs"]
