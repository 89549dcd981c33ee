"""The 2-D convolutional tower against loops over channels and cells, one clip at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from htcl_ray.config.sections import AudioSettings, ModelSettings
from htcl_ray.models.record import ModelRecord
from htcl_ray.models.towers.cnn import EPSILON, CnnTower

pytestmark = pytest.mark.unit


def tower(bands: int, channels: tuple[int, ...]) -> CnnTower:
    torch.manual_seed(0)
    model = ModelSettings().model_copy(update={"cnn": ModelSettings().cnn.model_copy(update={"channels": channels})})
    built = CnnTower(ModelRecord(stage=1, audio=AudioSettings(tower="cnn", n_mels=bands), model=model, text=None))
    for name, parameter in built.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.3)
    return built.double()


def reference(built: CnnTower, mel: np.ndarray) -> np.ndarray:
    """One clip [frames, bands], nothing padded but the borders of each convolution."""
    state = {name: tensor.numpy() for name, tensor in built.state_dict().items()}
    x = ((mel - mel.mean()) / (mel.std() + 1e-8))[None]
    for block in range(len(built.blocks)):
        kernels = state[f"blocks.{block}.convolution.weight"]
        bordered = np.pad(x, ((0, 0), (1, 1), (1, 1)))
        convolved = np.zeros((len(kernels), *x.shape[1:]))
        for output, kernel in enumerate(kernels):
            centred = kernel - kernel.mean()
            centred /= np.sqrt((centred**2).sum() + EPSILON)
            for i in range(3):
                for j in range(3):
                    cells = bordered[:, i : i + x.shape[1], j : j + x.shape[2]]
                    convolved[output] += np.tensordot(centred[:, i, j], cells, axes=1)
        normed = (convolved - convolved.mean()) / np.sqrt(convolved.var() + EPSILON)
        gain, bias = (state[f"blocks.{block}.norm.{name}"][:, None, None] for name in ("weight", "bias"))
        active = np.maximum(normed * gain + bias, 0)
        frames, bands = active.shape[1:]
        x = np.zeros((len(active), -(-frames // 2), -(-bands // 2)))
        for t in range(x.shape[1]):
            for m in range(x.shape[2]):
                x[:, t, m] = active[:, 2 * t : 2 * t + 2, 2 * m : 2 * m + 2].mean(axis=(1, 2))
    pooled = x.mean(axis=2)
    both = np.concatenate([pooled.mean(axis=1), pooled.max(axis=1)])
    return state["projection.weight"] @ both + state["projection.bias"]


@pytest.mark.parametrize(("bands", "channels"), [(16, (4, 6)), (11, (3, 5, 4)), (1, (2,))])
def test_equals_loops_over_cells(bands: int, channels: tuple[int, ...]):
    """Alone, in a batch of other lengths, and behind padding that is no number."""
    built, random = tower(bands, channels), np.random.default_rng(0)
    counts = [1, 2, 3, 5, 8, 13, 21]
    clips = [random.normal(-40, 15, (count, bands)) for count in counts]
    batch = torch.full((len(clips), 26, bands), torch.nan, dtype=torch.float64)
    for row, clip in enumerate(clips):
        batch[row, : len(clip)] = torch.from_numpy(clip)
    with torch.no_grad():
        together = built(batch, torch.tensor(counts)).numpy()
        for row, clip in enumerate(clips):
            alone = built(torch.from_numpy(clip)[None], torch.tensor([len(clip)])).numpy()[0]
            expected = reference(built, clip)
            np.testing.assert_allclose(alone, expected, atol=1e-9)
            np.testing.assert_allclose(together[row], expected, atol=1e-9)


def test_has_a_tenth_of_a_million_parameters():
    built = CnnTower(ModelRecord(stage=1, audio=AudioSettings(tower="cnn"), model=ModelSettings(), text=None))
    assert 90_000 < sum(parameter.numel() for parameter in built.parameters()) < 150_000


def test_a_shift_in_pitch_shifts_the_maps_of_the_blocks():
    """Inside the bands, moving a clip by as many bands as a cell of the last map is wide moves that map by one cell."""
    built = tower(64, (4, 6))
    mel = np.full((24, 64), -60.0)
    mel[:, 24:32] = np.random.default_rng(0).normal(-20, 5, (24, 8))
    maps = []
    for shift in (0, 4):
        x = torch.from_numpy((np.roll(mel, shift, axis=1) - mel.mean()) / mel.std())[None, None]
        for block in built.blocks:
            x = block(x, None)
        maps.append(x)
    torch.testing.assert_close(maps[1][:, :, :, 4:12], maps[0][:, :, :, 3:11], atol=1e-9, rtol=0)
    assert (maps[0] - maps[1]).abs().max() > 0.1


def test_half_precision_does_not_overflow_the_statistics():
    """Statistics of a clip are sums over tens of thousands of cells; they are added in fp32."""
    built, random = tower(64, (4, 6)), np.random.default_rng(0)
    mel = torch.from_numpy(random.normal(-40, 15, (2, 300, 64)))
    counts = torch.tensor([300, 201])
    with torch.no_grad():
        expected = built(mel, counts)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = built.float()(mel.float(), counts)
    cosine = torch.nn.functional.cosine_similarity(actual.double(), expected, dim=1)
    assert (cosine > 0.999).all()
