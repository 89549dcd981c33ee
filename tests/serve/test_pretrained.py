"""Own music with a pretrained audio-text model: folder → catalogue → every step → application, on real clips."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from htcl_ray import cli
from htcl_ray.audio import decode
from htcl_ray.config import Config
from htcl_ray.extractors.base import load_extractor
from htcl_ray.models import HTCL
from htcl_ray.pipelines.run import run
from htcl_ray.search.service import SearchService
from htcl_ray.serving.application import serving
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config
from tests.worlds.tiny_encoders import BUILDERS

pytestmark = pytest.mark.serve

NAMES = [f"{first} {second}" for first in ("calm", "slow", "fast", "loud") for second in ("piano", "guitar")]
"""File names, and so titles, of words that the tiny model knows."""


@pytest.fixture(scope="module")
def made(
    ray_cluster: None, shared_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Config, list[str], Path]:
    """`htcl import folder`, then `htcl run` with the joint space of a tiny CLAP and one epoch of stage 2."""
    folder = tmp_path_factory.mktemp("own-music")
    with open(shared_data / "music.csv", encoding="utf-8", newline="") as file:
        paths = [row["audio_path"] for row in csv.DictReader(file)][:: 88 // len(NAMES)][: len(NAMES)]
    (folder / "music").mkdir()
    for path, name in zip(paths, NAMES, strict=True):
        (folder / "music" / f"{name}{Path(path).suffix}").symlink_to(shared_data / path)
    assert cli.main(["import", "folder", str(folder / "music"), "--out", str(folder / "catalog.parquet")]) == 0
    ids = pq.read_table(folder / "catalog.parquet")["song_id"].to_pylist()
    assert len(ids) == len(NAMES)
    with open(folder / "log.csv", "w", encoding="utf-8", newline="") as file:
        log = csv.writer(file)
        log.writerow(["user_id", "trigger_song_id", "song_id", "feedback", "timestamp"])
        for event in range(240):
            first = event % len(NAMES)  # each song has one partner, so the others of a batch are its negatives
            second = first ^ 1
            log.writerow([f"user-{event // 8 % 20}", ids[first], ids[second], "like", 1_700_000_000 + 3600 * event])
    torch.manual_seed(0)
    BUILDERS["clap"](folder / "clap")
    config = tiny_config(
        folder / "workspace",
        **{
            "audio.extractor": "pretrained",
            "audio.name_or_path": str(folder / "clap"),
            "audio.tower": "residual",
            "audio.window_seconds": 1.0,
            "text.name_or_path": str(folder / "clap"),
            "model.head_hidden": [],
            "model.dim": 12,
            "pretrain.use_joint_space": True,
            "finetune.batch_size": 8,
            "finetune.epochs": 1,
            "finetune.pairs_per_epoch": 16,
            "finetune.num_workers": 1,
            "data.catalog": [str(folder / "catalog.parquet")],
            "data.interactions": [str(folder / "log.csv")],
            "data.split_shares": [1, 0, 0],
            "index.kind": "flat",
            "serve.port": 0,
        },
    )
    steps: list[str] = []
    run(config, until="index", report=lambda result: steps.append(result.step))
    assert steps == ["preprocess", "pretrain", "finetune", "embed", "index"]
    return config, ids, folder


@pytest.fixture(scope="module")
def client(made: tuple[Config, list[str], Path]) -> Iterator[httpx.Client]:
    with serving(made[0]) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


def test_an_upload_has_the_vectors_that_embed_gave_the_song(client: httpx.Client, made: tuple[Config, list[str], Path]):
    config, ids, folder = made
    index = SearchService.open(config, encoder=False).index
    files = sorted((folder / "music").iterdir())
    hits = []
    for file in files[:3]:
        response = client.post("/v1/search/audio", files={"file": (file.name, file.read_bytes())}, data={"k": "1"})
        assert response.status_code == 200, response.text
        best = response.json()["results"][0]
        hits.append(best["song_id"])
        given = client.post("/v1/embeddings", files={"file": (file.name, file.read_bytes())}).json()
        stored = index.vectors_of([best["song_id"]])
        for space, vector in (("semantic", stored.semantic[0]), ("preference", stored.preference[0])):
            np.testing.assert_allclose(given[space], vector, atol=2e-3)
    paths = dict(zip(*pq.read_table(folder / "catalog.parquet").select(["song_id", "audio_path"]), strict=True))
    names = {song.as_py(): Path(path.as_py()).name for song, path in paths.items()}
    assert [names[song] for song in hits] == [file.name for file in files[:3]]
    assert set(hits) <= set(ids)


def test_the_semantic_space_is_the_models_own(client: httpx.Client, made: tuple[Config, list[str], Path]):
    """Texts and audio over HTTP, against the encoder and the library; stage 2 has moved from it."""
    config, _, folder = made
    file = min((folder / "music").iterdir())
    extractor = load_extractor(config.audio.recipe)
    decoding = config.audio.recipe.model_copy(update={"sample_rate": extractor.record.sample_rate})
    windows = extractor.embed([decode(str(file), decoding)])[0]
    assert len(windows) == 3
    expected = windows.mean(axis=0) / np.linalg.norm(windows.mean(axis=0))
    given = client.post("/v1/embeddings", files={"file": (file.name, file.read_bytes())}).json()
    np.testing.assert_allclose(given["semantic"], expected, atol=2e-3)
    assert np.abs(np.array(given["preference"]) - given["semantic"]).max() > 1e-4

    (version, _), *others = Workspace(config.workspace).finished("models/semantic")
    assert not others
    model = HTCL.from_pretrained(Path(config.workspace) / "models" / "semantic" / version)
    text = client.post("/v1/embeddings", json={"text": "calm piano music"}).json()
    np.testing.assert_allclose(text["semantic"], model.embed_text(["calm piano music"])[0], atol=1e-5)
