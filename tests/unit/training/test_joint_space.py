"""The joint space of a pretrained audio-text model as stage 1: equal to the library, and refused where it is none."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from htcl_ray import cli
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, InputError, MismatchError
from htcl_ray.extractors.families import JOINT_FAMILIES
from htcl_ray.models import HTCL
from htcl_ray.models.towers.text import text_encoder_from_name
from htcl_ray.pipelines import inputs
from htcl_ray.pipelines.publish_joint_space import publish_joint_space
from htcl_ray.pipelines.run import run
from htcl_ray.pipelines.train import pretrain
from htcl_ray.training.joint_space import joint_model, joint_space, refuse_joint_space
from htcl_ray.training.stage_run import check_parent
from htcl_ray.workspace.artifacts import Artifact
from htcl_ray.workspace.manifest import build_manifest
from htcl_ray.workspace.storage import Workspace
from tests.worlds.synthetic_features import tiny_config
from tests.worlds.tiny_encoders import BUILDERS

pytestmark = pytest.mark.unit

TEXTS = ["calm piano", "a fast rock song with loud drums and guitar", "jazz"]
WIDTHS = {"clap": 12, "pe_audio": 16}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny random model of each joint family, another CLAP, and one without a text tower."""
    root = tmp_path_factory.mktemp("joint")
    for seed, (name, kind) in enumerate({**{kind: kind for kind in JOINT_FAMILIES}, "other": "clap"}.items()):
        torch.manual_seed(seed)
        BUILDERS[kind](root / name)
    BUILDERS["audio-spectrogram-transformer"](root / "ast")
    return root


def configured(folder: Path, workspace: Path | str = "unused", **overrides: object) -> Config:
    name = str(folder)
    joint = {
        "audio.extractor": "pretrained",
        "audio.name_or_path": name,
        "audio.tower": "residual",
        "audio.window_seconds": 0.5,
        "text.name_or_path": name,
        "model.head_hidden": [],
        "model.dim": WIDTHS.get(folder.name, 12),
        "pretrain.use_joint_space": True,
    }
    return tiny_config(workspace, **{**joint, **overrides})


