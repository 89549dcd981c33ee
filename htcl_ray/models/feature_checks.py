"""Checks of the features that a model embeds."""

from __future__ import annotations

import torch
from torch import Tensor

from htcl_ray.errors import AudioError, InputError
from htcl_ray.models.record import ModelRecord
from htcl_ray.schemas import Reason

LARGEST = {"log_mel": 1e4}
"""Largest absolute value by extractor; 1e4 dB is far beyond the log-mel of any waveform of finite samples."""
LARGEST_NUMBER = 65504.0
"""Largest absolute value of other features: that of float16, in which they are stored."""


def check_features(
    features: Tensor, valid_frames: Tensor | None, record: ModelRecord, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return features [B, F, W] as a tensor on `device`, and their valid frames [B] int64 on the CPU (default: all F).

    Raises InputError for other types and shapes, AudioError (not_finite) for values in a valid frame that no features
    of the extractor have.
    """
    is_mel = record.audio.extractor == "log_mel"
    kind, unit, row_name = ("log-mel", " dB", "clip") if is_mel else ("features tensor", "", "song")
    features = torch.as_tensor(features)
    width = record.input_width
    if features.ndim != 3 or features.shape[2] != width or features.shape[1] == 0 or not features.is_floating_point():
        raise InputError(
            f"the {kind} is {features.dtype} {list(features.shape)}; "
            f"expected [batch, frames, {width}], floats with frames at least 1"
        )
    frames = features.shape[1]
    given = torch.full((len(features),), frames) if valid_frames is None else torch.as_tensor(valid_frames).cpu()
    valid = given.to(torch.int64)
    if (
        valid.shape != (len(features),)
        or not torch.equal(valid.to(given.dtype), given)
        or ((valid < 1) | (valid > frames)).any()
    ):
        raise InputError(
            f"valid_frames is {given.tolist()[:8]}; expected {len(features)} whole numbers from 1 to {frames}"
        )
    largest = LARGEST.get(record.audio.extractor, LARGEST_NUMBER)
    inside = torch.arange(frames) < valid[:, None]
    features = features.to(device)
    absurd = (~(features.abs() <= largest).all(dim=2)).cpu() & inside  # true for a NaN
    if absurd.any():
        row = int(absurd.any(dim=1).nonzero()[0])
        raise AudioError(
            Reason.NOT_FINITE, f"the {kind} of {row_name} {row} holds NaN, or values beyond ±{largest:,.0f}{unit}"
        )
    return features, valid
