"""Frozen towers: what does not move, what still learns, and that gradients stay exact."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from htcl_ray.config import Config
from htcl_ray.config.sections import FinetuneSettings
from htcl_ray.errors import ConfigError
from htcl_ray.models import HTCL
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.augment import Augmentation
from htcl_ray.training.batches import Batch, BatchLoader, encode
from htcl_ray.training.checkpoint import load_state
from htcl_ray.training.features import open_frames
from htcl_ray.training.loop import train
from htcl_ray.training.micro_batch import compute_gradients
from htcl_ray.training.optimization import build_optimizer, compile_towers, freeze
from htcl_ray.training.song_numbers import Pairs, read_songs
from htcl_ray.training.stage_tasks import finetune_task, pretrain_task
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config, write_features

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
TEXTS = [f"calm piano {number % 3} at night {number}" for number in range(8)]
CONFIG = tiny_config("unused").with_overrides({"model.layers": 3, "model.dropout": 0.0, "text.dropout": 0.0})
FREEZES: list[dict[str, object]] = [
    {"freeze_text": True},
    {"freeze_audio_layers": 1},
    {"freeze_text": True, "freeze_audio_layers": 3},
    {"learn_temperature": False},
]


def build() -> HTCL:
    return HTCL.untrained(CONFIG, train_wordpiece(TEXTS, 60)).to_stage_2(0.1, seed=1).double().train()


def batch(model: HTCL) -> Batch:
    random = np.random.default_rng(0)
    valid = torch.tensor([32, 5, 17, 20, 9, 31, 8, 12])
    mel = torch.from_numpy(random.normal(-40, 12, (8, 32, 16)))
    return Batch(mel, valid, model.text_encoder.tokenize(TEXTS), torch.arange(8)[:, None].repeat(1, 3))


def stays(name: str, changes: dict[str, object]) -> bool:
    """Whether a parameter is frozen, by its name."""
    if name.startswith("logit_scale."):
        return not changes.get("learn_temperature", True)
    if name.startswith("text_encoder."):
        return bool(changes.get("freeze_text"))
    layers = int(str(changes.get("freeze_audio_layers", 0)))
    if not name.startswith("audio_encoder.") or layers == 0:
        return False
    return not name.startswith("audio_encoder.layers.") or int(name.split(".")[2]) < layers


def gradients(
    changes: dict[str, object], micro_batch_size: int | None
) -> tuple[HTCL, FinetuneSettings, dict[str, torch.Tensor | None]]:
    settings = CONFIG.finetune.model_copy(update={"rehearsal_songs_per_pair": 0, **changes})
    model = build()
    freeze(model, settings)
    none = np.empty((0, 2), dtype=np.int64)
    pairs = Pairs(np.arange(8).reshape(2, 4).T, np.ones(4), none, 0, none, np.ones(0), 0)
    compute_gradients(model, batch(model), finetune_task(pairs, np.arange(8), settings, CPU), micro_batch_size)
    return model, settings, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def everything() -> dict[str, torch.Tensor | None]:
    """Gradients with nothing frozen, one pass."""
    return gradients({}, None)[2]


@pytest.mark.parametrize("changes", FREEZES)
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
def test_what_learns_has_the_gradient_that_it_had(
    everything: dict[str, torch.Tensor | None], changes: dict[str, object], micro_batch_size: int | None
):
    """Freezing one part changes no other part's gradient, in one pass or two; frozen parts have none, and no optimizer
    state."""
    model, settings, actual = gradients(changes, micro_batch_size)
    largest = max(gradient.abs().max().item() for gradient in everything.values() if gradient is not None)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, settings.model_copy(update={"weight_decay": 0.1}))
    optimizer.step()
    in_groups = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in model.named_parameters():
        gradient, expected = actual[name], everything[name]
        assert expected is not None
        if stays(name, changes):
            assert gradient is None, name
            assert parameter not in in_groups | set(optimizer.state), name
            assert torch.equal(parameter, before[name]), name
        else:
            assert gradient is not None, name
            assert (gradient - expected).abs().max().item() <= 1e-12 * largest, name
            assert parameter in optimizer.state, name


def test_freezing_follows_the_settings_alone():
    model = build()
    freeze(model, CONFIG.finetune.model_copy(update={"freeze_text": True, "freeze_audio_layers": 3}))
    heads = {name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert heads == {"audio_head", "text_head", "fusion", "logit_scale"}
    freeze(model, CONFIG.finetune.model_copy(update={"learn_temperature": False}))
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == {
        f"logit_scale.{term}" for term in ("text", "preference", "fusion")
    }
    freeze(model, CONFIG.finetune)
    assert all(parameter.requires_grad for parameter in model.parameters())


FREEZE_BOTH: dict[str, object] = {"freeze_text": True, "freeze_audio_layers": 1}


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A loop with everything at once: crops, masks, frozen parts, probed micro-batches, weight decay; two steps an
    epoch."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    stage = {
        "micro_batch_size": "auto",
        "weight_decay": 0.1,
        "epochs": 2,
        "time_masks": 1,
        "mel_masks": 1,
        "mel_mask_bands": 4,
    }
    stage |= {"checkpoint_every_steps": 1, **FREEZE_BOTH}
    return tiny_config(tmp_path / "workspace").with_overrides(
        {"model.layers": 2, "model.window_seconds": 1.5, **{f"pretrain.{key}": value for key, value in stage.items()}}
    )


def test_frozen_parts_are_bit_identical_after_training(config: Config):
    model, loader = _world(config)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    train(
        model,
        pretrain_task(loader.songs, config.pretrain),
        loader,
        config.pretrain,
        CPU,
        on_checkpoint=lambda *_: None,
        say=print,
    )
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == stays(name, FREEZE_BOTH), name


def test_a_resumed_run_crops_masks_and_splits_alike(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """From within an epoch. The micro-batch is the checkpoint's: memory that is free now may be more or less."""
    model, loader = _world(config)
    task = pretrain_task(loader.songs, config.pretrain)
    monkeypatch.setattr("htcl_ray.training.loop.probe_micro_batch_size", lambda *_: 4)
    train(
        *(model, task, loader, config.pretrain, CPU),
        on_checkpoint=lambda metrics, step, save: save(tmp_path / f"step-{step}"),
        say=print,
    )
    resumed, state = HTCL.from_pretrained(tmp_path / "step-3"), load_state(tmp_path / "step-3")
    assert state.micro_batch_size == 4
    monkeypatch.setattr("htcl_ray.training.loop.probe_micro_batch_size", lambda *_: 1 / 0)
    train(resumed, task, loader, config.pretrain, CPU, on_checkpoint=lambda *_: None, say=print, resume=state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def _world(config: Config) -> tuple[HTCL, BatchLoader]:
    workspace = Workspace(config.workspace)
    path = write_features(config)
    songs, manifest = read_songs(workspace, path), workspace.manifest(path)
    assert manifest is not None
    model = HTCL.untrained(config, train_wordpiece(songs.texts, 100))
    augmentation = Augmentation(config.pretrain, model.window_frames)
    return model, BatchLoader(songs, open_frames(workspace, path, manifest, songs), model.text_encoder, augmentation)


def test_compile_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="has no 'no-such-compiler'; install one or set compile to false"):
        compile_towers(build(), batch(build()), CPU, print)


def test_towers_that_cannot_be_compiled_run_as_they_are(monkeypatch: pytest.MonkeyPatch):
    def fails(*arguments: object, **options: object) -> None:
        raise AssertionError("planted")

    model, said = build(), []
    expected = encode(build().eval(), batch(model))
    monkeypatch.setattr("torch._inductor.graph.GraphLowering.codegen", fails)
    compile_towers(model, batch(model), CPU, said.append)
    assert len(said) == 1
    assert "cannot compile the towers (AssertionError: planted)" in said[0].replace("InductorError: ", "")
    assert all(torch.equal(*pair) for pair in zip(encode(model.eval(), batch(model)), expected, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
