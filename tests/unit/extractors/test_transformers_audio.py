"""Encoders of transformers: tiny random models of the real architectures, against the library called directly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from htcl_ray.config import resolve
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import ConfigError, MismatchError
from htcl_ray.extractors.base import PretrainedExtractor, load_extractor
from htcl_ray.extractors.families import FAMILIES, find_extractor
from htcl_ray.pipelines.estimate_tags import check_auto_tags
from tests.worlds.tiny_encoders import BUILDERS

pytestmark = pytest.mark.unit


WINDOW_SECONDS = 0.5


def direct(kind: str, folder: Path, window: np.ndarray, rate: int) -> torch.Tensor:
    """The vector of one window by the library alone, as its documentation shows it."""
    processor = transformers.AutoFeatureExtractor.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder).eval()
    inputs = processor(window, sampling_rate=rate, return_tensors="pt")
    with torch.no_grad():
        if kind == "clap":
            return model.get_audio_features(**inputs).pooler_output[0]
        if kind == "audio-spectrogram-transformer":
            return model(**inputs).pooler_output[0]
        if kind == "whisper":
            hidden = model.get_encoder()(inputs.input_features).last_hidden_state
            return hidden[0, : round(len(window) / 320)].mean(dim=0)
        if kind == "pe_audio":
            return model.audio_head(model.audio_encoder(**inputs).pooler_output)[0]
        return model(inputs.input_values).last_hidden_state[0].mean(dim=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny random model of each kind."""
    root = tmp_path_factory.mktemp("encoders")
    for kind, build in BUILDERS.items():
        torch.manual_seed(0)
        build(root / kind)
    return root


def loaded(folder: Path, **settings: object) -> PretrainedExtractor:
    recipe = AudioRecipe(name_or_path=str(folder), window_seconds=WINDOW_SECONDS, **settings)
    return load_extractor(recipe)


def noise(samples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.1, samples).astype(np.float32)


@pytest.mark.parametrize("kind", BUILDERS)
def test_vectors_equal_those_of_the_library(kind: str, models: Path):
    extractor = loaded(models / kind, hop_seconds=0.25)
    rate = extractor.record.sample_rate
    songs = [noise(round(1.1 * rate)), noise(round(0.6 * rate), 1)]
    vectors = extractor.embed(songs, batch_size=3)
    assert [len(rows) for rows in vectors] == [3, 1]  # whole windows only
    for song, rows in zip(songs, vectors, strict=True):
        assert rows.dtype == np.float32
        for number, row in enumerate(rows):
            start = number * rate // 4
            expected = direct(kind, models / kind, song[start : start + rate // 2], rate)
            np.testing.assert_allclose(row, expected.numpy(), atol=1e-5)
    assert np.abs(vectors[0][0] - vectors[0][1]).max() > 1e-4


@pytest.mark.parametrize("kind", BUILDERS)
def test_a_song_shorter_than_a_window_has_one_vector_that_no_batch_changes(kind: str, models: Path):
    extractor = loaded(models / kind)
    rate = extractor.record.sample_rate
    short, long = noise(round(0.3 * rate)), noise(rate, 1)
    alone = extractor.embed([short])[0]
    assert alone.shape == (1, extractor.record.width)
    np.testing.assert_allclose(extractor.embed([long, short])[1], alone, atol=1e-5)


def test_every_family_is_tested():
    assert set(BUILDERS) | {"musicnn"} == set(FAMILIES)


def test_a_batch_that_does_not_fit_the_gpu_is_halved(models: Path, monkeypatch: pytest.MonkeyPatch):
    extractor, sizes = loaded(models / "wav2vec2"), []
    encode = extractor.encode

    def short_of_memory(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        sizes.append(len(inputs["input_values"]))
        if sizes[-1] > 2:
            raise torch.cuda.OutOfMemoryError
        return encode(inputs)

    song = noise(4 * 16_000)
    expected = extractor.embed([song])[0]
    monkeypatch.setattr(extractor, "encode", short_of_memory)
    np.testing.assert_allclose(extractor.embed([song], batch_size=8)[0], expected, atol=1e-6)
    assert sizes == [8, 4, 2, 2, 2, 2]


def edited(models: Path, tmp_path: Path, **config: object) -> AudioRecipe:
    """A recipe of a copy of the wav2vec2 model whose config.json has these keys."""
    for file in (models / "wav2vec2").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**tree, **config}))
    return AudioRecipe(name_or_path=str(tmp_path))


