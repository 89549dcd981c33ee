"""Sandboxed decoder processes for uploads that may crash the decoder, hang it or exceed its memory limit.

The processes are started and warmed up in advance, decode many files each, and are replaced after a failure. Their
responses are validated like any other input, because a hostile file may have taken the process over. They inherit only
the environment variables that libraries need, and no open files except their pipes.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import Future, InvalidStateError
from pathlib import Path
from typing import Any

import numpy as np

from htcl_ray.audio.decode import FloatArray, Limits
from htcl_ray.audio.sandbox_worker import LENGTH_BYTES
from htcl_ray.config.sections import AudioRecipe
from htcl_ray.errors import AudioError, StepError
from htcl_ray.schemas import Reason

START_SECONDS = 60.0
FILES_PER_PROCESS = 2_000
"""A process is replaced after this many files, which frees memory that decoding libraries leak."""
KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR", "SYSTEMROOT")
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
PIPE_BYTES = 1 << 16
MAX_DETAIL_BYTES = 100_000


class Decoders:
    """A pool of sandboxed decoder processes; waiting callers of any thread are served first come, first served."""

    def __init__(
        self,
        recipe: AudioRecipe,
        *,
        processes: int,
        seconds: float,
        cpu_seconds: float,
        memory_bytes: int,
        max_seconds: float,
        max_channels: int,
        max_sample_rate: int,
    ) -> None:
        """Start all processes concurrently and wait until they are warm. Raises StepError when one does not start.

        `seconds`: wall-clock limit for one file, and for waiting for a free process. `cpu_seconds`: CPU limit for one
        file. `memory_bytes`: memory limit of a process. `max_seconds`, `max_channels`, `max_sample_rate` (Hz): limits
        for the values in a file's header.
        """
        limits = Limits(max_seconds, max_channels, max_sample_rate, cpu_seconds)
        settings = {"recipe": recipe.model_dump(), "limits": limits._asdict(), "memory_bytes": memory_bytes}
        self._settings = json.dumps(settings).encode()
        self._recipe = recipe
        self._seconds = seconds
        self._lock = threading.Lock()
        self._free: deque[_Process] = deque()
        self._waiting: deque[Future[_Process]] = deque()
        self._processes: set[_Process] = set()
        self._closed = False
        self.restarts = 0
        """Number of processes replaced since the start because they crashed, hung or exceeded a limit."""
        for _ in range(processes):
            self._add()
        try:
            for process in list(self._processes):
                process.wait_until_warm()
        except StepError:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        """Ids of the running processes."""
        with self._lock:
            return sorted(process.pid for process in self._processes)

    @property
    def waiting(self) -> int:
        """Number of callers that wait for a free process."""
        with self._lock:
            return len(self._waiting)

    def decode(self, data: bytes) -> FloatArray:
        """Compute the log-mel [frames, n_mels] in dB of the first `recipe.clip_seconds` of an audio file's bytes.

        For a pretrained encoder, the waveform [samples, 1] in its place. Equal to `log_mel(decode(data, recipe), …)`,
        which embeds the catalogue. Blocks; thread-safe. Raises AudioError for the reasons of `decode` with limits, and
        with decoder_timed_out or decoder_crashed for a file that hung or crashed its process; TimeoutError when no
        process was free in time; StepError after `close`.
        """
        while (process := self._take()).is_dead:  # killed from outside: no fault of the file
            self._give_back(process, False)
        intact = False
        try:
            response = self._request(process, data)
            intact = True
        finally:
            self._give_back(process, intact)
        if isinstance(response, AudioError):
            raise response
        return response

    def close(self) -> None:
        """End the processes. Waiting and running calls of `decode` raise an error."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            free, self._free = self._free, deque()
            busy, self._processes = self._processes - set(free), set()
        for future in waiting:
            with contextlib.suppress(InvalidStateError):  # its caller gave up at this moment
                future.set_exception(StepError("the decoders were closed"))
        for process in free:
            process.end()
        for process in busy:  # the thread that uses its pipes closes them
            process.kill()

    def _request(self, process: _Process, data: bytes) -> FloatArray | AudioError:
        """Send a file and return the log-mel, or the process's own AudioError for the file.

        Raises AudioError when the process crashed, hung or sent an invalid response.
        """
        try:
            process.wait_until_warm()
        except StepError as error:
            raise TimeoutError(str(error)) from None
        deadline, is_mel = time.monotonic() + self._seconds, self._recipe.extractor == "log_mel"
        width, most = (self._recipe.n_mels, self._recipe.max_frames) if is_mel else (1, self._recipe.max_samples)
        try:
            process.send(data, deadline)
            response = json.loads(process.receive(MAX_DETAIL_BYTES, deadline))
            if "reason" in response:
                return AudioError(Reason(response["reason"]), str(response["detail"])[:1_000])
            frames = int(response["frames"])
            if not 1 <= frames <= most:
                raise ValueError(f"the process returned {frames} frames")
            floats = np.frombuffer(process.receive(4 * width * frames, deadline), dtype="<f4")
            return floats.astype(np.float32).reshape(frames, width)
        except TimeoutError:
            detail = f"decoding took longer than {self._seconds:g} s and was ended; send a shorter or simpler file"
            raise AudioError(Reason.DECODER_TIMED_OUT, detail) from None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            detail = (
                "it ended the process that decoded it; the file is damaged, or decoding it takes more than "
                "serve.decode_bytes of memory or serve.decode_cpu_seconds of CPU time"
            )
            raise AudioError(Reason.DECODER_CRASHED, detail) from None

    def _take(self) -> _Process:
        """Wait for a free process, in order of arrival. Raises TimeoutError or, after `close`, StepError."""
        with self._lock:
            if self._closed:
                raise StepError("the decoders were closed")
            if self._free:
                return self._free.popleft()
            future: Future[_Process] = Future()
            self._waiting.append(future)
        try:
            return future.result(self._seconds)
        except TimeoutError:
            if not future.cancel():  # a process became free at this moment
                return future.result()
            with self._lock, contextlib.suppress(ValueError):
                self._waiting.remove(future)
            raise TimeoutError(
                f"no decoding process was free for {self._seconds:g} s; try again, or raise serve.decoders"
            ) from None

    def _give_back(self, process: _Process, intact: bool) -> None:
        process.files += 1
        if intact and process.files < FILES_PER_PROCESS:
            self._offer(process)
            return
        process.end()
        with self._lock:
            self._processes.discard(process)
            if self._closed:
                return
            self.restarts += not intact
        self._add()

    def _add(self) -> None:
        process = _Process(self._settings)
        with self._lock:
            if not self._closed:
                self._processes.add(process)
        self._offer(process)

    def _offer(self, process: _Process) -> None:
        """Hand a process to the caller that has waited longest, or keep it for the next one."""
        with self._lock:
            if not self._closed:
                while self._waiting:
                    future = self._waiting.popleft()
                    if future.set_running_or_notify_cancel():
                        future.set_result(process)
                        return
                self._free.append(process)
                return
        process.end()


