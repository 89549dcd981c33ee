"""The service on an address that other machines reach: in a network namespace of its own, whose loopback has such an
address as well."""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from htcl_ray.config import Config
from tests.worlds.processes import command_line, descendants, spawn
from tests.worlds.small_workspace import song_id, write_other_index

pytestmark = pytest.mark.serve

Run = Callable[[Callable[[], Any]], Any]
ADDRESS = "203.0.113.7"
"""Of a block that is kept for documentation, so that it reaches no machine."""
KEY = {"authorization": "Bearer a-key-of-this-test-01"}
KEYS = "- {name: test, key: a-key-of-this-test-01, scopes: [write]}\n"
CLONE_NEWNET = 0x40000000
SIOCSIFADDR, SIOCGIFFLAGS, SIOCSIFFLAGS = 0x8916, 0x8913, 0x8914
IFF_UP = 1


@pytest.fixture(scope="module")
def inside() -> Iterator[Run]:
    """Runs a function in a thread with a network of its own, which threads, processes and sockets inherit. Needs root,
    as CI has."""
    with ThreadPoolExecutor(1, initializer=_enter_network) as pool:
        yield lambda body: pool.submit(body).result()


def _enter_network() -> None:
    library = ctypes.CDLL(None, use_errno=True)
    if library.unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "unshare")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.unpack("16sh", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16sh14x", b"lo", 0))[:18])[1]
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))
        address = struct.pack("16sHH4s8x", b"lo:1", socket.AF_INET, 0, socket.inet_aton(ADDRESS))
        fcntl.ioctl(control, SIOCSIFADDR, address)


@dataclass
class Server:
    """A running `htcl serve`."""

    process: subprocess.Popen[str]
    url: str
    metrics: str
    index: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def pids(self, pattern: str) -> list[int]:
        """Of the processes that it started, those whose command line has the pattern."""
        return [pid for pid in descendants(self.process.pid) if re.search(pattern, command_line(pid))]


def start(workspace: str, *settings: str, **environment: str) -> Server:
    command = [str(Path(sys.executable).parent / "htcl"), "serve", "--preset", "demo", "--workspace", workspace]
    command += [
        word for setting in ("serve.port=0", "serve.poll_seconds=0.2", *settings) for word in ("--set", setting)
    ]
    process = spawn(*command, **environment)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("try:"):
            break
    text = "".join(lines)
    serving = re.search(r"serving index (\w+) .* at (http://\S+);", text)
    metrics = re.search(r"metrics for Prometheus: (http://\S+)", text)
    assert serving, text
    assert metrics, text
    return Server(process, serving[2], metrics[1], serving[1])


