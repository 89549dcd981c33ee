"""Decode audio files and compute log-mel spectrograms. Functions on arrays, without Ray and torch."""

from htcl_ray.audio.decode import check_audible, decode, decode_clip
from htcl_ray.audio.log_mel import as_waveform, log_mel

__all__ = ["as_waveform", "check_audible", "decode", "decode_clip", "log_mel"]
