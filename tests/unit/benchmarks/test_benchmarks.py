"""The benchmarks of training: the reimplemented published step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.published_step import PublishedModel
from htcl_ray.losses.stages import finetune_terms, pretrain_terms
from htcl_ray.models import HTCL
from htcl_ray.models.record import InputRecipe
from htcl_ray.models.towers.vocabulary import train_wordpiece
from htcl_ray.training.batches import Batch, encode
from tests.worlds.synthetic_features import tiny_config

pytestmark = pytest.mark.unit
TEXTS = ["calm piano", "fast techno", "slow choir in minor", "angry drums"]
NAMES = {
    "attention_in.weight": "self_attn.in_proj_weight",
    "attention_in.bias": "self_attn.in_proj_bias",
    "attention_out": "self_attn.out_proj",
    "attention_norm": "norm1",
    "feed_in": "linear1",
    "feed_out": "linear2",
    "feed_norm": "norm2",
}


@pytest.fixture
def model(tmp_path: Path) -> HTCL:
    torch.manual_seed(0)
    return HTCL.untrained(tiny_config(tmp_path), train_wordpiece(TEXTS, 100), InputRecipe.OFFICIAL).eval()


def batch_for(model: HTCL) -> Batch:
    frames = model.recipe.max_frames
    mel = torch.randn(4, frames, model.recipe.n_mels) * 10 - 40
    return Batch(
        mel, torch.tensor([frames, 20, 9, 17]), model.text_encoder.tokenize(TEXTS), torch.arange(12).reshape(3, 4).T
    )


def published_name(name: str) -> str:
    """Name of a parameter of this package in the reimplemented published model."""
    for kind, place in (("convolution", 0), ("norm", 1)):
        for block in range(3):
            name = name.replace(f"convolutions.{block}.{kind}.", f"convolutions.{3 * block + place}.")
        name = name.replace(f"position.{kind}.", f"position.{place}.")
    name = name.replace("projection_norm.", "projection.0.").replace("projection.weight", "projection.1.weight")
    name = name.replace("projection.bias", "projection.1.bias").replace(
        "audio_encoder.layers.", "audio_encoder.transformer.layers."
    )
    for own, published in NAMES.items():
        name = name.replace(own, published)
    return name.replace("audio_encoder.", "audio.")


@pytest.mark.parametrize("stage", [1, 2])
def test_published_loss_equals_the_loss_without_masks(model: HTCL, stage: int):
    model = model if stage == 1 else model.to_stage_2(0.074, seed=0).eval()
    published = PublishedModel(model.record.model, model.recipe, model.text_encoder.transformer, stage).eval()
    weights = {
        published_name(name): tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(("text_encoder", "logit_scale"))
    }
    keys = published.load_state_dict(weights, strict=False)
    assert not keys.unexpected_keys
    assert all(name == "scales" or name.startswith("text.") for name in keys.missing_keys)
    batch = batch_for(model)
    audio, text = encode(model, batch)
    terms = (
        pretrain_terms(model, audio, text, batch.ids)
        if stage == 1
        else finetune_terms(model, audio, text, batch.ids, None)
    )
    torch.testing.assert_close(published.loss(batch), sum(terms.values()), atol=1e-5, rtol=1e-5)