@pytest.fixture(scope="module")
def exposed(inside: Run, indexed: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """On every address, in an environment with a proxy that does not exist."""
    folder = tmp_path_factory.mktemp("exposed")
    (folder / "keys.yaml").write_text(KEYS)
    (folder / "keys.yaml").chmod(0o600)
    workspace = shutil.copytree(indexed.workspace, folder / "workspace")
    settings = (
        "serve.host=0.0.0.0",
        f"serve.api_keys_file={folder / 'keys.yaml'}",
        "serve.requests_per_second=5",
        "serve.request_burst=60",
    )
    server = inside(
        lambda: start(
            str(workspace), *settings, http_proxy="http://127.0.0.1:9", HTTP_PROXY="http://127.0.0.1:9", no_proxy=""
        )
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def private(inside: Run, indexed: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A second server of the machine, on loopback, with another index of the same songs."""
    folder = tmp_path_factory.mktemp("private")
    config = indexed.with_overrides({"workspace": str(shutil.copytree(indexed.workspace, folder / "workspace"))})
    write_other_index(config, "other")
    settings = ("serve.max_waiting_requests=8", "serve.receive_seconds=8", "serve.request_seconds=85")
    server = inside(lambda: start(config.workspace, *settings))  # a busy machine may need a minute for a new encoder
    yield server
    server.stop()


def address(server: Server) -> str:
    return f"http://{ADDRESS}:{server.port}"


def ask(url: str, **options: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=30) as client:
        return client.get(url, **options)


def test_only_the_service_can_be_reached_from_other_machines(inside: Run, exposed: Server, private: Server):
    """Every port of the address is tried."""

    def scan() -> list[int]:
        open_ports = []
        for port in range(1, 65_536):
            with socket.socket() as probe:
                if probe.connect_ex((ADDRESS, port)) == 0 and probe.getsockname() != probe.getpeername():
                    open_ports.append(port)
        return open_ports

    assert inside(scan) == [exposed.port]


def test_reads_from_other_machines_require_a_key_and_probes_do_not(inside: Run, exposed: Server):
    url = address(exposed)
    assert inside(lambda: ask(f"{url}/healthz")).status_code == 200
    assert inside(lambda: ask(f"{url}/readyz")).json()["index"] == exposed.index
    assert inside(lambda: ask(f"{url}/v1/index")).status_code == 401
    assert inside(lambda: ask(f"{url}/v1/index", headers=KEY)).json()["version"] == exposed.index
    assert inside(lambda: ask(f"{url}/v1/index", headers={**KEY, "host": "evil.example"})).status_code == 400


def test_addresses_that_a_client_makes_up_do_not_evade_its_rate_limit(inside: Run, exposed: Server):
    """The page needs no key, so its requests count by address; a burst of 60 is allowed."""

    def scene() -> tuple[list[int], int]:
        page = [
            ask(f"{address(exposed)}/", headers={"x-forwarded-for": f"198.51.100.{number}"}).status_code
            for number in range(150)
        ]
        return page, ask(f"{address(exposed)}/v1/index", headers=KEY).status_code

    page, with_key = inside(scene)
    assert set(page) == {200, 429}
    assert page[:50] == [200] * 50
    assert with_key == 200  # which has a bucket of its own


def test_metrics_are_on_loopback_and_those_of_two_servers_are_apart(inside: Run, exposed: Server, private: Server):
    assert exposed.metrics != private.metrics
    for server in (exposed, private):
        assert server.metrics.startswith("http://127.0.0.1:")
        assert "ray_" in inside(lambda server=server: ask(server.metrics)).text
        assert inside(lambda server=server: ask(server.metrics.replace("/metrics", "/v1/index"))).status_code == 404


def test_clients_that_stall_do_not_stop_the_service(inside: Run, private: Server):
    """Half-sent headers, bodies that never come to a probe, and uploads that stop in the middle, all from one
    address."""
    port = private.port

    def scene() -> tuple[set[int], set[bytes]]:
        heads = [b"GET / HTTP/1.1\r\nhost: localhost\r\n"] * 400
        heads += [b"POST /healthz HTTP/1.1\r\nhost: localhost\r\ncontent-length: 100\r\n\r\n"] * 40
        upload = (
            b"POST /v1/search/audio HTTP/1.1\r\nhost: localhost\r\ncontent-type: multipart/form-data; boundary=x\r\n"
        )
        heads += [upload + b"content-length: 1000000\r\n\r\n" + b"x" * 30_000] * 60
        connections = []
        for head in heads:
            connections.append(socket.create_connection(("127.0.0.1", port), 30))
            connections[-1].sendall(head)
        time.sleep(1)
        with httpx.Client(base_url=private.url, trust_env=False, timeout=30) as client:
            statuses = {client.get(f"/v1/songs/{song_id(number % 10)}/similar").status_code for number in range(40)}
            statuses |= {client.post("/v1/search", json={"text": f"rock {number}"}).status_code for number in range(10)}
        responses = {connection.recv(65_536)[:12] for connection in connections}  # each is told in time
        for connection in connections:
            connection.close()
        return statuses, responses

    statuses, responses = inside(scene)
    assert statuses == {200}
    assert responses == {b"HTTP/1.1 408", b"HTTP/1.1 429"}


def test_an_upload_that_is_refused_gets_its_response(inside: Run, private: Server):
    """32 at a time of 1 MB each for 8 places: each gets its response or 429, and no connection is reset."""
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        + os.urandom(1_000_000)
        + b"\r\n--x--\r\n"
    )
    headers = {"content-type": "multipart/form-data; boundary=x"}

    def scene() -> set[int]:
        def post(_: int) -> int:
            with httpx.Client(trust_env=False, timeout=60) as client:
                return client.post(f"{private.url}/v1/search/audio", content=body, headers=headers).status_code

        with ThreadPoolExecutor(32) as pool:
            return set(pool.map(post, range(96)))

    statuses = inside(scene)
    assert statuses <= {415, 429}
    assert 429 in statuses


def test_searches_by_song_succeed_while_no_encoder_is_alive(inside: Run, private: Server):
    """8 requests may wait for an encoder; two more places are for those that need none."""
    killed = private.pids("ServeReplica:htcl:Encoder")
    assert len(killed) == 1

    def scene() -> tuple[set[int], list[int], list[int]]:
        with httpx.Client(base_url=private.url, trust_env=False, timeout=90) as client, ThreadPoolExecutor(20) as pool:
            os.kill(killed[0], signal.SIGKILL)
            texts = [
                pool.submit(client.post, "/v1/search", json={"text": f"jazz without an encoder {number}"})
                for number in range(20)
            ]
            time.sleep(0.5)
            waiting = [text for text in texts if not text.done()]
            songs = {client.get(f"/v1/songs/{song_id(number % 10)}/similar").status_code for number in range(30)}
            still = [text for text in waiting if not text.done()]
            return songs, [len(waiting), len(still)], [text.result().status_code for text in texts]

    songs, (waiting, still), texts = inside(scene)
    assert songs == {200}
    assert waiting == 8
    assert still > 0  # so that the searches by song came before the encoder was back
    assert sorted(texts) == [200] * 8 + [429] * 12


def test_a_server_whose_ingress_dies_never_responds_from_the_catalogue_of_the_other(
    inside: Run, exposed: Server, private: Server
):
    assert exposed.index != private.index
    killed = private.pids("ServeReplica:htcl:Ingress")
    assert len(killed) == 1

    def scene() -> list[tuple[int, str | None]]:
        seen = []
        with httpx.Client(base_url=private.url, trust_env=False, timeout=60) as client:
            assert client.get(f"/v1/songs/{song_id(1)}/similar").json()["index"] == private.index
            os.kill(killed[0], signal.SIGKILL)
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline and not (
                len(seen) > 20 and all(status == 200 for status, _ in seen[-20:])
            ):
                response = client.get(f"/v1/songs/{song_id(1)}/similar")
                seen.append((response.status_code, response.json()["index"] if response.status_code == 200 else None))
                time.sleep(0.02)
        return seen

    seen = inside(scene)
    assert {status for status, _ in seen} <= {200, 429, 503}
    assert {index for status, index in seen if status == 200} == {private.index}
    assert all(status == 200 for status, _ in seen[-20:])  # it came back


def test_while_it_stops_it_says_503_and_closes(inside: Run, private: Server):
    """Requests during SIGTERM succeed, get 503, or are not accepted any more; no path is 404."""

    def scene() -> list[tuple[str, str]]:
        seen = []
        private.process.send_signal(signal.SIGTERM)
        while private.process.poll() is None:
            try:
                with httpx.Client(trust_env=False, timeout=20) as client:
                    response = client.get(f"{private.url}/v1/songs/{song_id(1)}/similar")
                seen.append((str(response.status_code), response.headers.get("connection", "")))
                if response.status_code == 503:
                    assert response.json()["error"]["code"] == "unavailable"
                    assert response.headers["retry-after"] == "1"
            except (httpx.ConnectError, httpx.ReadError, httpx.RemoteProtocolError) as error:
                seen.append((type(error).__name__, ""))
            time.sleep(0.02)
        return seen

    seen = inside(scene)
    outcomes = [outcome for outcome, _ in seen]
    assert set(outcomes) <= {"200", "503", "ConnectError", "ReadError"}
    if "ReadError" in outcomes:  # Ray kills HAProxy last: one request may be in it or in its socket, and none follows
        assert set(outcomes[outcomes.index("ReadError") + 1 :]) <= {"ConnectError"}
    assert ("503", "close") in seen
    with pytest.raises(httpx.ConnectError):
        inside(lambda: ask(private.url))
