"""Normalisation of log-mel frames per clip, over the clip's own frames."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-8
"""Added to the standard deviation, so that silence becomes zeros."""


def normalised_frames(mel: Tensor, valid_frames: Tensor, length: int) -> Tensor:
    """Normalise each clip by the mean and deviation of all cells of its own frames, [B, length, M], and pad with zeros.

    mel [B, F, M] in dB; frames from `valid_frames` [B] (int64, on the CPU, 1 to F and to `length`) on are never read.
    """
    mel = F.pad(mel[:, :length], (0, 0, 0, max(0, length - mel.shape[1])))
    valid = valid_frames.to(mel.device)
    inside = (torch.arange(length, device=mel.device) < valid[:, None])[:, :, None]
    cells = (valid * mel.shape[2])[:, None, None].to(mel.dtype)
    mean = torch.where(inside, mel, 0).sum(dim=(1, 2), keepdim=True) / cells
    centred = torch.where(inside, mel - mean, 0)
    deviation = (centred.square().sum(dim=(1, 2), keepdim=True) / cells).sqrt()
    return centred / (deviation + EPSILON)
