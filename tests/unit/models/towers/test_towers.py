"""What every audio tower must hold: its declarations, and that neither padding nor the batch changes a vector."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htcl_ray.config import resolve
from htcl_ray.config.sections import AudioSettings, StageSettings
from htcl_ray.errors import AudioError, ConfigError, InputError
from htcl_ray.models import HTCL
from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.base import AudioTower
from htcl_ray.models.towers.registry import TOWERS, tower_class
from htcl_ray.models.towers.text import NoTextEncoder
from htcl_ray.training.optimization import freeze
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit

WIDTH = 12
"""Mel bands, or numbers of a vector."""
FRAMES = {"transformer": 60, "cnn": 60, "mlp": 9, "window_transformer": 9, "residual": 9}
"""Most frames of a song, by tower."""


def record(tower: str) -> ModelRecord:
    extractor = TOWERS[tower].extractors[0]
    config = tiny_config("unused").with_overrides(
        {"audio.extractor": extractor, "audio.tower": tower, "audio.n_mels": WIDTH, "model.layers": 2, "model.dim": 32}
    )
    return ModelRecord(stage=1, audio=config.audio, model=config.model, feature_width=WIDTH, text=None)


@pytest.fixture(params=TOWERS)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tower(name: str) -> AudioTower:
    torch.manual_seed(0)
    return tower_class(name)(record(name)).double().eval()


def song(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(-40, 15, (1, frames, WIDTH)))


def lengths(name: str) -> list[int]:
    most = FRAMES[name]
    return sorted({1, 2, 3, 7, 8, 9, 16, 17, 33, most} & set(range(1, most + 1)))


def test_padding_changes_nothing(name: str, tower: AudioTower):
    for valid in lengths(name):
        alone = tower(song(valid), torch.tensor([valid]))
        assert alone.shape == (1, tower.width)
        for padding in (1, 2, 8, 31, 200):
            rubbish = torch.full((1, padding, WIDTH), torch.nan, dtype=torch.float64)
            padded = tower(torch.cat([song(valid), rubbish], dim=1), torch.tensor([valid]))
            torch.testing.assert_close(padded, alone, atol=1e-10, rtol=0)


def test_other_rows_change_nothing(name: str, tower: AudioTower):
    counts = lengths(name)
    batch = torch.full((len(counts), max(counts), WIDTH), torch.nan, dtype=torch.float64)
    for row, valid in enumerate(counts):
        batch[row, :valid] = song(valid, row)[0]
    together = tower(batch, torch.tensor(counts))
    for row, valid in enumerate(counts):
        alone = tower(song(valid, row), torch.tensor([valid]))
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-10, rtol=0)


def test_gradients_do_not_depend_on_padding(name: str, tower: AudioTower):
    valid = lengths(name)[-1]
    grads = []
    for padding in (0, 9):
        tower.zero_grad()
        padded = torch.cat([song(valid), torch.full((1, padding, WIDTH), torch.nan, dtype=torch.float64)], dim=1)
        tower(padded, torch.tensor([valid])).square().sum().backward()
        grads.append({key: weight.grad for key, weight in tower.named_parameters()})
    for key, expected in grads[0].items():
        assert expected is not None, key
        torch.testing.assert_close(grads[1][key], expected, atol=1e-9 * float(expected.abs().max() + 1e-6), rtol=0)


def test_every_valid_frame_changes_the_vector(name: str, tower: AudioTower):
    for valid in lengths(name):
        baseline = tower(song(valid), torch.tensor([valid]))
        for frame in {0, valid // 2, valid - 1}:
            changed = song(valid)
            changed[0, frame, : WIDTH // 2] += 30
            assert (tower(changed, torch.tensor([valid])) - baseline).abs().max() > 1e-5, f"frame {frame} of {valid}"


def test_constant_features_are_finite(name: str, tower: AudioTower):
    valid = lengths(name)[-1]
    for level in (-100.0, 0.0):
        assert torch.isfinite(tower(torch.full((1, valid, WIDTH), level), torch.tensor([valid]))).all()


def test_layer_groups_hold_every_parameter_once(name: str, tower: AudioTower):
    groups = tower.layer_groups()
    grouped = [id(parameter) for group in groups for parameter in group]
    assert sorted(grouped) == sorted(map(id, tower.parameters()))
    assert len(groups) == 1 + record(name).model.layers_of(name)
    assert all(groups[1:]), "a layer without parameters"


def test_compile_parts_are_modules_of_the_tower(tower: AudioTower):
    assert set(tower.compile_parts()) <= set(tower.modules())


def test_freezing_takes_groups_from_the_input_on(name: str):
    model = HTCL(record(name), NoTextEncoder())
    groups = model.audio_encoder.layer_groups()
    for layers in range(len(groups)):
        freeze(model, StageSettings(freeze_audio_layers=layers))
        frozen = {id(weight) for weight in model.audio_encoder.parameters() if not weight.requires_grad}
        assert frozen == {id(weight) for group in groups[: layers + 1 if layers else 0] for weight in group}


def test_the_tower_survives_a_model_folder(name: str, tmp_path):
    model = HTCL(record(name), NoTextEncoder()).eval()
    model.record = model.record.model_copy(
        update={"model": model.record.model.model_copy(update={"dim": model.audio_encoder.width})}
    )
    model.save_pretrained(tmp_path / "model")
    loaded = HTCL.from_pretrained(tmp_path / "model")
    valid = lengths(name)[-1]
    assert torch.equal(loaded.embed_features(song(valid)), model.embed_features(song(valid)))
    assert loaded.record.audio.tower_name == name


# ------------------------------------------------------------------- configuration


def test_features_do_not_depend_on_the_tower():
    paper = resolve("paper").audio
    assert paper.tower is None
    assert paper.tower_name == "transformer"
    assert paper.resolved().recipe == paper.recipe
    assert "tower" not in paper.recipe.model_dump()
    assert paper.resolved().tower == "transformer"


def test_every_extractor_has_a_tower():
    for extractor, expected in (("log_mel", "transformer"), ("pretrained", "window_transformer"), ("vectors", "mlp")):
        audio = AudioSettings.model_validate({"extractor": extractor})
        assert audio.tower_name == expected
        assert audio.resolved().tower == expected


def test_a_tower_of_another_extractor_is_refused():
    with pytest.raises(ConfigError, match=r"tower is transformer, which does not .* vectors; expected one of mlp, w"):
        resolve("paper", None, ["audio.extractor=vectors", "audio.tower=transformer"])


def test_an_extractor_unsets_the_tower_of_an_earlier_layer():
    config = resolve("paper", None, ["audio.tower=transformer"])
    assert config.with_overrides({"audio.extractor": "log_mel"}).audio.tower == "transformer"
    assert config.with_overrides({"pretrain.epochs": 2}).audio.tower == "transformer"
    assert config.with_overrides({"audio.extractor": "vectors"}).audio.tower is None


def test_windows_are_refused_for_other_features():
    with pytest.raises(ConfigError, match=r"model\.window_seconds is 3, but only log-mel frames are cut"):
        resolve("paper", None, ["audio.extractor=vectors", "model.window_seconds=3"])


# ------------------------------------------------------------- statistics of the input


@pytest.mark.parametrize("name", ["mlp", "window_transformer"])
def test_input_statistics_against_numpy(name: str):
    """Over valid frames of all songs; computed once; a constant number is not blown up."""
    random = np.random.default_rng(0)
    features = random.normal(5, 3, (6, 4, WIDTH)) * np.geomspace(0.1, 100, WIDTH)
    features[:, :, 3] = 7.0
    valid = np.array([4, 1, 2, 3, 4, 2])
    frames = np.concatenate([features[row, :count] for row, count in enumerate(valid)])
    features[np.arange(4) >= valid[:, None]] = np.nan
    tower = tower_class(name)(record(name)).double()
    batches = [(torch.from_numpy(features[rows]), torch.from_numpy(valid[rows])) for rows in ([0, 1, 2, 3], [4, 5])]
    tower.fit_input(batches)
    state = tower.state_dict()
    np.testing.assert_allclose(state["standardisation.mean"], frames.mean(axis=0))
    varying = np.arange(WIDTH) != 3
    np.testing.assert_allclose(state["standardisation.deviation"][varying], frames.std(axis=0)[varying])
    assert state["standardisation.deviation"][3] == pytest.approx(1e-4 * frames.std(axis=0).max())
    tower.fit_input([(torch.ones(1, 1, WIDTH).double(), torch.tensor([1]))])  # a second stage keeps them
    np.testing.assert_allclose(tower.state_dict()["standardisation.mean"], frames.mean(axis=0))


def test_the_residual_tower_against_numpy():
    """The mean of unit-norm vectors, and what its MLP adds times the gate; a new tower gives the mean."""
    tower = tower_class("residual")(record("residual")).double().eval()
    features, valid = song(5), 3
    unit = features[0, :valid].numpy()
    mean = (unit / np.linalg.norm(unit, axis=1, keepdims=True)).mean(axis=0)
    np.testing.assert_allclose(tower(features, torch.tensor([valid]))[0].detach(), mean, atol=1e-12)
    with torch.no_grad():
        tower.gate.copy_(torch.linspace(-1, 1, WIDTH))
    weights = {name: weight.detach().numpy() for name, weight in tower.named_parameters()}
    hidden = np.maximum(weights["layers.0.weight"] @ mean + weights["layers.0.bias"], 0)
    change = weights["layers.1.weight"] @ hidden + weights["layers.1.bias"]
    expected = mean + np.linspace(-1, 1, WIDTH) * change
    np.testing.assert_allclose(tower(features, torch.tensor([valid]))[0].detach(), expected, atol=1e-7)


def test_models_of_vectors_refuse_audio():
    model = HTCL(record("mlp"), NoTextEncoder()).eval()
    with pytest.raises(InputError, match="this model takes no audio, because it was trained on given vectors"):
        model.embed_audio(np.zeros(16000), 16000)
    with pytest.raises(InputError, match=r"embed_mel takes log-mel frames, but"):
        model.embed_mel(song(3))
    with pytest.raises(InputError, match=r"the features tensor is torch.float32 \[1, 2, 5\]; .* \[batch, frames, 12\]"):
        model.embed_features(torch.zeros(1, 2, 5))
    with pytest.raises(AudioError, match=r"the features tensor of song 0 holds NaN, or values beyond"):
        model.embed_features(song(3) * torch.inf)
