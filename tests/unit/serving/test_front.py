"""Environment variables and options for HAProxy, set before Ray starts."""

from __future__ import annotations

import os
import re
import socket
import stat
import sys
from pathlib import Path

import pytest

from htcl_ray.cluster.ray_internals import HAPROXY_SWITCH
from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.serving import front
from htcl_ray.serving.front import active_front, haproxy_front

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch):
    """State of a fresh process: no variable set, Ray Serve not imported, no cluster."""
    for name in (HAPROXY_SWITCH, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "ray.serve", raising=False)


@pytest.fixture
def config() -> Config:
    return resolve("demo")


def test_haproxy_variables_are_set_inside_the_block_only(config: Config):
    before = dict(os.environ)
    with haproxy_front(config):
        assert os.environ[HAPROXY_SWITCH] == "1"
        folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        places = ("CONFIG_FILE_LOC", "SERVER_STATE_FILE", "BINARY_PATH")
        assert {Path(os.environ[f"RAY_SERVE_HAPROXY_{name}"]).parent for name in places} == {folder}
    assert dict(os.environ) == before
    assert not folder.exists()


def test_options_reach_the_haproxy_program(config: Config):
    changed = config.with_overrides(
        {"serve.host": "::1", "serve.ingress_replicas": 3, "serve.max_waiting_requests": 7, "serve.metrics_port": 0}
    )
    with haproxy_front(changed):
        options = active_front()
        assert options is not None
        assert (options.host, options.max_requests) == ("[::1]", 3 * (7 + 2))
        assert len(options.token) == 32
        assert re.fullmatch(r"127\.0\.0\.1:\d+", options.metrics)
        assert Path(os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"]).stat().st_mode & 0o777 == 0o700
    assert active_front() is None


def test_ports_are_distinct(config: Config):
    """Ray's default ports are the same for all applications of a machine, which would then share requests."""
    names = ("FALLBACK_PROXY_HTTP_PORT", "FALLBACK_PROXY_GRPC_PORT", "HAPROXY_METRICS_PORT", "HAPROXY_STATS_PORT")
    ports = []
    for _ in range(2):
        with haproxy_front(config.with_overrides({"serve.metrics_port": 0})):
            options = active_front()
            assert options is not None
            ports += [int(os.environ[f"RAY_SERVE_{name}"]) for name in names] + [options.metrics_source]
            assert not {8500, 9500, 9101, 8404} & set(ports)
            first, last = (int(os.environ[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX"))
            assert last - first == 100
            assert last <= 32_768  # where the ports of outgoing connections begin
    assert len(set(ports[:5])) == 5


def test_a_metrics_port_in_use_is_an_error_or_replaced(config: Config, monkeypatch: pytest.MonkeyPatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with (
            pytest.raises(ConfigError, match=rf"127\.0\.0\.1 port {port} .*in use.*serve\.metrics_port"),
            haproxy_front(config.with_overrides({"serve.metrics_port": port})),
        ):
            pass
        monkeypatch.setattr(front, "METRICS_PORT", port)
        with haproxy_front(config):
            options = active_front()
            assert options is not None
            assert options.metrics.startswith("127.0.0.1:")
            assert options.metrics != f"127.0.0.1:{port}"


def test_setup_after_importing_ray_serve_is_an_error(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "ray.serve", sys)
    with pytest.raises(StepError, match="after Ray Serve was imported"), haproxy_front(config):
        pass


def test_the_environment_switches_haproxy_off(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(HAPROXY_SWITCH, "0")
    before = dict(os.environ)
    with haproxy_front(config):
        assert dict(os.environ) == before


def test_the_settings_of_an_image_are_replaced_and_restored(config: Config, monkeypatch: pytest.MonkeyPatch):
    """The settings of deploy/Containerfile are for nodes of a cluster; `htcl serve` needs its own ports and limits."""
    monkeypatch.setenv(HAPROXY_SWITCH, "1")
    monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", "/image/htcl-haproxy")
    before = dict(os.environ)
    with haproxy_front(config):
        assert active_front() is not None
        assert os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"] != "/image/htcl-haproxy"
    assert dict(os.environ) == before


def test_an_existing_cluster_is_not_changed(config: Config):
    with haproxy_front(config.with_overrides({"ray.address": "auto"})):
        assert HAPROXY_SWITCH not in os.environ


def test_without_haproxy_ray_uses_its_own_proxy(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front.haproxy, "find_binary", lambda: None)
    with haproxy_front(config):
        assert HAPROXY_SWITCH not in os.environ


def test_services_that_start_together_choose_different_metrics_ports(config: Config):
    """HAProxy binds the port later, so a check that it is free does not reserve it."""
    ports = []
    with haproxy_front(config):
        ports.append(active_front().metrics)
        with haproxy_front(config):
            ports.append(active_front().metrics)
    assert len(set(ports)) == 2
