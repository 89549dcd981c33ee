"""Long clips in windows: covered frames, and the mean of the vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from htcl_ray.models import HTCL
from htcl_ray.models.pooling import window_starts
from htcl_ray.models.record import InputRecipe
from htcl_ray.models.towers.vocabulary import train_wordpiece
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit

VOCABULARY = train_wordpiece(["calm piano at night", "fast techno"], 60)
WINDOW = 11
"""Frames of 1 s; a full clip of 3 s has 32."""


@pytest.fixture(scope="module")
def config() -> Config:
    return tiny_config("unused").with_overrides({"model.window_seconds": 1.0})


@pytest.fixture(scope="module")
def model(config: Config) -> HTCL:
    return HTCL.untrained(config, VOCABULARY)


@pytest.fixture(scope="module")
def whole(config: Config) -> HTCL:
    """The same weights without windows."""
    return HTCL.untrained(config.with_overrides({"model.window_seconds": None}), VOCABULARY)


def mels(lengths: list[int], bands: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips with NaN behind their valid frames."""
    mel = torch.from_numpy(np.random.default_rng(0).normal(-40, 12, (len(lengths), max(lengths), bands))).float()
    for clip, length in zip(mel, lengths, strict=True):
        clip[length:] = torch.nan
    return mel, torch.tensor(lengths)


@pytest.mark.parametrize("window", [1, 2, 5, 17, 50])
def test_fewest_evenly_spaced_windows_cover_every_frame(window: int):
    for frames in range(1, 160):
        starts = window_starts(frames, window)
        size = min(frames, window)
        assert starts[0] == 0
        assert starts[-1] + size == frames
        assert {frame for start in starts for frame in range(start, start + size)} == set(range(frames))
        assert (len(starts) - 1) * window < frames, "one window fewer would do"
        gaps = np.diff(starts)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1
    assert window_starts(1251, None) == [0]


def test_vector_is_the_normalised_mean_over_windows(model: HTCL, whole: HTCL, monkeypatch: pytest.MonkeyPatch):
    """Against one call for each window; cut by hand: 32 frames at 0, 10, 21, 22 at 0, 11, 23 at 0, 6, 12, and 11 or
    fewer whole."""
    assert (model.window_frames, whole.window_frames) == (WINDOW, None)
    mel, valid = mels([32, 4, 22, 11, 23])
    by_hand = [[0, 10, 21], [0], [0, 11], [0], [0, 6, 12]]
    encoded = []
    original = model.encode_audio
    monkeypatch.setattr(model, "encode_audio", lambda part, frames: encoded.append(len(part)) or original(part, frames))
    actual = model.embed_features(mel, valid, batch_size=4)
    assert encoded == [4, 4, 2]
    for clip, (starts, length) in enumerate(zip(by_hand, valid.tolist(), strict=True)):
        windows = [
            whole.embed_mel(mel[clip : clip + 1, start : min(start + WINDOW, length)])[0].double().numpy()
            for start in starts
        ]
        mean = np.mean(windows, axis=0)
        np.testing.assert_allclose(actual[clip].numpy(), mean / np.linalg.norm(mean), atol=2e-6)
    assert torch.equal(actual, model.embed_features(mel, valid, batch_size=4))


def test_short_clips_are_untouched(model: HTCL, whole: HTCL):
    mel, valid = mels([11, 3, 7])
    assert torch.equal(model.embed_mel(mel, valid), whole.embed_mel(mel, valid))
    assert model.embed_mel(mel[:0], valid[:0]).shape == (0, model.dim)


def test_audio_is_embedded_in_the_same_windows(model: HTCL, whole: HTCL, config: Config):
    from htcl_ray.audio import log_mel

    waveform = (
        np.random.default_rng(1).normal(0, 0.1, 5 * config.audio.sample_rate).astype(np.float32)
    )  # 5 s, of which 3 are used
    mel = torch.from_numpy(log_mel(waveform[: config.audio.max_samples], config.audio.sample_rate, config.audio))
    mean = sum(whole.embed_mel(mel[None, start : start + WINDOW])[0] for start in (0, 10, 21))
    torch.testing.assert_close(
        model.embed_audio(waveform, config.audio.sample_rate), mean / mean.norm(), atol=2e-6, rtol=0
    )


def test_the_window_belongs_to_the_checkpoint(model: HTCL, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model"]["window_seconds"] == 1.0
    loaded = HTCL.from_pretrained(tmp_path / "model")
    mel, valid = mels([32, 20])
    assert torch.equal(loaded.embed_mel(mel, valid), model.embed_mel(mel, valid))
    assert loaded.to_stage_2(0.1, seed=0).window_frames == WINDOW


def test_checkpoints_without_window_embed_whole_clips(whole: HTCL, tmp_path: Path):
    whole.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    tree = json.loads(file.read_text())
    del tree["model"]["window_seconds"]
    file.write_text(json.dumps(tree))
    assert HTCL.from_pretrained(tmp_path / "model").window_frames is None


def test_official_input_refuses_windows(config: Config):
    with pytest.raises(
        ConfigError, match=r"model\.window_seconds is 1, but the official input recipe takes full clips"
    ):
        HTCL.untrained(config, VOCABULARY, InputRecipe.OFFICIAL)