def test_an_unknown_kind_is_refused_with_the_known_ones(models: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="of the kind 'bert', which is not known; expected one of musicnn, clap, "):
        find_extractor(edited(models, tmp_path, model_type="bert"))


def test_code_of_a_model_is_refused(models: Path, tmp_path: Path):
    marker = tmp_path / "executed"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')")
    with pytest.raises(ConfigError, match="needs code of its own, which is never run; choose a model of one of"):
        find_extractor(edited(models, tmp_path, auto_map={"AutoModel": "code.Model"}))
    assert not marker.exists()


def test_weights_that_are_not_safetensors_are_refused(models: Path, tmp_path: Path):
    recipe = edited(models, tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="has no weights in safetensors, and no other format is read"):
        find_extractor(recipe)


def test_a_window_that_the_processor_would_cut_is_refused(models: Path):
    with pytest.raises(ConfigError, match=r"audio.window_seconds is 5, but the audio model .*clap takes at most 2 s"):
        find_extractor(AudioRecipe(name_or_path=str(models / "clap"), window_seconds=5))


def test_a_missing_name_is_refused():
    with pytest.raises(ConfigError, match=r"audio\.name_or_path is not set; set it to a model"):
        find_extractor(AudioRecipe())


def test_another_encoder_than_the_recorded_one_is_refused(models: Path, tmp_path: Path):
    recipe = edited(models, tmp_path)
    record = load_extractor(recipe).record
    assert load_extractor(recipe, record).record == record
    torch.manual_seed(1)
    BUILDERS["wav2vec2"](tmp_path)
    with pytest.raises(MismatchError, match=f"but the model was trained on vectors of {record.fingerprint}; put back"):
        load_extractor(recipe, record)


def test_missing_and_damaged_weights_are_refused(models: Path, tmp_path: Path):
    recipe = edited(models, tmp_path, num_hidden_layers=2)
    with pytest.raises(
        MismatchError, match=r"lack encoder.layers.1.attention.k_proj.bias; expected those of a Wav2Vec2"
    ):
        load_extractor(recipe)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(MismatchError, match="cannot be loaded"):
        load_extractor(recipe)


def test_the_licence_is_read_from_the_model_card(models: Path, tmp_path: Path):
    recipe = edited(models, tmp_path)
    assert find_extractor(recipe)[1].licence is None
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\ntags: [audio]\n---\n# A model\n")
    assert find_extractor(recipe)[1].licence == "apache-2.0"


def test_estimated_tags_need_an_encoder_that_gives_tags(models: Path):
    settings = {
        "audio.extractor": "pretrained",
        "audio.name_or_path": str(models / "hubert"),
        "catalog.auto_tags": True,
    }
    config = resolve("demo").with_overrides(settings)
    with pytest.raises(ConfigError, match=r"gives tags of music, but the audio model .* is of the kind 'hubert'"):
        check_auto_tags(config)
    assert check_auto_tags(config.with_overrides({"catalog.auto_tags": False})) is None


@pytest.mark.parametrize("extractor", ["log_mel", "vectors"])
def test_estimated_tags_need_a_pretrained_encoder(extractor: str):
    with pytest.raises(ConfigError, match=f"needs a pretrained encoder that gives tags, .* is {extractor}; set"):
        resolve("demo").with_overrides({"audio.extractor": extractor, "catalog.auto_tags": True})
