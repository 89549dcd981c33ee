"""A catalogue with audio, in groups that can be searched by name, and the application over it in a thread."""

from __future__ import annotations

import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import soundfile
import uvicorn
from starlette.datastructures import MutableHeaders

from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import AudioError
from htcl_ray.index.live.live_index import LiveIndex
from htcl_ray.index.song_index import SongIndex
from htcl_ray.index.vectors import Vectors, unit_norm
from htcl_ray.schemas import Reason
from htcl_ray.serving.http_app import create_app
from htcl_ray.workspace.storage import Workspace
from tests.worlds.live import VERSIONS, write_models

DIM = 16
GENRES = ("ambient", "jazz", "folk", "techno", "soul", "metal", "classical", "bossa nova")
MOODS = ("calm", "bright", "dark", "tender", "restless")
SONGS = 240
SECONDS = 4.0
FIRST = (
    "Slow",
    "Blue",
    "Paper",
    "Northern",
    "Hollow",
    "Golden",
    "Second",
    "Quiet",
    "Electric",
    "Winter",
    "Open",
    "Borrowed",
)
SECOND = (
    "Rivers",
    "Light",
    "Machines",
    "Letters",
    "Harbour",
    "Season",
    "Windows",
    "Echo",
    "Garden",
    "Distance",
    "Hours",
    "Rooms",
)
ARTISTS = (
    "Mira Holm",
    "The Lanterns",
    "Oko & Sons",
    "Dunes",
    "Aurelia Trio",
    "Tape Weather",
    "Ines Carvalho",
    "Low Orbit",
)


def song_id(i: int) -> str:
    return f"song-{i:04d}"


def title(i: int) -> str:
    return f"{FIRST[i % 12]} {SECOND[(i // 12 + 5 * i) % 12]}"


def _centres(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(len(GENRES), DIM))


def _near(centres: np.ndarray, groups: np.ndarray, seed: int, noise: float) -> np.ndarray:
    return unit_norm(centres[groups] + noise * np.random.default_rng(seed).normal(size=(len(groups), DIM))).astype(
        np.float32
    )


def write_world(folder: Path, songs: int = SONGS, preference: bool = True) -> Workspace:
    """Groups are genres in the semantic half; in the preference half every song belongs to another one."""
    workspace = Workspace(str(folder / "workspace"))
    write_models(workspace)
    groups = np.arange(songs) % len(GENRES)
    for group in range(len(GENRES)):
        time = np.arange(int(SECONDS * 8_000)) / 8_000
        tones = sum(np.sin(2 * np.pi * 110 * 2 ** ((group + step) / 12) * time) for step in (0, 4, 7))
        soundfile.write(folder / f"{group}.wav", 0.1 * tones * np.exp(-0.3 * time), 8_000)
    vectors = Vectors(
        _near(_centres(1), groups, 2, 0.75),
        _near(_centres(3), (groups + np.arange(songs) // 8) % len(GENRES), 4, 0.6) if preference else None,
    )
    metadata = pa.table(
        {
            "audio_path": [str(folder / f"{group}.wav") for group in groups],
            "title": [title(i) for i in range(songs)],
            "artist": [ARTISTS[(i * 7) % 8] for i in range(songs)],
            "album": [
                "A very long album name that does not end where one would expect it to" if i % 9 == 0 else None
                for i in range(songs)
            ],
            "genre": pa.array([[GENRES[group]] for group in groups]),
            "mood": pa.array([[MOODS[i % 5]] for i in range(songs)]),
            "year": pa.array([1960 + i % 60 for i in range(songs)], pa.int32()),
        }
    )
    versions = VERSIONS if preference else {**VERSIONS, "preference": None}
    index = SongIndex.build(
        [song_id(i) for i in range(songs)], vectors, metadata=metadata, model_versions=dict(versions)
    )
    inputs = {"semantic": "model-semantic", "preference": "model-preference" if preference else None}
    made = Path(workspace.full(".scratch"))
    index.save(made, inputs=inputs, quality={"recall_at_10": 1.0})
    workspace.publish(made, "index/v1", index.manifest)
    return workspace


class PageBackend:
    """Text → the middle of the genres that it names; a recording → a place drawn from its length; bytes `bad…` are no
    audio.

    Of a text the ASCII letters are known.
    """

    def __init__(self, workspace: Workspace, settings: ServeSettings, preference: bool = True) -> None:
        versions = VERSIONS if preference else {**VERSIONS, "preference": None}
        self.live = LiveIndex(workspace, settings, versions)
        self.error: Exception | None = None

    async def encode_text(self, text: str) -> Vectors:
        if self.error:
            raise self.error
        named = [i for i, genre in enumerate(GENRES) if genre in text.lower()]
        rng = np.random.default_rng(sum(text.encode()))
        halves = [_centres(seed)[named].sum(axis=0) + 0.2 * rng.normal(size=DIM) for seed in (1, 3)]
        counted = [character for character in text if not character.isspace()]
        known = sum(character.isascii() for character in counted) / max(1, len(counted))
        return replace(self._vectors(halves), text_coverage=np.array([known]))

    async def encode_audio(self, data: bytes) -> Vectors:
        if data.startswith(b"bad"):
            raise AudioError(Reason.UNDECODABLE, "no decoder knows its format")
        if data.startswith(b"long"):
            raise AudioError(Reason.TOO_LONG, "it lasts 720 s; at most 600 s are heard")
        if self.error:
            raise self.error
        return self._vectors(list(np.random.default_rng(len(data)).normal(size=(2, DIM))))

    async def check_ready(self) -> None:
        return

    def _vectors(self, halves: list[np.ndarray]) -> Vectors:
        semantic, preference = (unit_norm(half[None]).astype(np.float32) for half in halves)
        return Vectors(semantic, preference if self.live.service.index.has_preference else None)


class Running:
    """The application on a port of its own, in a thread."""

    def __init__(self, backend: PageBackend, settings: ServeSettings) -> None:
        self.backend = backend
        self.requests: list[tuple[str, str]] = []
        self._settings = settings
        self._server: uvicorn.Server | None = None
        self.port = 0
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        listening = socket.socket()
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", self.port))
        self.port = listening.getsockname()[1]
        app = create_app(self.backend, self._settings)

        async def noted(scope, receive, send):
            """Keeps the requests, and responds with a request id, as Ray Serve does."""

            async def named(message):
                if message["type"] == "http.response.start":
                    MutableHeaders(scope=message).append("X-Request-ID", str(uuid.uuid4()))
                await send(message)

            if scope["type"] == "http":
                self.requests.append((scope["method"], scope["path"]))
            await app(scope, receive, named)

        config = uvicorn.Config(noted, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        while not self._server.started:
            threading.Event().wait(0.01)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


@contextmanager
def running(workspace: Workspace, preference: bool = True, **settings: object) -> Iterator[Running]:
    chosen = ServeSettings(**settings)
    server = Running(PageBackend(workspace, chosen, preference), chosen)
    try:
        yield server
    finally:
        server.stop()
