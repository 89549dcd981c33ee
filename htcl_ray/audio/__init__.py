"""Bytes → waveform → log-mel spectrogram. Plain functions on arrays: no Ray, no torch, nothing that makes a data worker
large.
"""

from htcl_ray.audio.decode import check_audible, decode, decode_clip
from htcl_ray.audio.log_mel import as_waveform, log_mel

__all__ = ["as_waveform", "check_audible", "decode", "decode_clip", "log_mel"]
