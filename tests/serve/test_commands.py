"""Starting and stopping the application the ways a user does."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import yaml

from htcl_ray.config import Config
from htcl_ray.errors import ConfigError
from tests.conftest import REPOSITORY
from tests.worlds.processes import spawn
from tests.worlds.small_workspace import SONGS

pytestmark = pytest.mark.serve

SCRIPTS = Path(sys.executable).parent


@contextmanager
def started(*command: str, **environment: str) -> Iterator[subprocess.Popen]:
    """A process, ended by Ctrl-C; its output is in `process.output`, line by line as it comes."""
    process = spawn(*command, **environment)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()


def test_htcl_serve(indexed: Config):
    """A request that has begun when the signal comes gets its response."""
    slow = ("--set", "serve.batch_wait_seconds=3")
    command = (
        str(SCRIPTS / "htcl"),
        "serve",
        "--preset",
        "demo",
        "--workspace",
        indexed.workspace,
        "--set",
        "serve.port=0",
        *slow,
    )
    with started(*command) as process:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("try:"):
                break
        address = re.search(
            rf"serving index \w+ \({SONGS} songs\) at (http://127\.0\.0\.1:\d+); Ctrl-C stops", "\n".join(lines)
        )
        assert address, lines
        assert httpx.get(f"{address[1]}/readyz").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            request = pool.submit(httpx.post, f"{address[1]}/v1/search", json={"text": "rock"}, timeout=30)
            time.sleep(1)
            process.send_signal(signal.SIGTERM)
            assert request.result().status_code == 200
        rest = process.stdout.read().splitlines()
        assert process.wait(timeout=60) == 0
    assert len(lines) == 4, f"noise in the terminal: {lines}"
    assert lines[2].startswith("metrics for Prometheus: http://127.0.0.1:")
    assert lines[0].startswith("Ray: private cluster")
    assert rest == ["stopping"]
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address[1]}/readyz")


def test_htcl_serve_says_what_is_wrong(tmp_path: Path):
    command = (str(SCRIPTS / "htcl"), "serve", "--preset", "demo", "--workspace", str(tmp_path))
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("htcl: error: the workspace")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_haproxy_that_does_not_start_is_one_sentence(indexed: Config, tmp_path: Path):
    haproxy = tmp_path / "haproxy"
    haproxy.write_text("#!/bin/sh\necho 'cannot bind the port' >&2\nexit 1\n")
    haproxy.chmod(0o755)
    command = [str(SCRIPTS / "htcl"), "serve", "--preset", "demo", "--workspace", indexed.workspace]
    with started(*command, "--set", "serve.port=0", RAY_SERVE_HAPROXY_BINARY_PATH=str(haproxy)) as process:
        output = process.stdout.read()
        assert process.wait(timeout=60) == 1
    assert "htcl: failed: the proxy of the service did not start: " in output
    assert "cannot bind the port" in output
    assert "Traceback" not in output


def test_serve_run_with_the_shipped_config(indexed: Config, tmp_path: Path):
    """`serve/config.yaml`, with another port and this workspace, on a cluster of its own."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    tree = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    tree["http_options"]["port"] = port
    tree["applications"][0]["args"] |= {"workspace": indexed.workspace, "preset": "demo"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with started(str(SCRIPTS / "serve"), "run", str(tmp_path / "config.yaml"), RAY_ADDRESS="local") as process:
        deadline = time.monotonic() + 180
        while not _is_ready(f"http://127.0.0.1:{port}/readyz"):
            assert process.poll() is None, process.stdout.read()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        response = httpx.post(f"http://127.0.0.1:{port}/v1/search", json={"text": "rock", "k": 3}, timeout=30).json()
        assert len(response["results"]) == 3


def test_serve_run_on_every_address_needs_keys(indexed: Config, tmp_path: Path):
    """What `http_options.host` of a config file, or KubeRay, opens to other machines needs keys as `serve.host`
    does."""
    tree = yaml.safe_load((REPOSITORY / "serve" / "config.yaml").read_text())
    tree["http_options"] |= {"host": "0.0.0.0", "port": 0}
    tree["applications"][0]["args"] |= {"workspace": indexed.workspace, "preset": "demo"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    with started(
        str(SCRIPTS / "serve"), "run", str(tmp_path / "config.yaml"), RAY_ADDRESS="local", HTCL_API_KEYS=""
    ) as process:
        said = next((line for line in process.stdout if "has no API keys" in line), "")
    assert "the service listens on 0.0.0.0, which other machines reach, and has no API keys" in said


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def test_the_builder_takes_configuration_keys(indexed: Config):
    """What `serve run serve.app:build_app workspace=… preset=demo serve.max_batch_size=4` passes; `app` is
    ./workspace."""
    from serve import app as entry

    built = entry.build_app(
        {"workspace": indexed.workspace, "preset": "demo", "serve.max_batch_size": "4", "serve.encoder_replicas": 2}
    )
    encoder, served, settings = built._bound_deployment.init_args
    assert served.workspace.uri == indexed.workspace
    assert settings.max_batch_size == 4
    assert encoder._bound_deployment.num_replicas == 2
    scaled = entry.build_app(
        {"workspace": indexed.workspace, "preset": "demo", "serve.max_encoder_replicas": 5, "serve.encoder_gpus": 0.5}
    )
    encoder = scaled._bound_deployment.init_args[0]._bound_deployment
    scaling = encoder._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.get_target_ongoing_requests()) == (1, 5, 16)
    assert encoder.ray_actor_options["num_gpus"] == 0.5
    with pytest.raises(ConfigError, match=r"serve\.max_batch_siz.*did you mean"):
        entry.build_app({"serve.max_batch_siz": "4"})
    with pytest.raises(AttributeError, match="nothing"):
        _ = entry.nothing


def test_app_is_built_when_it_is_requested_bytes(indexed: Config, monkeypatch: pytest.MonkeyPatch):
    from serve import app as entry

    monkeypatch.chdir(Path(indexed.workspace).parent)
    assert entry.app._bound_deployment.init_args[1].workspace.uri == indexed.workspace


def test_an_application_that_the_cluster_builds_needs_an_absolute_workspace(ray_cluster: None):
    """`serve deploy` builds it in a task of Ray, whose working directory is not that of the command."""
    import ray

    from serve.app import build_app

    def build() -> str:
        try:
            build_app({"workspace": "workspace"})
        except ConfigError as error:
            return str(error)
        return "built"

    assert "the workspace 'workspace' is relative" in ray.get(ray.remote(build).remote())
