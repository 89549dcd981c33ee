"""Which parts of a long clip its windows of a fixed length are."""

from __future__ import annotations


def window_starts(frames: int, window: int | None) -> list[int]:
    """First frame of each window of a clip with `frames` frames. Every window has min(frames, window) frames.

    As few windows as hear every frame, ceil(frames / window): the first at the clip's start, the last at its end, the others spaced
    evenly between them (rounded down), so neighbours overlap where the length is no multiple. None is one window, the whole clip.
    """
    if window is None or frames <= window:
        return [0]
    last = -(-frames // window) - 1
    return [number * (frames - window) // last for number in range(last + 1)]