def library(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors of two windows and of `TEXTS` by the library alone, at unit norm."""
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = tokenizer(TEXTS, padding=True, return_tensors="pt")
    texts.pop("token_type_ids", None)
    rate = processor.sampling_rate
    windows = [np.random.default_rng(seed).normal(0, 0.1, rate // 2).astype(np.float32) for seed in range(2)]
    audio, words = [], []
    with torch.no_grad():
        for window in windows:
            given = processor(window, sampling_rate=rate, return_tensors="pt")
            for row in range(len(TEXTS)):
                one = {name: value[row : row + 1] for name, value in texts.items()}
                kept = one["attention_mask"][0].bool()
                output = model(**{name: value[:, kept] for name, value in one.items()}, **given)
                words.append(output["text_embeds" if folder.name == "clap" else "text_audio_embeds"][0])
            audio.append(output.audio_embeds[0])
    stacked = torch.stack(audio), torch.stack(words[: len(TEXTS)])
    return tuple(torch.nn.functional.normalize(rows, dim=1) for rows in stacked)


@pytest.mark.parametrize("kind", JOINT_FAMILIES)
def test_both_towers_equal_the_library_in_either_stage_and_after_a_model_folder(
    kind: str, models: Path, tmp_path: Path
):
    audio, texts = library(models / kind)
    assert audio.shape[1] == WIDTHS[kind]
    joint_model(configured(models / kind)).save_pretrained(tmp_path / "model")
    semantic = HTCL.from_pretrained(tmp_path / "model")
    stage_2 = semantic.to_stage_2(0.07, 0).eval()
    for model in (semantic, stage_2):
        torch.testing.assert_close(model.embed_features(audio[:, None]), audio, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.embed_text(TEXTS), texts, atol=1e-5, rtol=0)
    several = semantic.embed_features(audio[None])[0]
    torch.testing.assert_close(several, torch.nn.functional.normalize(audio.sum(dim=0), dim=0), atol=1e-5, rtol=0)
    assert (texts[0] - texts[1]).abs().max() > 1e-3
    assert semantic.text_encoder.coverage(["calm piano"])[0] == 1


def test_a_song_has_the_vector_that_the_library_gives_its_audio(models: Path):
    """From the waveform, at the encoder's rate and rounded to float16 as features are stored."""
    model = joint_model(configured(models / "clap")).eval()
    rate = model.record.extractor.sample_rate
    waveform = np.random.default_rng(0).normal(0, 0.1, rate // 2).astype(np.float32)
    stored = library(models / "clap")[0][0].half().float()
    expected = torch.nn.functional.normalize(stored, dim=0)
    torch.testing.assert_close(model.embed_audio(waveform, rate), expected, atol=1e-5, rtol=0)


def test_stage_2_changes_the_joint_space_from_its_first_step(models: Path):
    model = joint_model(configured(models / "clap")).to_stage_2(0.07, 0).train()
    audio, texts = library(models / "clap")
    tokens = model.text_encoder.tokenize(TEXTS[:2])
    encoded = model.encode_audio(audio[:, None], torch.tensor([1, 1]))
    loss = (encoded @ model.encode_text(tokens).T).log_softmax(dim=1).diagonal().sum()
    loss.backward()
    for name in ("audio_encoder.gate", "audio_head.0.weight", "text_head.0.weight", "text_encoder.projection."):
        moved = [weight for key, weight in model.named_parameters() if key.startswith(name)]
        assert any(float(weight.grad.abs().max()) > 0 for weight in moved), name
    assert len(texts) == len(TEXTS)


def test_a_text_tower_of_a_joint_space_can_be_that_of_stage_1(models: Path):
    """Without the joint space it is a text tower like any other, with its own size."""
    config = configured(models / "clap", **{"pretrain.use_joint_space": False, "model.dim": 7})
    model = HTCL.untrained(config, feature_width=12).eval()
    assert model.embed_text(TEXTS).shape == (3, 7)
    with pytest.raises(ConfigError, match=r"text\.pooling is mean, but the text tower of .* a pooling of its own"):
        text_encoder_from_name(config.text.model_copy(update={"pooling": "mean"}))
    with pytest.raises(ConfigError, match=r"text\.max_tokens is 600, but the text model .* takes at most 513"):
        text_encoder_from_name(config.text.model_copy(update={"max_tokens": 600}))


REFUSED = {
    "other sizes": (
        {"audio.tower": "mlp", "model.dim": 100, "model.head_hidden": [8]},
        ConfigError,
        r"needs audio\.tower=residual, model\.head_hidden=\[\], model\.dim=12, but the configuration says mlp, \[8\], 100",
    ),
    "another space": ({"text.name_or_path": "other"}, MismatchError, "not in the joint space of the audio model"),
    "a text model": ({"text.name_or_path": "bert"}, MismatchError, "not in the joint space of the audio model"),
    "no text tower": (
        {"audio.name_or_path": "ast"},
        ConfigError,
        "of the kind 'audio-spectrogram-transformer', which has no text tower",
    ),
    "no text model": ({"text.name_or_path": None}, ConfigError, r"text\.name_or_path is not set"),
    "log-mel": ({"audio.extractor": "log_mel", "audio.tower": "cnn"}, ConfigError, r"audio\.extractor is log_mel"),
    "a warm start": ({"pretrain.warm_start": "model"}, ConfigError, r"pretrain\.warm_start has no use"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_joint_space_is_one_sentence_before_anything_starts(case: str, models: Path, tmp_path: Path):
    changes, error, message = REFUSED[case]
    changes = {
        key: str(models / value) if key.endswith("name_or_path") and value else value for key, value in changes.items()
    }
    config = configured(models / "clap", tmp_path / "workspace", **changes)
    for check in (joint_space, lambda config: run(config, until="pretrain", report=print)):
        with pytest.raises(error, match=message) as caught:
            check(config)
        assert isinstance(caught.value, InputError)
    assert not (tmp_path / "workspace").exists()


def test_a_copy_of_the_model_is_the_same_joint_space(models: Path, tmp_path: Path):
    shutil.copytree(models / "clap", tmp_path / "copy")
    assert joint_space(configured(models / "clap", **{"text.name_or_path": str(tmp_path / "copy")})).width == 12


def test_damaged_weights_of_the_text_tower_are_refused(models: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    for name, change, message in [
        ("missing", None, r"has no weights for text_projection\.linear2\.weight"),
        ("damaged", torch.nan, "NaN or infinity"),
    ]:
        shutil.copytree(models / "clap", tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        weights = load_file(file)
        tensor = weights.pop("text_projection.linear2.weight")
        if change is not None:
            weights["text_projection.linear2.weight"] = torch.full_like(tensor, change)
        save_file(weights, file, {"format": "pt"})
        with pytest.raises(InputError, match=message):
            joint_model(configured(tmp_path / name))


def test_it_is_published_once_as_a_semantic_model(models: Path, tmp_path: Path):
    config = configured(models / "clap", tmp_path)
    workspace = Workspace(config.workspace)
    extractor = joint_space(config).model_dump(mode="json")
    manifest = {**build_manifest("features", config=config.model_dump(mode="json"), inputs={}), "extractor": extractor}
    workspace.finish("features/f", manifest)
    first, again = pretrain(config), pretrain(config)
    assert (first.skipped, again.skipped, first.location) == (False, True, again.location)
    assert first.summary.endswith("12 numbers, not trained")
    made = workspace.manifest(f"models/semantic/{first.version}")
    assert made["inputs"] == {"features": "f", "joint_space": extractor["fingerprint"]}
    longer = config.with_overrides({"pretrain.epochs": 50, "pretrain.learning_rate": 1.0})
    assert inputs.semantic_version(longer, "f") == first.version
    trained = config.with_overrides({"pretrain.use_joint_space": False})
    assert inputs.semantic_version(trained, "f") != first.version
    check_parent(workspace, Artifact(f"models/semantic/{first.version}", first.version, made), config)

    other = {**extractor, "fingerprint": "f" * 16}
    with pytest.raises(MismatchError, match="was trained on vectors of the audio model"):
        publish_joint_space(workspace, config, Artifact("features/g", "g", {**manifest, "extractor": other}), "v")
    with pytest.raises(ConfigError, match=r"htcl tune trains stage 1, which pretrain\.use_joint_space leaves out"):
        refuse_joint_space(config, "htcl tune")


def test_from_pretrained_is_the_joint_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    given: list[Config] = []
    monkeypatch.setattr("htcl_ray.pipelines.train.finetune", lambda config, model: given.append(config))
    monkeypatch.setattr(cli, "print_result", lambda result: None)
    for source in ("pretrained", "elsewhere"):
        assert cli.main(["finetune", "--from", source, "--workspace", str(tmp_path), "--set", "ray.address=local"]) == 0
    assert [config.pretrain.use_joint_space for config in given] == [True, False]
    assert [config.finetune.warm_start for config in given] == [None, "elsewhere"]
