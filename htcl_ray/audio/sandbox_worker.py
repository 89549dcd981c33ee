"""Program of a sandboxed decoder process: audio files on standard input, log-mels or waveforms on standard output.

Started by `htcl_ray.audio.sandbox`; ends when its standard input ends. A message is its length (8 bytes, big endian)
followed by its bytes. The first message is the configuration as JSON; the response is an empty message once all
libraries are loaded. The response to each file is a JSON message, {"frames": number of frames} followed by the log-mel
as one message of float32, or {"reason", "detail"}. For a pretrained encoder, which runs in another process, the
waveform takes the place of the log-mel.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import io
import json
import math
import os
import pkgutil
import resource
from typing import IO, Any

import numpy as np
import soundfile
import soxr

from htcl_ray.audio.decode import Limits, decode
from htcl_ray.audio.log_mel import log_mel
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError

LENGTH_BYTES = 8


def main() -> None:
    """Decode files until the input ends."""
    source = os.fdopen(os.dup(0), "rb", buffering=0)
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    os.dup2(0, 1)  # decoding libraries print to standard output
    message = _read(source)
    if message is None:
        return
    settings = json.loads(message)
    recipe, limits = AudioRecipe(**settings["recipe"]), Limits(**settings["limits"])
    _warm_up(recipe)
    os.dup2(0, 2)
    _confine(settings["memory_bytes"])
    _write(sink, b"")
    while (data := _read(source)) is not None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        # The deadline of `decode` is not checked within one call of a library.
        cpu_seconds = math.ceil(used.ru_utime + used.ru_stime + limits.cpu_seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_seconds, resource.RLIM_INFINITY))
        try:
            clip = decode(data, recipe, limits)
            if recipe.extractor == "log_mel":
                clip = log_mel(clip, recipe.sample_rate, recipe)
        except AudioError as error:
            _write(sink, _json(reason=error.reason, detail=error.detail))
            continue
        finally:
            del data
        _write(sink, _json(frames=len(clip)))
        _write(sink, clip.astype("<f4", copy=False).tobytes())


def _warm_up(recipe: AudioRecipe) -> None:
    """Load every library that decoding needs, because no file can be opened after `_confine`."""
    file, rate = io.BytesIO(), 16_000
    soundfile.write(file, np.zeros(rate, dtype=np.float32), rate, format="FLAC")
    file.seek(0)
    log_mel(soundfile.read(file, dtype="float32")[0], rate, recipe)
    soxr.ResampleStream(2 * rate, rate, 1, dtype="float32", quality="HQ").resample_chunk(
        np.zeros(rate, dtype=np.float32), last=True
    )
    with contextlib.suppress(ImportError):
        import av

        for module in pkgutil.walk_packages(av.__path__, "av."):  # PyAV imports them lazily
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
        file.seek(0)
        with av.open(file, format="flac") as container:
            list(container.decode(audio=0))
    gc.collect()
    gc.freeze()


def _confine(memory_bytes: int) -> None:
    """Restrict this process: no new file or socket, no writes to disk, no core dump, limited memory."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")
    with open("/proc/self/statm", encoding="ascii") as file:
        reserved, resident = (int(pages) * resource.getpagesize() for pages in file.read().split()[:2])
    address_space = reserved + max(0, memory_bytes - resident)  # libraries reserve more than they use
    for limit, value in (
        (resource.RLIMIT_AS, address_space),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _read(source: IO[bytes]) -> bytes | None:
    """Read one message; None at the end of the input."""
    length = _read_exactly(source, LENGTH_BYTES)
    return _read_exactly(source, int.from_bytes(length, "big")) if length is not None else None


def _read_exactly(source: IO[bytes], size: int) -> bytes | None:
    data = bytearray(size)
    view, got = memoryview(data), 0
    while got < size:
        count: Any = source.readinto(view[got:])  # type: ignore[attr-defined]
        if not count:
            return None
        got += count
    view.release()
    return bytes(data)


def _write(sink: IO[bytes], message: bytes) -> None:
    sink.write(len(message).to_bytes(LENGTH_BYTES, "big") + message)
    sink.flush()


def _json(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


if __name__ == "__main__":
    main()
