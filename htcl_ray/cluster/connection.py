"""The connection to Ray, with Ray's own output kept out of the terminal.

Ray's logs go to files, whose folder is printed once. Remote workers print to the terminal through `progress_lines`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from htcl_ray.cluster.ray_internals import (
    few_processes,
    in_task_or_actor,
    keep_nodes_of_ray_data,
    loopback_node,
    mute_data_errors,
    on_private_cluster,
    private_cluster_options,
    session_folder,
)
from htcl_ray.config import Config
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.progress import print_line
from htcl_ray.workspace.credentials import without_credentials
from htcl_ray.workspace.filesystem import storage_errors, storage_failure
from htcl_ray.workspace.local_copies import private_folder, private_name
from htcl_ray.workspace.paths import absolute_sqlite, is_relative

TRAIN_VARIABLES = {
    # Ray Train takes reports when it polls its workers, by default every 2 s: longer than an epoch of a small
    # catalogue.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # It gives up on workers that have no node after a minute; a cloud takes several to start one, and spot nodes may be
    # gone for longer.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
}
"""Environment variables of a run of Ray Train and of its controller, if they are not set otherwise."""


def connect(config: Config, metrics_port: int | None = None) -> None:
    """Connect this process to Ray: to `ray.address`, to the cluster of the job, or to a private cluster.

    A private cluster runs on this machine, is started here, and listens on loopback only. `metrics_port`: of its
    Prometheus exporter; default a free one. Does nothing when the process is already connected.
    """
    if "ray" not in sys.modules:
        # Ray reads this once, when it is imported. Set later, it would reach only the processes that Ray starts, which
        # would then refuse their own driver.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        # Ray warns of many processes for few CPUs, which no other switch suppresses. Training keeps idle processes on
        # purpose.
        os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "PYTHON worker processes have been started")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "0")
    import ray

    if ray.is_initialized():
        return
    address = address_of(config)
    refuse_relative_paths(config)
    local_only: dict[str, Any] = {}
    if address == "local":
        # Its only machine is never taken away while the cluster stays, so no process has to watch for that.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        # Its processes inherit these variables; see `torch_trainer`.
        for name, value in {**TRAIN_VARIABLES, "RAY_WARN_BLOCKING_GET_INSIDE_ASYNC": "0"}.items():
            os.environ.setdefault(name, value)
        local_only = {
            "num_cpus": config.ray.num_cpus or max(4, os.cpu_count() or 1),
            "object_store_memory": config.ray.object_store_bytes,
            "include_dashboard": False,
            **private_cluster_options(ray_folder(), metrics_port),
        }
    else:
        _check_reachable(address)
    for name in ("ray", "ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with contextlib.ExitStack() as private:
            if address == "local":
                private.enter_context(loopback_node())
                private.enter_context(few_processes())
            ray.init(
                address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True, **local_only
            )
    except Exception as error:
        ray.shutdown()
        if failure := storage_failure(error, f"Ray's folder {local_only.get('_temp_dir', 'for temporary files')}"):
            raise failure from error
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if address == "local":
            raise StepError(
                f"Ray did not start on this machine: {reason} Its logs are in {ray_folder()}/session_latest/logs; "
                "when the machine is busy, run the same command again"
            ) from error
        raise StepError(f"cannot connect to Ray at '{address}': {reason}; check ray.address or RAY_ADDRESS") from error
    _quiet_ray_data()
    if address == "local":
        keep_nodes_of_ray_data()
    session = session_folder() if address == "local" else "the cluster's head node"
    named = "private cluster on this machine" if address == "local" else without_credentials(address)
    print(f"Ray: {named}; its logs are in {session}", flush=True)


CONNECT_SECONDS = 10.0


def _check_reachable(address: str) -> None:
    """Raise StepError when nothing listens at host:port, to which Ray would try to connect for minutes."""
    match = re.fullmatch(r"(?:ray://)?\[?(.+?)\]?:(\d+)", address)
    if match is None:
        return
    try:
        socket.create_connection((match[1], int(match[2])), CONNECT_SECONDS).close()
    except OSError as error:
        raise StepError(
            f"cannot connect to Ray at '{address}': {error.strerror or error}; check ray.address or RAY_ADDRESS"
        ) from error


RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"
SOCKET_PATH_BYTES = 103
"""Longest path of a Unix socket: 107 bytes on Linux, 103 on macOS."""


def ray_folder() -> str:
    """Folder of the sessions of a private cluster.

    It is in a private folder of this user, since Ray lets every user write into a session: below RAY_TMPDIR or TMPDIR,
    as in Ray, or below /tmp when socket paths would be too long.
    """
    parent = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    with storage_errors(f"{parent}, the folder for temporary files"):
        return f"{private_folder(socket_folder(f'/{private_name()}-12345678{RAY_SOCKET}', parent))}/ray"


def socket_folder(name: str, folder: str) -> str:
    """Return `folder`, or /tmp when the path of the socket `name` below it would be too long."""
    folder = os.path.abspath(folder)
    return folder if len(os.fsencode(folder + name)) <= SOCKET_PATH_BYTES else "/tmp"


def address_of(config: Config) -> str:
    """Address that `connect` uses: that of a cluster, or `local` for a private cluster."""
    return config.ray.address or os.environ.get("RAY_ADDRESS") or "local"


def refuse_relative_paths(config: Config) -> None:
    """Raise ConfigError for a relative path of the workspace or of MLflow's file in a job on another machine.

    The working directory of such a job is temporary, and the files would be lost with it. So is that of a task, in
    which `serve deploy` builds the application.
    """
    if address_of(config) == "local" and not _in_task():
        return
    if is_relative(config.workspace):
        raise ConfigError(
            f"the workspace '{config.workspace}' is relative, and on a remote cluster the job's directory is "
            "temporary; give an absolute path that every node sees, or s3:// or gs://, with --workspace"
        )
    uri = config.tracking.mlflow_uri or ""
    if "mlflow" in config.tracking.trackers and absolute_sqlite(uri) != uri:
        raise ConfigError(
            f"tracking.mlflow_uri is '{uri}', a relative file, and on a remote cluster the job's directory is "
            "temporary; expected a server, or sqlite:////ABSOLUTE/FILE"
        )


def _in_task() -> bool:
    """Whether this code runs in a task or actor of Ray and not in the process of a command."""
    if "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized()) and in_task_or_actor()


def _quiet_ray_data() -> None:
    """Keep the progress and the errors of Ray Data, which its log file has, out of the terminal."""
    from ray.data import DataContext

    DataContext.get_current().enable_progress_bars = False
    mute_data_errors()


class LinePipe:
    """Named pipe of this machine whose lines a command prints: what a worker on a private cluster writes to.

    A line below 4,096 bytes is never mixed with that of another worker.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def put_nowait(self, line: str) -> None:
        """Send a line without waiting; it is lost when the command no longer reads, or is 64 kB of lines behind."""
        with contextlib.suppress(OSError):
            pipe = os.open(self.path, os.O_WRONLY | os.O_NONBLOCK)
            try:
                os.write(pipe, f"{line}\n".encode())
            finally:
                os.close(pipe)


