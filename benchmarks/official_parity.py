"""An imported model compared with the authors' own code, at full size.

    python -m benchmarks.official_parity --code FOLDER

FOLDER is a checkout of the authors' repository, which this one does not ship; its code needs einops and tqdm. Their
modules are built with random weights, a multilingual BERT's sizes included, their state dict is saved as their scripts
save it and read with `HTCL.from_official`. Both see the same random log-mels of several lengths and the same token ids.
Writes benchmarks/results/official_parity.json with the largest differences between unit vectors.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from benchmarks.environment import write_result
from htcl_ray.models import HTCL

LENGTHS = (17, 100, 626, 1250, 1251, 1300)
BERT = BertConfig(vocab_size=105879)
"""Sizes of bert-base-multilingual-uncased."""
TEXTS, TOKENS = 8, 24


def their_model(scripts: ModuleType, models: ModuleType, mlp: ModuleType, stage: int) -> nn.Module:
    """What their script of this stage trains and saves, no value left as it was initialised, so that no name is taken
    for another.
    """
    wide, dim = scripts.HIDDEN_DIM, scripts.OUTPUT_DIM
    heads = [mlp.MLP([wide, wide // 2, wide // 4, dim]) for _ in range(2)]
    towers = (models.AudioModel(input_dim=scripts.MEL_SPEC_DIM), BertModel(BERT), *heads)
    if stage == 1:
        model = scripts.ModelWrapper(*towers, 2.6)
    else:
        model = scripts.ModelWrapper(*towers, mlp.MLP([dim * 2, dim * 2, dim, dim]), 2.6, [1.0, 1.0, 1.0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def clips() -> list[np.ndarray]:
    """Log-mels in dB with slow changes over time and frequency, each at a level of its own."""
    random = np.random.default_rng(0)
    made = []
    for index, frames in enumerate(LENGTHS):
        time_axis, band = np.linspace(0, 6 + index, frames)[:, None], np.linspace(0, 3, 128)[None, :]
        made.append(
            (-30 - 4 * index + 12 * np.sin(time_axis + band) + random.normal(0, 6, (frames, 128))).astype(np.float32)
        )
    return made


@torch.no_grad()
def their_audio(model: nn.Module, input_code: ModuleType, frames: int) -> Tensor:
    rows = []
    for mel in clips():
        padded = input_code.padding(mel, pad_value=mel.max() - 80.0, max_length=frames)
        rows.append(
            model.audio_mlp(model.audio_model(torch.from_numpy(input_code.normalize(padded))[None]).mean(dim=1))
        )
    return torch.cat(rows)


@torch.no_grad()
def their_text(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    return model.text_mlp(
        model.text_model(**tokens, token_type_ids=torch.zeros_like(tokens["input_ids"])).pooler_output
    )


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(p=2, dim=-1, keepdim=True)


def compare(stage: int, scratch: Path) -> dict[str, Any]:
    """The largest difference of each output of one stage."""
    scripts, models, mlp, input_code = (
        importlib.import_module(name) for name in (f"train_stage{stage}", "models.audio_model", "models.mlp", "utils")
    )
    torch.manual_seed(stage)
    official = their_model(scripts, models, mlp, stage)
    file, bare = scratch / f"stage-{stage}.pth", scratch / f"audio-model-{stage}.pth"
    torch.save(official.state_dict(), file)
    torch.save(official.audio_model.state_dict(), bare)
    tokens = {
        "input_ids": torch.randint(5, BERT.vocab_size, (TEXTS, TOKENS)),
        "attention_mask": torch.ones(TEXTS, TOKENS, dtype=torch.int64),
    }
    tokens["attention_mask"][1::2, TOKENS // 2 :] = 0
    audio, text = their_audio(official, input_code, scripts.MEL_SPEC_MAX_LEN), their_text(official, tokens)
    with torch.no_grad():
        fusion = official.fusion_mlp(torch.cat([audio[:4], text[:4]], dim=1)) if stage == 2 else None
    official.audio_mlp = nn.Identity()
    encoded = their_audio(official, input_code, scripts.MEL_SPEC_MAX_LEN)
    parameters = sum(parameter.numel() for parameter in official.audio_model.parameters())
    del official

    started = time.perf_counter()
    model = HTCL.from_official(file, stage)
    seconds = time.perf_counter() - started
    mel = torch.full((len(LENGTHS), max(LENGTHS), 128), torch.nan)
    for row, clip in zip(mel, clips(), strict=True):
        row[: len(clip)] = torch.from_numpy(clip)
    vectors = model.embed_mel(mel, torch.tensor(LENGTHS))
    with torch.no_grad():
        our_text = model.encode_text(tokens)
        differences = {
            "audio": dict(zip(map(str, LENGTHS), (vectors - unit(audio)).abs().amax(dim=1).tolist(), strict=True)),
            "text": (unit(our_text) - unit(text)).abs().max().item(),
        }
        if fusion is not None:
            differences["fusion"] = (unit(model.fuse(audio[:4], text[:4])) - unit(fusion)).abs().max().item()
    alone = HTCL.from_official(bare, stage).embed_mel(mel, torch.tensor(LENGTHS))
    differences["audio_encoder_alone"] = (alone - unit(encoded)).abs().max().item()
    return {
        "largest_difference": differences,
        "audio_encoder_parameters": {
            "theirs": parameters,
            "ours": sum(p.numel() for p in model.audio_encoder.parameters()),
        },
        "cosine_between_clips": {"lowest": (vectors @ vectors.T).min().item()},
        "import_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--code", type=Path, required=True, help="checkout of the authors' repository")
    parser.add_argument("--revision", help="its commit, for the record")
    options = parser.parse_args()
    sys.path.insert(0, str(options.code.resolve()))
    with tempfile.TemporaryDirectory() as scratch:
        result = {f"stage_{stage}": compare(stage, Path(scratch)) for stage in (1, 2)}
    for stage, values in result.items():
        print(stage, values)
    path = write_result("official_parity", {"their_revision": options.revision, "clip_frames": list(LENGTHS), **result})
    print(f"→ {path}")


if __name__ == "__main__":
    main()
