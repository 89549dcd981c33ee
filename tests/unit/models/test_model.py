"""The HTCL model: embeddings, its folder on disk, and what stage 2 takes over from stage 1."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from htcl_ray.audio import log_mel
from htcl_ray.config import Config
from htcl_ray.errors import AudioError, InputError, MismatchError, WorkspaceError
from htcl_ray.models import HTCL, weights_fingerprint
from htcl_ray.models.record import InputRecipe
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.search.encoder import SongEncoder
from htcl_ray.workspace.manifest import build_manifest, file_sha256
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit

TEXTS = ["calm piano at night", "fast techno", "slow choir in minor", "calm techno"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return tiny_config(tmp_path_factory.mktemp("workspace"))


@pytest.fixture
def model(config: Config) -> HTCL:
    return HTCL.untrained(config, train_wordpiece(TEXTS, 60))


def mels(config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    frames = config.audio.max_frames
    return torch.from_numpy(np.random.default_rng(0).normal(-40, 10, (3, frames, config.audio.n_mels))), torch.tensor(
        [frames, 20, 3]
    )


def test_embeddings_are_unit_norm_and_evaluated(model: HTCL, config: Config):
    """Whatever mode the model is in: float32, unit norm, no gradient, dropout off, and the mode is left as it was."""
    mel, valid = mels(config)
    model.train()
    for embed in (lambda: model.embed_mel(mel, valid), lambda: model.embed_text(TEXTS)):
        first, second = embed(), embed()
        assert torch.equal(first, second)
        assert first.dtype == torch.float32
        assert first.shape == (len(first), model.dim)
        assert not first.requires_grad
        torch.testing.assert_close(first.norm(dim=1), torch.ones(len(first)))
    assert model.training


def test_embeddings_do_not_depend_on_the_batch(model: HTCL, config: Config):
    mel, valid = mels(config)
    together = model.embed_mel(mel, valid)
    for row, frames in enumerate(valid.tolist()):
        torch.testing.assert_close(model.embed_mel(mel[row : row + 1, :frames])[0], together[row], atol=1e-6, rtol=0)
    texts = model.embed_text(TEXTS)
    for row, text in enumerate(TEXTS):
        torch.testing.assert_close(model.embed_text([text])[0], texts[row], atol=1e-6, rtol=0)
    assert model.embed_text([]).shape == (0, model.dim)


def test_embed_audio_is_log_mel_then_embed_mel(model: HTCL, config: Config):
    waveform = np.random.default_rng(0).normal(0, 0.1, 2 * config.audio.sample_rate).astype(np.float32)
    expected = model.embed_mel(torch.from_numpy(log_mel(waveform, config.audio.sample_rate, config.audio))[None])[0]
    torch.testing.assert_close(model.embed_audio(waveform, config.audio.sample_rate), expected)
    torch.testing.assert_close(model.embed_audio(np.stack([waveform, waveform]), config.audio.sample_rate), expected)
    long = np.concatenate([waveform, waveform[: config.audio.sample_rate], waveform])
    cut = long[: config.audio.max_samples]
    torch.testing.assert_close(
        model.embed_audio(long, config.audio.sample_rate), model.embed_audio(cut, config.audio.sample_rate)
    )


@pytest.mark.parametrize(
    ("shape", "valid", "message"),
    [
        ((2, 10, 7), None, "expected \\[batch, frames, 16\\]"),
        ((2, 10, 16), [10, 11], "from 1 to 10"),
        ((2, 10, 16), [0, 1], "from 1 to 10"),
    ],
)
def test_wrong_mels_are_refused(model: HTCL, shape: tuple[int, ...], valid: list[int] | None, message: str):
    with pytest.raises(InputError, match=message):
        model.embed_mel(torch.zeros(shape), None if valid is None else torch.tensor(valid))


T = np.sin(np.arange(32_000) * 0.17).astype(np.float32) * 0.3
NOT_WAVEFORMS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "samples, channels": (
        np.stack([T, T], axis=1),
        16000,
        InputError,
        "32,000 channels of 2 samples; expected .*waveform.T",
    ),
    "one column": (T[:, None], 16000, InputError, "32,000 channels of 1 samples"),
    "tensor, transposed": (
        torch.from_numpy(T)[:, None].expand(-1, 2),
        16000,
        InputError,
        "32,000 channels of 2 samples",
    ),
    "empty": (np.zeros(0, np.float32), 16000, AudioError, "no sample"),
    "no channel": (np.zeros((0, 16000), np.float32), 16000, AudioError, "no sample"),
    "an empty list": ([], 16000, AudioError, "no sample"),
    "too short": (T[:1599], 16000, AudioError, "0.100 s long"),
    "NaN": (np.where(np.arange(32_000) == 7, np.nan, T), 16000, AudioError, "NaN"),
    "infinite": (np.where(np.arange(32_000) == 7, np.inf, T), 16000, AudioError, "NaN"),
    "1e30": (T * np.float32(1e30), 16000, AudioError, "beyond ±1,000,000"),
    "1e300 in doubles": (T.astype(np.float64) * 1e300, 16000, AudioError, "beyond ±1,000,000"),
    "one channel of two is NaN": (np.stack([T, np.full_like(T, np.nan)]), 16000, AudioError, "NaN"),
    "integers": ((T * 32767).astype(np.int16), 16000, InputError, "int16"),
    "booleans": (T > 0, 16000, InputError, "bool"),
    "complex": (T.astype(np.complex64), 16000, InputError, "complex64"),
    "text": (np.array(["a", "b"]), 16000, InputError, "<U1"),
    "nothing": (None, 16000, InputError, "object"),
    "ragged": ([[0.0, 0.1], [0.2]], 16000, InputError, "no array"),
    "three dimensions": (T[None, None], 16000, InputError, r"\[1, 1, 32000\]"),
    "a number": (np.float32(0.5), 16000, InputError, r"\[\]"),
    **{
        f"rate {rate!r}": (T, rate, InputError, "sample rate")
        for rate in (0, -16000, 999, 10**9, float("nan"), float("inf"), "16000", None, True)
    },
}


@pytest.mark.parametrize("case", NOT_WAVEFORMS)
def test_what_is_no_waveform_is_refused(model: HTCL, config: Config, case: str):
    waveform, rate, error, message = NOT_WAVEFORMS[case]
    with pytest.raises(error, match=message) as caught:
        model.embed_audio(waveform, rate)
    assert type(caught.value) is error
    if case != "too short":
        with pytest.raises(error, match=message):
            log_mel(waveform, rate, config.audio)


def test_reasons_are_those_of_the_decoder(model: HTCL):
    reasons = {
        case: caught.value.reason for case in ("empty", "too short", "1e30", "NaN") for caught in [refusal(model, case)]
    }
    assert reasons == {"empty": "too_short", "too short": "too_short", "1e30": "not_finite", "NaN": "not_finite"}


def refusal(model: HTCL, case: str) -> pytest.ExceptionInfo[AudioError]:
    with pytest.raises(AudioError) as caught:
        model.embed_audio(*NOT_WAVEFORMS[case][:2])
    return caught


def test_waveforms_of_every_float_type(model: HTCL):
    expected = model.embed_audio(T, 16000)
    for waveform in (
        T.astype(np.float64),
        T.tolist(),
        torch.from_numpy(T).requires_grad_(),
        T[None],
        np.stack([T] * 6),
    ):
        torch.testing.assert_close(model.embed_audio(waveform, np.int64(16000)), expected, atol=1e-4, rtol=0)
    for waveform in (T.astype(np.float16), torch.from_numpy(T).bfloat16()):
        assert model.embed_audio(waveform, 16000.0) @ expected > 0.9


def test_mels_that_no_audio_has_are_refused(model: HTCL):
    mel = torch.full((2, 20, 16), -40.0)
    for value in (torch.nan, torch.inf, 1e30):
        broken = mel.clone()
        broken[1, 9, 3] = value
        with pytest.raises(AudioError, match="clip 1 holds NaN") as caught:
            model.embed_mel(broken)
        assert caught.value.reason == "not_finite"
        torch.testing.assert_close(
            model.embed_mel(broken, torch.tensor([20, 9])), model.embed_mel(mel, torch.tensor([20, 9]))
        )
    for wrong in (mel.int(), mel > 0):
        with pytest.raises(InputError, match="floats with frames"):
            model.embed_mel(wrong)
    with pytest.raises(InputError, match="whole numbers from 1 to 20"):
        model.embed_mel(mel, torch.tensor([20.0, 9.5]))
    assert model.embed_mel(mel.half()).isfinite().all()


def test_a_string_is_not_a_list_of_texts(model: HTCL):
    with pytest.raises(InputError, match="list of texts"):
        model.embed_text("calm piano")


@pytest.mark.parametrize("stage", [1, 2])
def test_folder_round_trip(model: HTCL, config: Config, tmp_path: Path, stage: int):
    model = model if stage == 1 else model.to_stage_2(0.1, seed=3)
    model.save_pretrained(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "tokenizer",
    ]
    loaded = HTCL.from_pretrained(tmp_path / "model")
    assert (loaded.stage, loaded.dim, loaded.recipe) == (stage, config.model.dim, config.audio.recipe)
    assert not loaded.training
    assert loaded.temperatures() == model.temperatures()
    mel, valid = mels(config)
    assert torch.equal(loaded.embed_mel(mel, valid), model.embed_mel(mel, valid))
    assert torch.equal(loaded.embed_text(TEXTS), model.embed_text(TEXTS))
    assert f"stage {stage}" in (tmp_path / "model" / "README.md").read_text()


def test_saving_over_a_model_replaces_it_whole(model: HTCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    before = weights_fingerprint(folder)
    with monkeypatch.context() as broken:
        broken.setattr("htcl_ray.models.folder.model_card", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model.to_stage_2(0.1, seed=0).save_pretrained(folder)
    assert weights_fingerprint(folder) == before
    model.to_stage_2(0.1, seed=0).save_pretrained(folder)
    assert weights_fingerprint(folder) != before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def _damage(folder: Path, name: str, **change: torch.Tensor | None) -> None:
    weights = load_file(folder / name)
    for key, tensor in change.items():
        key = key.replace("__", ".")
        weights.pop(key, None)
        if tensor is not None:
            weights[key] = tensor
    save_file(weights, folder / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"audio_head__0__weight": torch.zeros(3, 4)},
            r"audio_head.0.weight of shape \[3, 4\], but .*config.json says \[24, 32\]",
        ),
        ({"audio_head__0__weight": None}, r"lacks audio_head.0.weight, which .*config.json says has shape \[24, 32\]"),
        ({"surplus": torch.zeros(2)}, r"has surplus of shape \[2\], which .*config.json does not know"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    model: HTCL, tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
):
    model.save_pretrained(tmp_path / "model")
    _damage(tmp_path / "model", "model.safetensors", **change)
    with pytest.raises(MismatchError, match=message):
        HTCL.from_pretrained(tmp_path / "model")


def _set(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def _cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _header(folder: Path, old: bytes, new: bytes) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    assert data.count(old)
    file.write_bytes(data.replace(old, new, 1))


DAMAGED = {
    "one NaN": (
        lambda folder: _set(folder, lambda w: w["audio_head.0.weight"][0].fill_(torch.nan)),
        "holds NaN or infinity",
    ),
    "one infinity in a bias": (
        lambda folder: _set(folder, lambda w: w["audio_head.0.bias"][-1:].fill_(-torch.inf)),
        "holds NaN or infinity",
    ),
    "NaN in the text tower": (
        lambda folder: _set(folder, lambda w: w["text_encoder.transformer.pooler.dense.weight"][3, 3].fill_(torch.nan)),
        "NaN or infinity under text_encoder.transformer.pooler.dense.weight",
    ),
    "too large for float32": (
        lambda folder: _set(
            folder, lambda w: w.update({"audio_head.0.bias": torch.full((24,), 1e300, dtype=torch.float64)})
        ),
        "holds NaN or infinity under audio_head.0.bias",
    ),
    "all zeros": (
        lambda folder: _set(folder, lambda w: [tensor.zero_() for tensor in w.values()]),
        "holds nothing but zeros under",
    ),
    "one matrix of zeros": (
        lambda folder: _set(folder, lambda w: w["text_head.2.weight"].zero_()),
        "zeros under text_head.2.weight",
    ),
    "a norm of zeros": (
        lambda folder: _set(folder, lambda w: w["audio_encoder.layers.0.feed_norm.weight"].zero_()),
        "zeros under audio_encoder.layers.0.feed_norm.weight",
    ),
    "whole numbers": (
        lambda folder: _set(folder, lambda w: w.update({"audio_head.0.bias": torch.ones(24, dtype=torch.int32)})),
        "has audio_head.0.bias of type int32; expected floating-point numbers",
    ),
    "8-bit floats": (
        lambda folder: _set(folder, lambda w: w.update({"audio_head.0.bias": torch.ones(24).to(torch.float8_e4m3fn)})),
        "has audio_head.0.bias of type float8_e4m3fn",
    ),
    "truncated": (_cut, "cannot be read .* copy it again"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "cannot be read .* copy it again"),
    "no safetensors": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 1000),
        "cannot be read .* copy it again",
    ),
    "a type that does not exist": (
        lambda folder: _header(folder, b'"dtype":"F32"', b'"dtype":"Q32"'),
        "cannot be read",
    ),
    "gone": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors cannot be read"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_weights_are_one_sentence(model: HTCL, tmp_path: Path, case: str):
    """Wherever a model is loaded: all commands and classes load it by one of these."""
    damage, message = DAMAGED[case]
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    SongEncoder.load(folder)
    damage(folder)
    for load in (HTCL.from_pretrained, SongEncoder.load):
        with pytest.raises(InputError, match=message) as caught:
            load(folder)
        assert "\n" not in str(caught.value)
        assert str(folder / "model.safetensors") in str(caught.value)


def test_what_training_may_leave_is_no_damage(model: HTCL, tmp_path: Path):
    """Biases of zeros, token types that RoBERTa does not use, and weights in half precision."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)

    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["audio_head.0.bias"].zero_()
        weights["text_encoder.transformer.embeddings.token_type_embeddings.weight"].zero_()
        weights["text_head.0.weight"] = weights["text_head.0.weight"].bfloat16()

    _set(folder, change)
    loaded = HTCL.from_pretrained(folder)
    assert loaded.text_head[0].weight.dtype == torch.float32
    assert torch.equal(loaded.text_head[0].weight, model.text_head[0].weight.bfloat16().float())


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer/tokenizer.json"])
def test_files_that_the_manifest_does_not_record_are_refused(model: HTCL, tmp_path: Path, name: str):
    """One bit of a weight, which gives other vectors and is no NaN, is detected by its hash; so are the other files that
    decide a vector."""
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    files = {file.relative_to(folder).as_posix(): file_sha256(file) for file in folder.rglob("*") if file.is_file()}
    Workspace(str(folder)).write_json("manifest.json", build_manifest("semantic", config={}, inputs={}, files=files))
    assert HTCL.from_pretrained(folder).fingerprint == weights_fingerprint(folder)
    (folder / "README.md").write_text("its evaluation is written later")
    HTCL.from_pretrained(folder)
    data = bytearray((folder / name).read_bytes())
    if name == "model.safetensors":
        data[-3] ^= 1
    else:
        data += b"\n"
    (folder / name).write_bytes(data)
    for load in (HTCL.from_pretrained, SongEncoder.load, weights_fingerprint):
        with pytest.raises(
            MismatchError,
            match=rf"{name} was changed or damaged .*SHA-256 \w+…, but its manifest.json records SHA-256 \w+…",
        ):
            load(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=name):
        HTCL.from_pretrained(folder)


