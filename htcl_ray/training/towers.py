"""What happens to the towers before the first step: parts of them are frozen, and they are compiled."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from htcl_ray.config.sections import StageSettings
from htcl_ray.errors import ConfigError
from htcl_ray.models.htcl import HTCL


def freeze(model: HTCL, settings: StageSettings) -> None:
    """Let gradients reach exactly the parameters that `settings` do not freeze; to be called before the optimizer is
    built.

    With the first Transformer layers go the convolutions, the projection, the position embedding, its norm and [CLS]:
    if what feeds a frozen layer moved, the layer would no longer get what it was trained on, and the gradient would
    still have to pass through it. Heads always learn. Dropout stays on in frozen parts, as everywhere in training.
    """
    model.requires_grad_(True)
    model.loss_parameters("logit_scale").requires_grad_(settings.learn_temperature)
    if settings.freeze_text:
        model.text_encoder.requires_grad_(False)
    if settings.freeze_audio_layers:
        encoder = model.audio_encoder
        encoder.requires_grad_(False)
        for layer in encoder.layers[settings.freeze_audio_layers :]:
            layer.requires_grad_(True)


def compile_towers(model: HTCL, device: torch.device) -> None:
    """Compile the towers in place; names of parameters stay. Shapes are dynamic: lengths of clips and texts vary from
    batch to batch.

    Raises ConfigError when the compiler of this kind of device is missing.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and shutil.which(compiler) is None:
        raise ConfigError(
            f"compile needs a C++ compiler, but this machine has no '{compiler}'; install one or set compile to false"
        )
    encoder = model.audio_encoder
    # Equal layers share one compilation. The encoder as a whole would break at the lengths, which are decided on the
    # CPU.
    parts: list[nn.Module] = [encoder.convolutions, encoder.position, *encoder.layers, model.text_encoder.transformer]
    for part in parts:
        part.compile(dynamic=True)
