"""The audio tower: the paper's size, and what padding and neighbours must not do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htcl_ray.config.sections import AudioSettings, ModelSettings
from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.transformer import TransformerTower, masked_input, official_input

pytestmark = pytest.mark.unit

SMALL = ModelSettings(
    conv_channels=16, width=32, layers=2, heads=4, feed_forward=64, position_kernel=5, position_groups=4
)
RECIPE = AudioSettings(n_mels=8)
RECORD = ModelRecord(stage=1, audio=RECIPE, model=SMALL, text=None)


@pytest.fixture
def encoder() -> TransformerTower:
    torch.manual_seed(0)
    return TransformerTower(RECORD).eval()


def clip(frames: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(-40, 15, (1, frames, RECIPE.n_mels))).float()


def test_full_size_has_the_papers_parameters():
    with torch.device("meta"):
        encoder = TransformerTower(ModelRecord(stage=1, audio=AudioSettings(), model=ModelSettings(), text=None))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 88_500_511


@pytest.mark.parametrize("valid", [1, 7, 8, 9, 16, 17, 24, 25, 100])
def test_padding_further_changes_nothing(encoder: TransformerTower, valid: int):
    mel = clip(valid)
    alone = encoder(mel, torch.tensor([valid]))
    for padding in (1, 8, 30, 200):
        rubbish = torch.full((1, padding, RECIPE.n_mels), torch.nan)
        padded = encoder(torch.cat([mel, rubbish], dim=1), torch.tensor([valid]))
        torch.testing.assert_close(padded, alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("valid", [1, 5, 17, 40])
def test_longer_neighbours_change_nothing(encoder: TransformerTower, valid: int):
    alone = encoder(clip(valid), torch.tensor([valid]))
    batch = torch.zeros(3, 203, RECIPE.n_mels)
    batch[0, :valid], batch[1], batch[2, :90] = clip(valid)[0], clip(203, 1)[0], clip(90, 2)[0]
    together = encoder(batch, torch.tensor([valid, 203, 90]))
    torch.testing.assert_close(together[:1], alone, atol=2e-6, rtol=0)


def test_every_valid_frame_changes_the_vector(encoder: TransformerTower):
    mel = clip(43)
    baseline = encoder(mel, torch.tensor([43]))
    for frame in (0, 20, 42):
        changed = mel.clone()
        changed[0, frame] += 30
        assert (encoder(changed, torch.tensor([43])) - baseline).abs().max() > 1e-4, f"frame {frame} has no effect"


def test_masked_input_against_numpy():
    valid = [20, 3]
    mel = torch.cat([clip(30, 0), clip(30, 1)])
    frames, tokens = masked_input(mel, torch.tensor(valid))
    assert frames.shape == (2, 8 * 2 + 17, RECIPE.n_mels)
    assert tokens is not None
    assert tokens.tolist() == [[True, True, True], [True, False, False]]
    for row, count in enumerate(valid):
        inside = mel[row, :count].numpy().astype(np.float64)
        expected = (inside - inside.mean()) / (inside.std() + 1e-8)
        np.testing.assert_allclose(frames[row, :count].numpy(), expected, atol=1e-5)
        assert (frames[row, count:] == 0).all()


def test_silence_is_finite(encoder: TransformerTower):
    assert torch.isfinite(encoder(torch.full((1, 40, RECIPE.n_mels), -100.0), torch.tensor([40]))).all()


def test_official_input_against_numpy():
    mel = torch.cat([clip(30, 0), clip(30, 1)])
    frames, tokens = official_input(mel, torch.tensor([30, 12]), frames=25, top_db=80.0)
    assert tokens is None
    for row, count in enumerate((25, 12)):
        inside = mel[row, : [30, 12][row]].numpy().astype(np.float64)[:25]
        padded = np.full((25, RECIPE.n_mels), inside.max() - 80)
        padded[:count] = inside[:count]
        np.testing.assert_allclose(frames[row].numpy(), (padded - padded.mean()) / (padded.std() + 1e-8), atol=1e-5)


def test_dropout_only_when_training(encoder: TransformerTower):
    mel, valid = clip(60), torch.tensor([60])
    assert torch.equal(encoder(mel, valid), encoder(mel, valid))
    encoder.train()
    assert not torch.equal(encoder(mel, valid), encoder(mel, valid))


def test_layer_equals_torch():
    """One layer with the weights of nn.TransformerEncoderLayer gives its numbers, masked and not."""
    reference = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, activation="gelu", batch_first=True)
    torch.manual_seed(0)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    without_dropout = SMALL.model_copy(update={"dropout": 0.0})
    layer = TransformerTower(RECORD.model_copy(update={"model": without_dropout})).layers[0]
    names = {
        "attention_in": reference.self_attn.in_proj_weight,
        "attention_out": reference.self_attn.out_proj.weight,
        "feed_in": reference.linear1.weight,
        "feed_out": reference.linear2.weight,
        "attention_norm": reference.norm1.weight,
        "feed_norm": reference.norm2.weight,
    }
    biases = {
        "attention_in": reference.self_attn.in_proj_bias,
        "attention_out": reference.self_attn.out_proj.bias,
        "feed_in": reference.linear1.bias,
        "feed_out": reference.linear2.bias,
        "attention_norm": reference.norm1.bias,
        "feed_norm": reference.norm2.bias,
    }
    state = {f"{name}.weight": tensor for name, tensor in names.items()} | {
        f"{name}.bias": tensor for name, tensor in biases.items()
    }
    layer.load_state_dict(state)
    x, valid = torch.randn(2, 9, 32), torch.tensor([[True] * 9, [True] * 5 + [False] * 4])
    torch.testing.assert_close(layer(x, None), reference(x), atol=1e-5, rtol=1e-5)
    masked = reference(x, src_key_padding_mask=~valid)
    torch.testing.assert_close(layer(x, valid[:, None, None, :])[valid], masked[valid], atol=1e-5, rtol=1e-5)