@pytest.mark.parametrize(("factor", "what"), [(0.0, "zero"), (1e38, "not finite|zero")])
def test_no_vector_is_given_that_has_no_direction(model: HTCL, config: Config, factor: float, what: str):
    """Weights that are finite and whose vectors are not."""
    with torch.no_grad():
        for head in (model.audio_head, model.text_head):
            for layer in (head[0], head[-1]):
                layer.weight.mul_(factor)
                layer.bias.mul_(factor)
    mel, valid = mels(config)
    for embed in (
        lambda: model.embed_mel(mel, valid),
        lambda: model.embed_text(TEXTS),
        lambda: model.embed_audio(np.ones(16_000) / 2, 16_000),
    ):
        with pytest.raises(
            InputError, match=f"the stage-1 model gives input 0 a vector that is ({what}); .* choose another one"
        ):
            embed()


def test_configurations_that_cannot_be_read_are_refused(model: HTCL, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    tree = json.loads(file.read_text())
    for changed, message in (
        ({**tree, "format_version": 99}, "format version 99.* up to 3"),
        ({**tree, "stage": 7}, "key 'stage'"),
        ({**tree, "surprise": 1}, "key 'surprise'"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(MismatchError, match=message):
            HTCL.from_pretrained(tmp_path / "model")
    file.write_text("{")
    with pytest.raises(MismatchError, match="not JSON"):
        HTCL.from_pretrained(tmp_path / "model")
    with pytest.raises(WorkspaceError, match=r"the model folder .* does not exist"):
        HTCL.from_pretrained(tmp_path / "absent")


def test_hub_models_bring_no_code_and_no_pickles(model: HTCL, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model.save_pretrained(tmp_path / "model")
    arguments = {}

    def download(name: str, allow_patterns: list[str], **_: object) -> str:
        arguments.update(name=name, patterns=allow_patterns)
        return str(tmp_path / "model")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert HTCL.from_pretrained("someone/model").dim == model.dim
    assert arguments["name"] == "someone/model"
    assert not [pattern for pattern in arguments["patterns"] if pattern.endswith((".py", ".bin", ".pt", ".pth", "*.*"))]


def test_stage_2_starts_from_everything_that_stage_1_learned(model: HTCL):
    """Towers, both heads, and the temperature of audio ↔ text; only fusion and its own two temperatures are new."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
        model.logit_scale["text"].fill_(3.3)
    learned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    second = model.to_stage_2(temperature=0.2, seed=5)
    state = second.state_dict()
    for name, tensor in learned.items():
        assert torch.equal(state[name], tensor), name
    assert {name.split(".")[0] for name in state if name not in learned} == {"fusion", "logit_scale"}
    assert second.temperatures() == pytest.approx({"text": math.exp(-3.3), "preference": 0.2, "fusion": 0.2})
    assert second.stage == 2
    assert [tuple(layer.weight.shape) for layer in second.fusion if hasattr(layer, "weight")] == [
        (32, 32),
        (16, 32),
        (16, 16),
    ]


@pytest.mark.parametrize("first", ["softmax", "sigmoid"])
@pytest.mark.parametrize("second", ["softmax", "sigmoid"])
def test_stages_may_have_different_losses(config: Config, tmp_path: Path, first: str, second: str):
    """Biases exist where the loss has them, are kept from stage 1 if it had one, and a folder loads strictly either
    way."""
    changed = {"pretrain.loss": first, "pretrain.batch_size": 16, "finetune.loss": second, "finetune.batch_size": 32}
    config = config.with_overrides(changed)
    model = HTCL.untrained(config, train_wordpiece(TEXTS, 60))
    assert ("logit_bias.text" in model.state_dict()) == (first == "sigmoid")
    if first == "sigmoid":
        assert model.logit_bias["text"].item() == pytest.approx(-math.log(15))
        model.logit_bias["text"].data.fill_(-7.0)
    model = model.to_stage_2(0.2, seed=5, loss=second, batch_size=config.finetune.global_batch_size)
    model.save_pretrained(tmp_path / "model")
    loaded = HTCL.from_pretrained(tmp_path / "model")
    assert loaded.record.loss == second
    assert loaded.state_dict().keys() == model.state_dict().keys()
    if second == "softmax":
        assert not hasattr(loaded, "logit_bias")
        return
    fresh = pytest.approx(-math.log(31))
    biases = {name: bias.item() for name, bias in loaded.logit_bias.items()}
    assert biases == {"text": -7.0 if first == "sigmoid" else fresh, "preference": fresh, "fusion": fresh}


def test_a_folder_that_names_no_loss_was_trained_with_softmax(model: HTCL, tmp_path: Path):
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    record = json.loads(file.read_text())
    del record["loss"]
    file.write_text(json.dumps(record))
    assert HTCL.from_pretrained(tmp_path / "model").record.loss == "softmax"
    file.write_text(json.dumps({**record, "loss": "sigmoid"}))
    with pytest.raises(MismatchError, match=r"lacks logit_bias\.text"):
        HTCL.from_pretrained(tmp_path / "model")


def test_initial_weights_follow_the_seed(config: Config):
    vocabulary = train_wordpiece(TEXTS, 60)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    one, two, other = (
        HTCL.untrained(config.with_overrides({"pretrain.seed": seed}), vocabulary).state_dict()["audio_head.0.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before), "the caller's random numbers were touched"


def test_temperature_is_kept_from_falling(model: HTCL):
    assert model.temperatures()["text"] == pytest.approx(0.074)
    with torch.no_grad():
        model.logit_scale["text"].fill_(9.0)
    model.clamp_temperatures()
    assert model.temperatures()["text"] == pytest.approx(0.01)


def test_official_input_is_kept_in_the_folder(config: Config, tmp_path: Path):
    model = HTCL.untrained(config, train_wordpiece(TEXTS, 60), InputRecipe.OFFICIAL)
    model.save_pretrained(tmp_path / "model")
    loaded = HTCL.from_pretrained(tmp_path / "model")
    mel, valid = mels(config)
    assert torch.equal(loaded.embed_mel(mel, valid), model.embed_mel(mel, valid))
    assert loaded.audio_encoder.input_recipe is InputRecipe.OFFICIAL


def test_vocabulary_does_not_depend_on_hash_order():
    """Workers train it each on their own. The tokenizers library alone gives another vocabulary each time, also within
    one process."""
    texts = [
        f"song {number} of {word}"
        for number in range(40)
        for word in ("jazz", "café", "techno", "音楽", "warm strings")
    ]
    assert len({train_wordpiece(texts, 120) for _ in range(8)}) == 1
