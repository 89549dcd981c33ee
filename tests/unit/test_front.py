"""HAProxy as Ray is told to run it: private, and with its statistics on loopback."""

from __future__ import annotations

import importlib.util
import os
import stat
import subprocess
from pathlib import Path

import pytest

from htcl_ray.config import Config, resolve
from htcl_ray.errors import StepError
from htcl_ray.serving import front
from htcl_ray.serving.front import LOG_FORMAT, SWITCH, haproxy_front

pytestmark = pytest.mark.unit

TEMPLATE = """defaults
    option httplog
frontend prometheus
    bind :9101
    mode http
frontend http_frontend
    bind 127.0.0.1:8000
listen stats
  bind *:8404
  stats enable
"""


@pytest.fixture(autouse=True)
def no_choice_yet(monkeypatch: pytest.MonkeyPatch):
    """As in a fresh process: nothing set, Ray Serve not imported, no cluster."""
    for name in (SWITCH, "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(front, "_serve_imported", lambda: False)


@pytest.fixture
def config() -> Config:
    return resolve("demo")


def test_ray_is_told_and_afterwards_nothing_is_left(config: Config):
    before = dict(os.environ)
    with haproxy_front(config):
        assert os.environ[SWITCH] == "1"
        folder = Path(os.environ["RAY_SERVE_HAPROXY_SOCKET_PATH"]).parent
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        places = ("CONFIG_FILE_LOC", "SERVER_STATE_FILE", "BINARY_PATH")
        assert {Path(os.environ[f"RAY_SERVE_HAPROXY_{name}"]).parent for name in places} == {folder}
    assert dict(os.environ) == before
    assert not folder.exists()


def test_statistics_listen_on_loopback_only(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front, "_binary", lambda: "/bin/echo")
    with haproxy_front(config):
        configuration = Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
        configuration.write_text(TEMPLATE)
        started = subprocess.run(
            [os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(configuration)], capture_output=True, text=True, check=True
        )
        assert started.stdout == f"-db -f {configuration}\n"
        assert configuration.read_text() == TEMPLATE.replace("bind :9101", "bind 127.0.0.1:9101").replace(
            "bind *:8404", "bind 127.0.0.1:8404"
        ).replace("option httplog", f'log-format "{LOG_FORMAT}"')


def test_the_log_of_this_ray_has_no_parameters_of_addresses():
    """In them players send their keys."""
    template = rays_template()
    assert template.count("option httplog\n") == 1
    others = [line.strip() for line in template.splitlines() if line.strip().startswith(("log-format ", "log-format-sd "))]
    assert not any(part in line for line in [*others, LOG_FORMAT] for part in ("%r", "%HU", "%HQ", "url", "query"))


def rays_template() -> str:
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "serve" / "_private" / "haproxy_templates.py").read_text()


def test_too_many_requests_are_refused_before_they_reach_the_backend(config: Config, monkeypatch: pytest.MonkeyPatch):
    """HAProxy itself answers; that it takes the file, and what it answers, is seen in the serve tier."""
    monkeypatch.setattr(front, "_binary", lambda: "/bin/echo")
    rule = "    use_backend http-htcl if is_http-htcl"
    with haproxy_front(config.with_overrides({"serve.ingress_replicas": 3, "serve.max_waiting_requests": 7})):
        configuration = Path(os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"])
        configuration.write_text(f"frontend x\n{rule}\n    default_backend default_backend\n")
        subprocess.run([os.environ["RAY_SERVE_HAPROXY_BINARY_PATH"], "-f", str(configuration)], capture_output=True, check=True)
        lines = configuration.read_text().splitlines()
    assert lines[0] == "frontend x"
    assert lines[1].startswith('    http-request return status 429 content-type application/json string \'{"error": ')
    assert 'hdr Retry-After "1" if is_http-htcl' in lines[1].replace("  ", " ")
    assert lines[1].endswith("if is_http-htcl { be_conn(http-htcl) ge 21 } !{ path /healthz /readyz }")
    assert lines[2:] == [rule, "    default_backend default_backend"]


def test_the_template_of_this_ray_has_the_line_that_is_limited():
    spec = importlib.util.find_spec("ray")
    assert spec is not None
    assert spec.origin is not None
    source = (Path(spec.origin).parent / "serve" / "_private" / "haproxy_templates.py").read_text()
    assert "\n    use_backend {{ backend.name or 'unknown' }} if is_{{ backend.name or 'unknown' }}\n" in source


def test_the_template_of_this_ray_has_no_other_open_address():
    """Lines that bind without an address are those that the program rewrites."""
    binds = [line.strip() for line in rays_template().splitlines() if line.strip().startswith("bind ")]
    assert len(binds) >= 3
    for bind in binds:
        assert bind.startswith(("bind :", "bind *:", "bind {{ config.frontend_host }}", "bind {{ config.grpc_frontend_host }}"))


def test_a_choice_that_comes_too_late_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front, "_serve_imported", lambda: True)
    with pytest.raises(StepError, match="after Ray Serve was imported"), haproxy_front(config):
        pass


@pytest.mark.parametrize("choice", ["0", "1"])
def test_a_choice_that_was_made_is_left_alone(config: Config, monkeypatch: pytest.MonkeyPatch, choice: str):
    monkeypatch.setenv(SWITCH, choice)
    before = dict(os.environ)
    with haproxy_front(config):
        assert dict(os.environ) == before


def test_a_cluster_that_is_there_is_left_alone(config: Config):
    with haproxy_front(config.with_overrides({"ray.address": "auto"})):
        assert SWITCH not in os.environ


def test_without_its_program_ray_s_own_proxy_is_used(config: Config, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(front, "_binary", lambda: None)
    with haproxy_front(config):
        assert SWITCH not in os.environ
