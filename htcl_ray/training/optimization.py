"""Preparation of a model for training: frozen parameters, compiled towers, optimizer and learning rates."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator

import torch
from torch import nn

from htcl_ray.config.sections import FinetuneSettings, StageSettings
from htcl_ray.errors import ConfigError
from htcl_ray.models.htcl import HTCL
from htcl_ray.training.batches import Batch, encode
from htcl_ray.training.micro_batch import left_untouched

COMPILER_OPTIONS = {"cuda": {"triton.coalesce_tiling_analysis": False}}
"""Options of torch's compiler by kind of device. On a GPU, the analysis fails an assertion of torch 2.11 on layers with
dynamic shapes, for which it is not meant."""


def freeze(model: HTCL, settings: StageSettings) -> None:
    """Freeze the parameters that `settings` name; to be called before the optimizer is built.

    Freezing the first layers of the audio tower also freezes everything before them. If that moved, a frozen layer
    would get inputs that it was not trained on. Heads always learn. Dropout stays on in frozen parts.
    """
    model.requires_grad_(True)
    model.loss_parameters("logit_scale").requires_grad_(settings.learn_temperature)
    if settings.freeze_text:
        model.text_encoder.requires_grad_(False)
    if settings.freeze_audio_layers:
        for group in model.audio_encoder.layer_groups()[: settings.freeze_audio_layers + 1]:
            for parameter in group:
                parameter.requires_grad_(False)


def build_optimizer(model: HTCL, settings: StageSettings) -> torch.optim.Optimizer:
    """Build Adam, or AdamW with `weight_decay` on matrices. Each group has its peak rate under `peak`."""
    groups = [group for group in _groups(model, settings) if group["params"]]
    on_gpu = any(parameter.is_cuda for parameter in model.parameters())
    kind = torch.optim.AdamW if settings.weight_decay else torch.optim.Adam
    return kind(groups, lr=settings.learning_rate, fused=on_gpu)


def _groups(model: HTCL, settings: StageSettings) -> Iterator[dict[str, object]]:
    towers: dict[str, tuple[nn.Module, float]] = {"text_encoder": (model.text_encoder, settings.text_learning_rate)}
    if isinstance(settings, FinetuneSettings):
        towers["audio_encoder"] = (model.audio_encoder, settings.audio_learning_rate)
    in_towers = {id(parameter) for tower, _ in towers.values() for parameter in tower.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in in_towers]
    named = {name: (list(tower.parameters()), rate) for name, (tower, rate) in towers.items()}
    for name, (parameters, rate) in {**named, "rest": (rest, settings.learning_rate)}.items():
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        for decayed in (True, False):
            chosen = [parameter for parameter in trained if (parameter.ndim >= 2) == decayed]
            decay = settings.weight_decay if decayed else 0.0
            yield {
                "name": f"{name}{'' if decayed else ', no decay'}",
                "params": chosen,
                "peak": rate,
                "lr": rate,
                "weight_decay": decay,
            }


def learning_rate_factor(step: int, total_steps: int, settings: StageSettings) -> float:
    """Share of the peak rate at a step (from 0) of the run: linear warm-up, then constant or half a cosine to 0."""
    warmup = round(settings.warmup_share * total_steps)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total_steps - warmup)))


def set_learning_rate(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to a share of its peak."""
    for group in optimizer.param_groups:
        group["lr"] = factor * group["peak"]


def compile_towers(model: HTCL, sample: Batch, device: torch.device, say: Callable[[str], None]) -> None:
    """Compile the layers of the towers in place, with dynamic shapes, and train on `sample` once, without a step.

    Names of parameters stay. If the compiler fails, which it does for some versions, devices and models, the towers
    stay as they were, and a line says so. Raises ConfigError when the compiler of this kind of device is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile needs a C++ compiler, but this machine has no '{compiler}'; install one or set compile to false"
        )
    parts = [*model.audio_encoder.compile_parts(), *model.text_encoder.compile_parts()]
    for part in parts:
        part.compile(dynamic=True, options=COMPILER_OPTIONS.get(device.type))
    try:
        with left_untouched(model, device):
            audio, text = encode(model, sample.to(device))
            torch.autograd.backward((audio.sum() + text.sum(),))
    except torch._dynamo.exc.TorchDynamoException as error:  # noqa: SLF001 - torch.compiler has no public exception
        for part in parts:
            part._compiled_call_impl = None  # noqa: SLF001 - what Module.compile sets; nothing public undoes it
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        say(f"compile: torch {torch.__version__} cannot compile the towers ({reason}), so they run as they are")
