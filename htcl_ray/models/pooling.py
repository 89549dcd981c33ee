"""Windows of a long clip: their starts, their frames, and the mean of their vectors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def window_starts(frames: int, window: int | None) -> list[int]:
    """First frame of each window of a clip with `frames` frames. Every window has min(frames, window) frames.

    As few windows as cover every frame, ceil(frames / window): the first at the clip's start, the last at its end, the
    others spaced evenly between them (rounded down), so neighbours overlap where the length is no multiple. With a
    window of None, the whole clip is one window.
    """
    if window is None or frames <= window:
        return [0]
    last = -(-frames // window) - 1
    return [number * (frames - window) // last for number in range(last + 1)]


def cut(mel: Tensor, starts: Tensor, lengths: Tensor, clips: Tensor) -> Tensor:
    """Cut windows [n, longest, M] out of `mel` [B, F, M], padded with zeros.

    Window i is `lengths[i]` frames of clip `clips[i]` from `starts[i]` on.
    """
    windows = mel.new_zeros(len(starts), int(lengths.max()), mel.shape[2])
    for window, start, length, clip in zip(windows, starts.tolist(), lengths.tolist(), clips.tolist(), strict=True):
        window[:length] = mel[clip, start : start + length]
    return windows


def mean_direction(vectors: Tensor, clips: Tensor, count: int) -> Tensor:
    """Average the unit-norm vectors [n, dim] of windows by clip and normalise, [count, dim].

    Window i belongs to clip `clips[i]`.
    """
    total = torch.zeros(count, vectors.shape[1]).index_add_(0, clips, vectors)
    return F.normalize(total, dim=1)
