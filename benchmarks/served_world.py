"""A workspace of songs with random vectors, and the application that serves it, for benchmarks of serving."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import tempfile
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import soundfile

from htcl_ray.config import Config, resolve
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace

GENRES = ("rock", "jazz", "folk", "soul", "techno")
CLIP_SECONDS = 3.0


def config_of(workspace: Path) -> Config:
    """Return the demo preset with a free port."""
    return resolve("demo").with_overrides({"workspace": str(workspace), "serve.port": 0})


def song_id(row: int) -> str:
    return f"song-{row:07d}"


def recording(seed: int) -> bytes:
    """Generate a WAV file with three seconds of tones."""
    rng, rate = np.random.default_rng(seed), 16_000
    time = np.arange(int(CLIP_SECONDS * rate)) / rate
    wave = sum(np.sin(2 * np.pi * frequency * time) for frequency in rng.uniform(80, 4000, size=3))
    file = io.BytesIO()
    soundfile.write(file, (0.2 * wave).astype(np.float32), rate, format="WAV", subtype="PCM_16")
    return file.getvalue()


def make_world(workspace: Path, songs: int) -> None:
    """Publish two untrained stages and an index of `songs` random unit vectors."""
    config, rng = config_of(workspace), np.random.default_rng(0)
    vocabulary = train_wordpiece(
        [f"{genre} calm piano number {i}" for i, genre in enumerate(GENRES * 20)], config.text.vocab_size
    )
    model = HTCL.untrained(config, vocabulary)
    versions = {
        "semantic": _publish(config, model, "models/semantic/stage-1", {"features": "none"}),
        "preference": _publish(
            config, model.to_stage_2(0.07, seed=1), "models/preference/stage-2", {"model": "stage-1"}
        ),
    }
    halves = rng.normal(size=(2, songs, config.model.dim)).astype(np.float32)
    halves /= np.linalg.norm(halves, axis=2, keepdims=True)
    rows = range(songs)
    metadata = pa.table(
        {
            "title": [f"Title {row}" for row in rows],
            "artist": [f"Artist {row % 1999}" for row in rows],
            "genre": [[GENRES[row % len(GENRES)]] for row in rows],
            "tags": [["calm", f"tag {row % 31}"] for row in rows],
            "year": pa.array([1960 + row % 60 for row in rows], pa.int32()),
        }
    )
    index = SongIndex.build(
        [song_id(row) for row in rows],
        Vectors(*halves),
        metadata=metadata,
        settings=config.index,
        model_versions=versions,
    )
    with tempfile.TemporaryDirectory() as scratch:
        inputs = {"semantic": "stage-1", "preference": "stage-2", "features": "none", "embeddings": "none"}
        index.save(scratch, config=config.model_dump(mode="json"), inputs=inputs, quality={"recall_at_10": 1.0})
        Workspace(str(workspace)).publish(Path(scratch), "index/first", index.manifest)


def _publish(config: Config, model: HTCL, path: str, inputs: dict[str, str]) -> str:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        model.save_pretrained(folder)
        files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in folder.rglob("*") if file.is_file()}
        weights = weights_fingerprint(folder)
        manifest = build_manifest(
            "model", config=config.model_dump(mode="json"), inputs=inputs, files=files, weights=weights
        )
        Workspace(config.workspace).publish(folder, path, manifest)
    return weights


def serve_here(front: str, workspace: Path) -> None:
    """Print the URL as a line of JSON, and serve until a line arrives on standard input."""
    config = config_of(workspace)
    if front == "bare":
        _serve_bare(config)
        return
    from htcl_ray.serving.front import haproxy_front

    with haproxy_front(config):
        import ray

        from htcl_ray.serving.application import serving

        with serving(config) as url:
            port = ray.nodes()[0]["MetricsExportPort"]
            print(json.dumps({"url": url, "metrics": f"http://127.0.0.1:{port}/metrics"}), flush=True)
            sys.stdin.readline()


class Bare:
    """A backend of the routes with model and index in this process, without Ray and without batching."""

    def __init__(self, config: Config) -> None:
        from htcl_ray.audio import decode, log_mel
        from htcl_ray.index.live.live_index import LiveIndex
        from htcl_ray.search.service import SearchService

        opened = SearchService.open(config)
        self._encoder: Any = opened.encoder
        recipe = self._encoder.recipe
        self._mel = lambda data: log_mel(decode(data, recipe), recipe.sample_rate, recipe)
        self.live = LiveIndex(Workspace(config.workspace), config.serve, opened.index.model_versions)

    def encode_text(self, text: str) -> Awaitable[Vectors]:
        return asyncio.to_thread(self._encoder.encode_texts, [text])

    def encode_audio(self, data: bytes) -> Awaitable[Vectors]:
        return asyncio.to_thread(lambda: self._encoder.encode_songs([self._mel(data)]))

    encode_song = encode_audio

    async def check_ready(self) -> None:
        return


def _serve_bare(config: Config) -> None:
    import threading

    import torch
    import uvicorn

    from htcl_ray.serving.http_app import create_app

    torch.set_num_threads(1)
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # Ray Serve sends these records to a file
    server = uvicorn.Server(
        uvicorn.Config(create_app(Bare(config), config.serve), port=0, log_level="error", access_log=False)
    )

    def tell() -> None:
        while not server.started:
            threading.Event().wait(0.05)
        print(json.dumps({"url": f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"}), flush=True)
        sys.stdin.readline()
        server.should_exit = True

    threading.Thread(target=tell, daemon=True).start()
    server.run()
