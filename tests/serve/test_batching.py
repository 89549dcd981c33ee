"""Requests that reach an encoder replica together are encoded together, and a broken one fails alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import serve

from htcl_ray.config import Config
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import AudioError
from htcl_ray.index.live.activation import Pointer, now
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.serving.deployments import Encoder, Served
from htcl_ray.workspace.storage import Workspace
from tests.worlds.small_workspace import sound, text_of, wav

pytestmark = pytest.mark.serve


class RecordingEncoder(Encoder):
    """The deployment, which also remembers how many it encoded at a time."""

    def __init__(self, served: Served, settings: ServeSettings) -> None:
        super().__init__(served, settings)
        self._sizes: list[int] = []
        original = self._encoder

        class Recording:
            recipe, takes_audio, audio_features = original.recipe, True, original.audio_features

            def encode_texts(recording, texts: list[str]) -> Any:
                self._sizes.append(len(texts))
                return original.encode_texts(texts)

            def encode_decoded(recording, mels: list[np.ndarray]) -> Any:
                self._sizes.append(len(mels))
                return original.encode_decoded(mels)

        self._encoder = Recording()

    async def sizes(self) -> list[int]:
        return self._sizes


@pytest.fixture
def replica(indexed: Config) -> Iterator[Any]:
    models = Path(indexed.workspace) / "models"
    versions = SongEncoder.load(models / "semantic/semantic-0", models / "preference/preference-0").model_versions
    served = Served(
        Workspace(indexed.workspace),
        Pointer("none", now()),
        "models/semantic/semantic-0",
        "models/preference/preference-0",
        versions,
    )
    settings = indexed.with_overrides({"serve.max_batch_size": 8, "serve.batch_wait_seconds": 0.5}).serve
    deployment = serve.deployment(RecordingEncoder, max_ongoing_requests=64)
    yield serve.run(deployment.bind(served, settings), name="batching", route_prefix=None)
    serve.shutdown()


def test_batches(replica: Any, indexed: Config):
    models = Path(indexed.workspace) / "models"
    encoder = SongEncoder.load(models / "semantic/semantic-0", models / "preference/preference-0")
    clips = [sound(i, indexed.audio) for i in range(12)]

    async def all_at_once() -> list[Any]:
        calls = [replica.encode_audio.remote(wav(clip, indexed.audio)) for clip in clips]
        calls += [replica.encode_audio.remote(b"not audio" * 50)]
        calls += [replica.encode_text.remote(text_of(i)) for i in range(12)]
        return await asyncio.gather(*calls, return_exceptions=True)

    responses = asyncio.run(all_at_once())
    sizes = replica.sizes.remote().result()
    assert sum(sizes) == 24
    assert 1 < max(sizes) <= 8
    assert isinstance(responses[12], AudioError)
    for i, clip in enumerate(clips):
        alone = encoder.encode_waveforms([clip])
        np.testing.assert_allclose(responses[i].semantic, alone.semantic, atol=1e-5)
        np.testing.assert_allclose(responses[i].preference, alone.preference, atol=1e-5)
        expected = encoder.encode_texts([text_of(i)])
        np.testing.assert_allclose(responses[13 + i].semantic, expected.semantic, atol=1e-5)
        assert responses[13 + i].text_coverage == pytest.approx(expected.text_coverage)
