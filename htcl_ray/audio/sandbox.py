"""Decoding in child processes, so that an upload that crashes, stalls or swells a decoder costs that process and
nothing else.

A process is warm when it gets a file, is used for many, and is replaced when a file ended it. What it answers is
checked like any other input, because a file may have taken it over. It is given no environment but the paths of
libraries, and no open file but its pipes.
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
from concurrent.futures import Future
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
"""Then it is replaced: whatever a decoding library leaks goes with it."""
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
    """A fixed number of decoding processes that serve callers of any thread in the order of their coming."""

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
        """Start the processes side by side and wait until they are warm. Raises StepError when one does not start.

        `seconds`: wall-clock time of one file, and of waiting for a free process. `cpu_seconds`: CPU time of one file.
        `memory_bytes`: what a process may hold in memory. `max_seconds`, `max_channels`, `max_sample_rate` (Hz): what a
        file may declare.
        """
        limits = Limits(max_seconds, max_channels, max_sample_rate, cpu_seconds)
        told = {"recipe": recipe.model_dump(), "limits": limits._asdict(), "memory_bytes": memory_bytes}
        self._told = json.dumps(told).encode()
        self._recipe = recipe
        self._seconds = seconds
        self._lock = threading.Lock()
        self._free: deque[_Process] = deque()
        self._waiting: deque[Future[_Process]] = deque()
        self._processes: set[_Process] = set()
        self._closed = False
        self.restarts = 0
        """Processes that a file ended, or that ended by themselves, since the start."""
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
        """Of the processes that run now."""
        with self._lock:
            return sorted(process.pid for process in self._processes)

    def decode(self, data: bytes) -> FloatArray:
        """Log-mel [frames, n_mels] in dB of the first `recipe.clip_seconds` of an audio file's bytes, as the catalogue
        is embedded.

        Equal to `log_mel(decode(data, recipe), …)`. Blocks; may be called from any thread. Raises AudioError: the
        reasons of `decode` with limits, and decoder_timed_out and decoder_crashed for a file that stalled or ended its
        process; TimeoutError when no process was free in time, StepError when closed.
        """
        while (process := self._take()).is_dead:  # something outside ended it, and no file is to blame
            self._give_back(process, False)
        intact = False
        try:
            answer = self._ask(process, data)
            intact = True
        finally:
            self._give_back(process, intact)
        if isinstance(answer, AudioError):
            raise answer
        return answer

    def close(self) -> None:
        """End the processes. Who waits for one, or is being served, gets an error."""
        with self._lock:
            self._closed = True
            waiting, self._waiting = self._waiting, deque()
            free, self._free = self._free, deque()
            busy, self._processes = self._processes - set(free), set()
        for future in waiting:
            with contextlib.suppress(Exception):  # it may have given up at this moment
                future.set_exception(StepError("the decoders were closed"))
        for process in free:
            process.end()
        for process in busy:  # whoever uses its pipes closes them
            process.kill()

    def _ask(self, process: _Process, data: bytes) -> FloatArray | AudioError:
        """What the process answers: a log-mel, or why it refuses the file. Raises AudioError when the file ended or
        stalled it.
        """
        try:
            process.wait_until_warm()
        except StepError as error:
            raise TimeoutError(str(error)) from None
        deadline, mels = time.monotonic() + self._seconds, self._recipe.n_mels
        try:
            process.send(data, deadline)
            answer = json.loads(process.receive(MAX_DETAIL_BYTES, deadline))
            if "reason" in answer:
                return AudioError(Reason(answer["reason"]), str(answer["detail"])[:1_000])
            frames = int(answer["frames"])
            if not 1 <= frames <= self._recipe.max_frames:
                raise ValueError(f"it answered a log-mel of {frames} frames")
            floats = np.frombuffer(process.receive(4 * mels * frames, deadline), dtype="<f4")
            return floats.astype(np.float32).reshape(frames, mels)
        except TimeoutError:
            detail = f"decoding took longer than {self._seconds:g} s and was ended; send a shorter or simpler file"
            raise AudioError(Reason.DECODER_TIMED_OUT, detail) from None
        except (OSError, EOFError, ValueError, KeyError, TypeError):
            detail = (
                "it ended the process that decoded it; the file is damaged, or decoding it takes more than serve.decode_bytes of memory or "
                "serve.decode_cpu_seconds of CPU time"
            )
            raise AudioError(Reason.DECODER_CRASHED, detail) from None

    def _take(self) -> _Process:
        """A free process; who came first gets one first."""
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
            if not future.cancel():  # one came at this very moment
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
        process = _Process(self._told)
        with self._lock:
            if not self._closed:
                self._processes.add(process)
        self._offer(process)

    def _offer(self, process: _Process) -> None:
        """To who waits longest, or to who comes next."""
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
    """One child and the pipes to it. Used by one thread at a time."""

    def __init__(self, told: bytes) -> None:
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
            start_new_session=True,  # Ctrl-C is for the parent, which drains first
        )
        self.pid = self._child.pid
        self.files = 0
        self._told: bytes | None = told
        self._warm_by = time.monotonic() + START_SECONDS
        for pipe in self._pipes:
            os.set_blocking(pipe.fileno(), False)

    @property
    def _pipes(self) -> tuple[Any, Any]:
        return self._child.stdin, self._child.stdout

    def wait_until_warm(self) -> None:
        """Raise StepError when it does not get there."""
        if self._told is None:
            return
        try:
            self.send(self._told, self._warm_by)
            self.receive(0, self._warm_by)
        except (OSError, EOFError, ValueError) as error:
            raise StepError(
                f"the decoding process does not start ({error or type(error).__name__}); its standard error says why"
            ) from None
        self._told = None

    def send(self, message: bytes, deadline: float) -> None:
        """Raises TimeoutError, or OSError when the child is gone."""
        pipe = self._pipes[0]
        for part in (len(message).to_bytes(LENGTH_BYTES, "big"), message):
            rest = memoryview(part)
            while rest:
                _wait(deadline, writing=pipe)
                rest = rest[os.write(pipe.fileno(), rest[:PIPE_BYTES]) :]

    def receive(self, most: int, deadline: float) -> bytes:
        """One message. Raises TimeoutError, EOFError when the child is gone, ValueError when the message is longer than
        `most` bytes.
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
        """Whether it was warm and has ended since."""
        return self._told is None and self._child.poll() is not None

    def kill(self) -> None:
        """By its id, without waiting."""
        self._child.kill()

    def end(self) -> None:
        """Kill it, if it has not ended, and close the pipes."""
        self._child.kill()
        self._child.wait()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.close()


def _wait(deadline: float, *, reading: Any = None, writing: Any = None) -> None:
    """Until the pipe can be used. Raises TimeoutError at the deadline."""
    poll = select.poll()  # not select, which takes no descriptor above 1,023
    poll.register(reading or writing, select.POLLIN if reading else select.POLLOUT)
    left = deadline - time.monotonic()
    if left <= 0 or not poll.poll(left * 1_000):
        raise TimeoutError
