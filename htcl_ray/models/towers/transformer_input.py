"""From a padded batch of log-mel spectrograms to what the convolutions see, and which tokens are real.

Shapes: B clips, F frames as given, L frames after preparation, T tokens, M mel bands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TOKEN_STRIDE = 8
"""Frames from one token to the next: three strides of 2."""
RECEPTIVE_FIELD = 17
"""Frames that one token sees: kernels 5, 3, 3."""
EPSILON = 1e-8
"""Added to the standard deviation, so that silence becomes zeros."""


def masked_input(mel: Tensor, valid_frames: Tensor) -> tuple[Tensor, Tensor | None]:
    """Normalise each clip by its own frames, and put zeros behind it.

    mel [B, F, M] in dB; frames from `valid_frames` [B] (int64, on the CPU, 1 to F) on are never read. Returns the
    prepared frames [B, L, M] and the valid tokens [B, T] (None when all are). L = 8·(T − 1) + 17 with T = ceil(longest
    / 8) whatever F is: the last token of a clip always sees the same zeros behind it, so neither padding nor the rest
    of the batch changes an embedding.
    """
    tokens = -(-valid_frames // TOKEN_STRIDE)
    count = int(tokens.max())
    length = TOKEN_STRIDE * (count - 1) + RECEPTIVE_FIELD
    mel = F.pad(mel[:, :length], (0, 0, 0, max(0, length - mel.shape[1])))
    valid = valid_frames.to(mel.device)
    inside = (torch.arange(length, device=mel.device) < valid[:, None])[:, :, None]
    cells = (valid * mel.shape[2])[:, None, None].to(mel.dtype)
    mean = torch.where(inside, mel, 0).sum(dim=(1, 2), keepdim=True) / cells
    centred = torch.where(inside, mel - mean, 0)
    deviation = (centred.square().sum(dim=(1, 2), keepdim=True) / cells).sqrt()
    all_valid = bool((tokens == count).all())
    token_valid = None if all_valid else torch.arange(count, device=mel.device) < tokens.to(mel.device)[:, None]
    return centred / (deviation + EPSILON), token_valid


def official_input(mel: Tensor, valid_frames: Tensor, *, frames: int, top_db: float) -> tuple[Tensor, None]:
    """Pad every clip to `frames` at its maximum − `top_db`, then normalise the whole padded matrix: the published
    recipe, no mask.

    mel [B, F, M] in dB, valid_frames [B] as in `masked_input` → [B, frames, M]; longer clips are cut.
    """
    mel = F.pad(mel[:, :frames], (0, 0, 0, max(0, frames - mel.shape[1])))
    inside = (torch.arange(frames, device=mel.device) < valid_frames.to(mel.device)[:, None])[:, :, None]
    floor = torch.where(inside, mel, -torch.inf).amax(dim=(1, 2), keepdim=True) - top_db
    padded = torch.where(inside, mel, floor)
    mean = padded.mean(dim=(1, 2), keepdim=True)
    deviation = padded.std(dim=(1, 2), keepdim=True, correction=0)
    return (padded - mean) / (deviation + EPSILON), None