class _Process:
    """A child process and the pipes to it. Used by one thread at a time."""

    def __init__(self, settings: bytes) -> None:
        package = str(Path(__file__).resolve().parents[2])
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([package, *filter(None, sys.path)]))
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "htcl_ray.audio.sandbox_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**environment, **SINGLE_THREADED},
            cwd="/",
            start_new_session=True,  # Ctrl-C reaches only the parent, which drains first
        )
        self.pid = self._child.pid
        self.files = 0
        self._settings: bytes | None = settings
        """Sent by `wait_until_warm`, then None."""
        self._warm_by = time.monotonic() + START_SECONDS
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)

    @property
    def _pipes(self) -> tuple[Any, Any]:
        return self._child.stdin, self._child.stdout

    def wait_until_warm(self) -> None:
        """Send the settings and wait for the confirmation. Raises StepError when the process does not start."""
        if self._settings is None:
            return
        try:
            self.send(self._settings, self._warm_by)
            self.receive(0, self._warm_by)
        except (OSError, EOFError, ValueError) as error:
            raise StepError(
                f"the decoding process does not start ({error or type(error).__name__}); its standard error says why"
            ) from None
        self._settings = None

    def send(self, message: bytes, deadline: float) -> None:
        """Send one message. Raises TimeoutError, or OSError when the child has ended."""
        pipe = self._pipes[0]
        for part in (len(message).to_bytes(LENGTH_BYTES, "big"), message):
            rest = memoryview(part)
            while rest:
                _wait(deadline, writing=pipe)
                rest = rest[os.write(pipe.fileno(), rest[:PIPE_BYTES]) :]

    def receive(self, most: int, deadline: float) -> bytes:
        """Receive one message.

        Raises TimeoutError, EOFError when the child has ended, and ValueError for a message of more than `most` bytes.
        """
        length = int.from_bytes(self._read(LENGTH_BYTES, deadline), "big")
        if length > most:
            raise ValueError(f"a message of {length} bytes; expected at most {most}")
        return self._read(length, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        pipe, data = self._pipes[1], bytearray()
        while len(data) < size:
            _wait(deadline, reading=pipe)
            part = os.read(pipe.fileno(), min(PIPE_BYTES, size - len(data)))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    @property
    def is_dead(self) -> bool:
        """Whether the process was warm and has ended since."""
        return self._settings is None and self._child.poll() is not None

    def kill(self) -> None:
        """Kill the process without waiting for its end."""
        self._child.kill()

    def end(self) -> None:
        """Kill the process, wait for its end and close the pipes."""
        self._child.kill()
        self._child.wait()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()


def _wait(deadline: float, *, reading: Any = None, writing: Any = None) -> None:
    """Wait until the pipe is readable or writable. Raises TimeoutError at the deadline."""
    poll = select.poll()  # select.select takes no descriptor above 1,023
    poll.register(reading or writing, select.POLLIN if reading else select.POLLOUT)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1_000):
        raise TimeoutError