@contextlib.contextmanager
def progress_lines() -> Iterator[Any]:
    """Object by which remote workers print here until the block ends: `lines.put_nowait("line")`.

    On a private cluster it is a named pipe, which needs no process.
    """
    with (_piped_lines if on_private_cluster() else _queued_lines)() as lines:
        yield lines


@contextlib.contextmanager
def _piped_lines() -> Iterator[LinePipe]:
    with tempfile.TemporaryDirectory(dir=private_folder(), prefix="lines-") as folder:
        lines = LinePipe(Path(folder) / "pipe")
        os.mkfifo(lines.path, mode=0o600)
        # Open for writing too, so that reading does not end while no worker has the pipe open.
        reader = os.fdopen(os.open(lines.path, os.O_RDWR), encoding="utf-8", errors="replace")

        def print_until_stopped() -> None:
            with reader, contextlib.suppress(BrokenPipeError):  # as in `_queued_lines`
                for line in iter(reader.readline, LAST_LINE):
                    print_line(line.removesuffix("\n"))

        printer = threading.Thread(target=print_until_stopped, name="progress-lines", daemon=True)
        printer.start()
        try:
            yield lines
        finally:
            lines.put_nowait(LAST_LINE.removesuffix("\n"))
            printer.join(timeout=10)


LAST_LINE = "\0\n"
"""Line that ends the reading of a pipe."""


@contextlib.contextmanager
def _queued_lines() -> Iterator[Any]:
    from ray.util.queue import Empty, Queue

    queue = Queue(actor_options={"num_cpus": 0})
    stop = threading.Event()

    def print_waiting() -> None:
        with contextlib.suppress(Empty):
            while True:
                print_line(queue.get_nowait())

    def print_until_stopped() -> None:
        with contextlib.suppress(
            BrokenPipeError
        ):  # the reader is gone; the next line of the main thread ends the command
            while not stop.wait(0.3):
                print_waiting()
            print_waiting()

    printer = threading.Thread(target=print_until_stopped, name="progress-lines", daemon=True)
    printer.start()
    try:
        yield queue
    finally:
        stop.set()
        printer.join(timeout=10)
        queue.shutdown()
