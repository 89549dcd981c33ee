"""A recording is embedded in one way, the catalogue's: by every command, by every call of the application, and in
Python."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
import soundfile

from htcl_ray.cli import main
from htcl_ray.config import Config
from htcl_ray.models import HTCL
from htcl_ray.pipelines.embed import embed
from htcl_ray.pipelines.index import build_index
from htcl_ray.pipelines.preprocess import preprocess
from htcl_ray.search.service import SearchService
from htcl_ray.serving.application import serving
from tests.worlds.small_workspace import small_config, write_models

pytestmark = pytest.mark.serve

CLIP_SECONDS = 35.0
FILES = [
    ("short.wav", 3.0, 16_000, 1),
    ("short.flac", 3.0, 44_100, 2),
    ("short.ogg", 3.0, 48_000, 6),
    ("short.mp3", 3.0, 22_050, 2),
    ("half.wav", 31.0, 48_000, 2),
    ("half.flac", 31.0, 96_000, 1),
    ("half.ogg", 31.0, 44_100, 2),
    ("half.mp3", 31.0, 48_000, 2),
    ("half.m4a", 31.0, 44_100, 2),
    ("long.wav", 80.0, 44_100, 1),
    ("long.flac", 80.0, 16_000, 2),
    ("long.ogg", 80.0, 32_000, 1),
    ("long.mp3", 80.0, 44_100, 2),
    ("long.m4a", 80.0, 48_000, 2),
]
"""Name, seconds, sample rate, channels."""
KEY = "writes-too-0123456789"


def music(seed: int, seconds: float, rate: int, channels: int) -> np.ndarray:
    """A new chord every 5 s, and other tones on other channels, so that every part and every channel of a recording
    differs."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    part = (time // 5).astype(int)
    waves = []
    for _ in range(channels):
        pitches, loudness = rng.uniform(100, 5_000, (part.max() + 1, 2)), rng.uniform(0.05, 0.4, part.max() + 1)
        waves.append(loudness[part] * sum(np.sin(2 * np.pi * pitches[part, tone] * time) for tone in range(2)) / 2)
    return (np.stack(waves, axis=1) + 0.005 * rng.normal(size=(time.size, channels))).astype(np.float32)


def write(file: Path, samples: np.ndarray, rate: int) -> None:
    if file.suffix != ".m4a":
        with soundfile.SoundFile(file, "w", rate, samples.shape[1]) as writer:
            for start in range(0, len(samples), rate):
                writer.write(samples[start : start + rate])
        return
    av = pytest.importorskip("av")
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=rate, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples.T), "fltp", "stereo")
        frame.rate = rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)


@pytest.fixture(scope="module")
def catalogue(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A catalogue of these files, made, embedded and indexed by the steps themselves."""
    folder = tmp_path_factory.mktemp("catalogue")
    with open(folder / "songs.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["song_id", "audio_path", "title", "artist"])
        for seed, (name, seconds, rate, channels) in enumerate(FILES):
            write(folder / name, music(seed, seconds, rate, channels), rate)
            table.writerow([name, name, f"Title {seed}", f"Artist {seed}"])
    keys = folder / "keys.yaml"
    keys.write_text(f"- {{name: catalogue, key: {KEY}, scopes: [write]}}")
    keys.chmod(0o600)
    config = small_config(folder / "workspace", serve__port=0, serve__api_keys_file=str(keys)).with_overrides(
        {"audio.clip_seconds": CLIP_SECONDS, "data.catalog": str(folder / "songs.csv")}
    )
    preprocess(config)
    write_models(config, folder)
    embed(config)
    build_index(config)
    (folder / "config.yaml").write_text(config.as_yaml())
    return config, folder


@pytest.fixture(scope="module")
def client(catalogue: tuple[Config, Path]) -> Iterator[httpx.Client]:
    with serving(catalogue[0]) as url, httpx.Client(base_url=url, timeout=120) as client:
        yield client


@pytest.mark.parametrize("name", [file[0] for file in FILES])
def test_every_way_to_ask_gives_the_same_vectors_hits_and_scores(
    name: str, client: httpx.Client, catalogue: tuple[Config, Path], capsys: pytest.CaptureFixture
):
    config, folder = catalogue
    data = (folder / name).read_bytes()
    capsys.readouterr()
    assert (
        main(["search", "--config", str(folder / "config.yaml"), "--audio", str(folder / name), "-k", "14", "--json"])
        == 0
    )
    told = json.loads(capsys.readouterr().out)["results"]
    response = client.post("/v1/search/audio", files={"file": (name, data)}, data={"k": "14"})
    assert response.status_code == 200, response.text
    results = response.json()["results"]
    assert len(told) == len(results) == len(FILES)
    assert [result["song_id"] for result in results] == [result["song_id"] for result in told]
    for field in ("score", "semantic_score", "preference_score"):
        assert [result[field] for result in results] == pytest.approx([result[field] for result in told], abs=1e-5)

    best = results[0]
    assert best["song_id"] == name, "a song of the catalogue finds itself"
    assert min(best["semantic_score"], best["preference_score"]) > 0.999

    stored = SearchService.open(config, encoder=False).index.vectors_of([name])
    given = client.post("/v1/embeddings", files={"file": (name, data)}).json()
    samples, rate = (
        soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True) if not name.endswith("m4a") else (None, 0)
    )
    for space, vector in (("semantic", stored.semantic[0]), ("preference", stored.preference[0])):
        assert np.dot(given[space], vector) > 0.999
        if samples is not None:
            model = HTCL.from_pretrained(Path(config.workspace) / f"models/{space}/{space}-0")
            np.testing.assert_allclose(model.embed_audio(samples.T, rate).numpy(), given[space], atol=2e-3)


def test_a_song_that_is_put_is_embedded_like_the_others(client: httpx.Client, catalogue: tuple[Config, Path]):
    """A copy of a song of the catalogue, longer than a clip, gets that song's vectors."""
    data = (catalogue[1] / "long.flac").read_bytes()
    put = client.put("/v1/songs/copy", files={"file": ("x.flac", data)}, headers={"authorization": f"Bearer {KEY}"})
    assert put.status_code == 200, put.text
    hit = client.post("/v1/search", json={"song_id": "copy", "k": 1}).json()["results"][0]
    assert hit["song_id"] == "long.flac"
    assert min(hit["semantic_score"], hit["preference_score"]) > 0.999
    client.delete("/v1/songs/copy", headers={"authorization": f"Bearer {KEY}"})


def test_what_comes_after_the_first_clip_changes_nothing(client: httpx.Client, catalogue: tuple[Config, Path]):
    """And what comes before its end does."""
    recipe = catalogue[0].audio
    samples = music(99, 80.0, recipe.sample_rate, 1)
    ending = samples.copy()
    ending[recipe.max_samples :] *= -0.1
    within = samples.copy()
    within[recipe.max_samples // 2 :] = music(98, 80.0, recipe.sample_rate, 1)[recipe.max_samples // 2 :]
    given = []
    for waveform in (samples, ending, within, samples[: recipe.max_samples]):
        file = io.BytesIO()
        soundfile.write(file, waveform, recipe.sample_rate, format="WAV", subtype="FLOAT")
        given.append(client.post("/v1/embeddings", files={"file": ("x.wav", file.getvalue())}).json()["semantic"])
    np.testing.assert_allclose(given[1], given[0], atol=1e-6)
    np.testing.assert_allclose(given[3], given[0], atol=1e-6)
    assert np.abs(np.array(given[2]) - given[0]).max() > 1e-3
