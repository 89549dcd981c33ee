"""Setup of Ray's HAProxy as reverse proxy of the replicas: on `serve.host`, with private ports, limits and metrics.

HAProxy sends a request straight to the HTTP server of a replica; without it every request passes through two more
Python processes (measurements: docs/decisions/0018-front.md). Ray reads these settings when its Serve processes start,
so they must be set before Ray starts, and they reach only a cluster that this process starts. For another cluster, set
them in the environment of its nodes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htcl_ray.cluster.connection import address_of, socket_folder
from htcl_ray.cluster.ray_internals import HAPROXY_SWITCH, haproxy_variables
from htcl_ray.config import Config
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.serving import haproxy
from htcl_ray.serving.haproxy import Front
from htcl_ray.workspace.local_copies import private_folder

IDLE_CLIENT_SECONDS = 30
"""Time after which HAProxy closes an idle connection of a client."""
REPLICA_PORTS = 100
"""Number of ports for the replicas of one application. Ranges of several applications on one machine rarely overlap;
tokens tell them apart if they do."""
METRICS_PORT = 9464
"""Default port of OpenTelemetry's Prometheus exporters."""


@contextmanager
def haproxy_front(config: Config) -> Iterator[None]:
    """Make the Ray that this process starts in the block use HAProxy, unless the environment switches it off.

    Does nothing for a cluster that already runs, and where the HAProxy of `ray[serve]` is not installed. Raises
    ConfigError for a metrics port that is in use, and StepError when Ray Serve was already imported.
    """
    binary = haproxy.find_binary()
    if os.environ.get(HAPROXY_SWITCH, "1") != "1" or binary is None or address_of(config) != "local":
        yield
        return
    if "ray.serve" in sys.modules:
        raise StepError(
            "HAProxy was set up after Ray Serve was imported, which reads the settings once; set it up first"
        )
    with _default_metrics_port() as owns_default:
        inside = socket_folder("/htcl-front-12345678/admin.sock", tempfile.gettempdir())
        folder = Path(tempfile.mkdtemp(prefix="htcl-front-", dir=inside))  # of mode 0700
        metrics, fallback, fallback_grpc, metrics_source, haproxy_metrics, statistics = _ports(
            config.serve, owns_default
        )
        first_port = 20_000 + REPLICA_PORTS * secrets.randbelow(120)  # below Linux's ports of outgoing connections
        front = Front(
            binary=binary,
            host=_bracketed(config.serve.host),
            max_requests=config.serve.ingress_replicas * config.serve.most_in_progress,
            token=secrets.token_hex(16),
            metrics=f"{_bracketed(config.serve.metrics_host)}:{metrics}",
            metrics_source=metrics_source,
            trusted_proxies=config.serve.trusted_proxies,
            stop_file=str(folder / "stop"),
        )
        variables = {
            **haproxy_variables(
                folder,
                metrics_port=haproxy_metrics,
                statistics_port=statistics,
                fallback_port=fallback,
                fallback_grpc_port=fallback_grpc,
                replica_ports=range(first_port, first_port + REPLICA_PORTS),
                idle_client_seconds=IDLE_CLIENT_SECONDS,
                response_seconds=config.serve.receive_seconds + config.serve.request_seconds + 5,
            ),
            haproxy.OPTIONS: front.to_json(),
            haproxy.BINARY_PATH: str(_program(folder)),
        }
        before = {name: os.environ[name] for name in variables if name in os.environ}  # such as those of an image
        os.environ.update(variables)
        try:
            yield
        finally:
            for name in variables:
                del os.environ[name]
            os.environ.update(before)
            shutil.rmtree(folder, ignore_errors=True)


def active_front() -> Front | None:
    """Options of the HAProxy that `haproxy_front` set up; None without one."""
    return Front.from_environment(os.environ) if haproxy.OPTIONS in os.environ else None


def check_port(host: str, port: int, prefix: str = "serve.") -> int:
    """Return the port if it is free, or a free port for 0.

    Raises ConfigError that names the configuration keys `prefix`host and `prefix`port.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host} port {port} ({error.strerror or error}); choose another with "
                f"--set {prefix}port=N (0 picks a free one) or --set {prefix}host=ADDRESS"
            ) from None
        return int(probe.getsockname()[1])


def _ports(settings: ServeSettings, owns_default: bool) -> list[int]:
    """The metrics port and five free ports of loopback, all different."""
    with contextlib.ExitStack() as held:
        free = []
        for _ in range(5):
            probe = held.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            free.append(int(probe.getsockname()[1]))
        if settings.metrics_port is not None:
            return [check_port(settings.metrics_host, settings.metrics_port, "serve.metrics_"), *free]
        if owns_default:
            with contextlib.suppress(ConfigError):
                return [check_port(settings.metrics_host, METRICS_PORT, "serve.metrics_"), *free]
        return [check_port(settings.metrics_host, 0, "serve.metrics_"), *free]


@contextmanager
def _default_metrics_port() -> Iterator[bool]:
    """Whether this process may use `METRICS_PORT`, which one service of a user and machine has at a time.

    HAProxy binds the port seconds after it was checked, so two services that start together would both choose it.
    """
    with (private_folder() / "metrics-port.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _program(folder: Path) -> Path:
    """Create an executable that runs `haproxy.py` with this interpreter."""
    program = folder / "haproxy"
    program.write_text(
        f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -I -S {shlex.quote(haproxy.__file__)} "$@"\n', encoding="utf-8"
    )
    program.chmod(0o700)
    return program


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
