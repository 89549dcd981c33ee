"""Pretrained text towers, through a small BERT that transformers itself saves: real weights in, every one of them, and trained on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from htcl_ray.models import HTCL
from htcl_ray.models.text_encoder import check_text_settings, text_encoder_from_name, transformer_from_config
from htcl_ray.objectives.stages import pretrain_terms
from htcl_ray.settings import TextSettings
from htcl_ray.training.batches import Batch
from htcl_ray.training.optim import build_optimizer
from htcl_ray.training.step import compute_gradients
from htcl_ray.training.tasks import Task
from tests.synthetic_features import tiny_config

pytestmark = pytest.mark.unit
TEXTS = ["calm piano", "fast technos calm"]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT as transformers itself saves it."""
    folder = tmp_path_factory.mktemp("bert")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "calm", "piano", "techno", "fast", "##s"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    bert = BertConfig(
        vocab_size=10, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, max_position_embeddings=16
    )
    BertModel(bert).save_pretrained(folder)
    return folder


@pytest.fixture
def config(bert_folder: Path, tmp_path: Path) -> Config:
    return tiny_config(tmp_path / "workspace", **{"text.name_or_path": str(bert_folder), "text.max_tokens": 16})


def without(folder: Path, to: Path, part: str) -> Path:
    """A copy of a model folder that lacks the weights whose names start with `part`."""
    shutil.copytree(folder, to)
    weights = {name: tensor for name, tensor in load_file(to / "model.safetensors").items() if not name.startswith(part)}
    save_file(weights, to / "model.safetensors", {"format": "pt"})
    return to


@pytest.mark.parametrize("pooling", ["pooler", "cls", "mean"])
def test_pretrained_tower_gives_berts_own_numbers(config: Config, bert_folder: Path, tmp_path: Path, pooling: str):
    """Padded together by us, one by one without padding by transformers."""
    ours = HTCL.untrained(config.with_overrides({"text.pooling": pooling}))
    theirs, tokenizer = BertModel.from_pretrained(bert_folder).eval(), BertTokenizerFast.from_pretrained(bert_folder)
    with torch.no_grad():
        outputs = [theirs(**tokenizer(text, return_tensors="pt")) for text in TEXTS]
        pooled = {
            "pooler": [output.pooler_output[0] for output in outputs],
            "cls": [output.last_hidden_state[0, 0] for output in outputs],
            "mean": [output.last_hidden_state[0].mean(dim=0) for output in outputs],
        }
        torch.testing.assert_close(ours.eval().text_encoder(ours.text_encoder.tokenize(TEXTS)), torch.stack(pooled[pooling]))
    ours.save_pretrained(tmp_path / "model")
    assert torch.equal(HTCL.from_pretrained(tmp_path / "model").embed_text(TEXTS), ours.embed_text(TEXTS))


def test_every_weight_is_the_files_and_training_moves_it(config: Config, bert_folder: Path, tmp_path: Path):
    """And a checkpoint stands alone: it is read when the folder of the pretrained model is gone."""
    folder = shutil.copytree(bert_folder, tmp_path / "bert")
    model = HTCL.untrained(config.with_overrides({"text.name_or_path": str(folder)}))
    given, loaded = load_file(folder / "model.safetensors"), model.text_encoder.transformer.state_dict()
    assert set(given) == set(loaded)
    assert all(torch.equal(given[name], loaded[name]) for name in given)
    drawn = transformer_from_config(model.text_encoder.record.transformer).state_dict()
    matrices = [name for name in given if given[name].ndim == 2]
    assert matrices
    assert not any(torch.equal(drawn[name], given[name]) for name in matrices)

    mel = torch.randn(4, 24, config.audio.n_mels, generator=torch.Generator().manual_seed(0))
    tokens = model.text_encoder.tokenize(["calm piano", "fast techno", "piano", "fast technos calm"])
    batch = Batch(mel, torch.full((4,), 24), tokens, torch.arange(12).reshape(4, 3))
    optimizer = build_optimizer(model.train(), config.pretrain)
    task = Task("pretrain", 4, 1, order=lambda epoch: torch.arange(4).numpy(), terms=pretrain_terms, weights={"text": 1.0})
    compute_gradients(model, batch, task)
    optimizer.step()
    moved = model.text_encoder.transformer.state_dict()
    assert not any(torch.equal(moved[name], given[name]) for name in matrices)

    model.save_pretrained(tmp_path / "model")
    shutil.rmtree(folder)
    again = HTCL.from_pretrained(tmp_path / "model")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again.embed_text(TEXTS), model.embed_text(TEXTS))


def test_weights_are_never_drawn_in_silence(bert_folder: Path, tmp_path: Path):
    headless = without(bert_folder, tmp_path / "headless", "pooler.")
    with pytest.raises(ConfigError, match=r"no weights for its pooler, but text\.pooling is pooler; set text\.pooling=mean"):
        check_text_settings(TextSettings(name_or_path=str(headless), max_tokens=16))
    tower = text_encoder_from_name(TextSettings(name_or_path=str(headless), max_tokens=16, pooling="mean"))
    assert set(tower.transformer.state_dict()) == set(load_file(headless / "model.safetensors"))
    shallow = without(bert_folder, tmp_path / "shallow", "encoder.layer.1.")
    with pytest.raises(ConfigError, match=r"no weights for encoder\.layer\.1\..* and 15 others; expected all of them"):
        check_text_settings(TextSettings(name_or_path=str(shallow), max_tokens=16, pooling="mean"))


def test_unusable_text_models_are_refused(bert_folder: Path, tmp_path: Path):
    for name, message in ((str(tmp_path), "cannot be loaded"), (str(bert_folder), "max_tokens is 99, .* takes at most 16")):
        with pytest.raises(ConfigError, match=message):
            check_text_settings(TextSettings(name_or_path=name, max_tokens=99))
