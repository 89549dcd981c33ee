"""The Ray Serve application: building it, and running it from this process."""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from htcl_ray.cluster.connection import connect, refuse_relative_paths
from htcl_ray.cluster.ray_internals import mute_serve_shutdown, use_peer_addresses
from htcl_ray.config import Config, resolve
from htcl_ray.config.sections import ServeSettings
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.index.folder import read_manifest
from htcl_ray.index.live.activation import check_accepted, starting_pointer
from htcl_ray.pipelines.index import determined_index
from htcl_ray.serving.api_keys import Keys, is_loopback
from htcl_ray.serving.deployments import Encoder, Ingress, Served, with_exposed_host
from htcl_ray.serving.front import active_front, check_port
from htcl_ray.serving.haproxy import Front
from htcl_ray.workspace import artifacts
from htcl_ray.workspace.storage import Workspace

APPLICATION = "htcl"
SHED_REQUESTS = 10_000
"""Requests that Ray Serve sends to an ingress replica: more than ever wait, since `Admission` rejects the excess."""
ONGOING_BATCHES = 4
"""Requests of an encoder replica in batches, so that the next batch is ready when one ends; twice as many may queue."""
START_SECONDS = 120
HEALTH_CHECK_SECONDS = 1
"""Period of Ray's health checks, which detect dead replicas; Ray's default is 10 s."""
QUIET = {"enable_access_log": False, "encoding": "JSON"}
"""Logging of Ray Serve: JSON lines, without its access log, since `serving/observability.py` logs each request."""


def build_app(args: Mapping[str, Any]) -> Application:
    """Build the application from the arguments of `serve run serve.app:build_app` or the `args` of a Serve config file.

    Keys: `workspace`, `preset`, `config` (a file), `index` (a version; default the active one), and any configuration
    key, such as `serve.max_batch_size`. Host and port are those of Ray Serve itself.
    """
    given = {key: str(value) for key, value in args.items()}
    preset, file, index = (given.pop(name, None) for name in ("preset", "config", "index"))
    workspace = given.pop("workspace", None)
    config = resolve(preset, file, [f"{key}={value}" for key, value in given.items()])
    config = config.with_overrides({"workspace": workspace}) if workspace else config
    refuse_relative_paths(config)
    return create(config.with_absolute_paths(), index)


def create(config: Config, index: str | None = None) -> Application:
    """Create the application over an index of the workspace and its models, without loading or starting anything.

    `index`: a version; default the one activated last, else the newest accepted one. Raises an error unless index and
    models fit each other and `gate.require` allows them.
    """
    settings = config.serve
    served = _served(config, index)
    # Fail before anything starts. A replica checks again, since `serve run` builds the application before Serve runs.
    Keys.from_settings(with_exposed_host(settings))
    at_a_time = ONGOING_BATCHES * settings.max_batch_size
    drain = settings.request_seconds + 1
    encoder = serve.deployment(
        Encoder,
        ray_actor_options={"num_cpus": settings.encoder_cpus, "num_gpus": settings.encoder_gpus},
        max_ongoing_requests=at_a_time,
        max_queued_requests=2 * at_a_time,
        graceful_shutdown_timeout_s=drain,
        health_check_period_s=HEALTH_CHECK_SECONDS,
        **_replicas(settings),
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=SHED_REQUESTS,
        graceful_shutdown_timeout_s=drain,
        health_check_period_s=HEALTH_CHECK_SECONDS,
    )
    return ingress.bind(encoder.bind(served, settings), served, settings)


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """Options for the number of encoders: fixed, or autoscaled to about one batch of ongoing requests each."""
    if settings.max_encoder_replicas is None:
        return {"num_replicas": settings.encoder_replicas}
    scaling = AutoscalingConfig(
        min_replicas=settings.encoder_replicas,
        max_replicas=settings.max_encoder_replicas,
        target_ongoing_requests=settings.max_batch_size,
    )
    return {"autoscaling_config": scaling}


@dataclass(frozen=True)
class Running:
    """A started application."""

    url: str
    metrics: str
    """URL of the Prometheus metrics; empty without HAProxy, which serves them."""
    ready: dict[str, Any]
    """Response of /readyz: `index`, `songs`."""


@contextlib.contextmanager
def running(config: Config, index: str | None = None) -> Iterator[Running]:
    """Run the application on `serve.host` and `serve.port` (0: a free port) until the block ends.

    Yields once it is ready.
    """
    application = create(config, index)
    port = check_port(config.serve.host, config.serve.port)
    front = active_front()
    metrics, source = _metrics(config.serve, front)
    use_peer_addresses()  # for Ray's own proxy, which inherits the environment
    connect(config, source)
    if serve.status().proxies:
        raise ConfigError(
            "Ray Serve already runs on this cluster; use 'serve deploy' on it, or another cluster with ray.address"
        )
    logging.getLogger("ray.serve").addFilter(_errors_only)
    try:
        # Only HAProxy listens on serve.host; Ray's own proxy and the replicas stay behind it on loopback.
        host = config.serve.host if front is None else "127.0.0.1"
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port}, logging_config=QUIET)
        except (RayError, TimeoutError) as error:
            raise StepError(
                f"the proxy of the service did not start: {_last_line(str(error))}; Ray's logs say more"
            ) from error
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)
        except RuntimeError as error:
            raise StepError(f"the application did not start: {_last_line(str(error))}; Ray's logs say more") from error
        url = f"http://{_reachable(config.serve.host)}:{port}"
        yield Running(url, metrics, _wait_until_ready(url))
        if front is not None:
            Path(front.stop_file).touch()
        serve.delete(APPLICATION)  # the replicas drain while HAProxy still forwards their responses
    finally:
        mute_serve_shutdown()
        serve.shutdown()
        logging.getLogger("ray.serve").removeFilter(_errors_only)


@contextlib.contextmanager
def serving(config: Config, index: str | None = None) -> Iterator[str]:
    """Run the application as `running` does; yields its URL only."""
    with running(config, index) as started:
        yield started.url


def serve_until_stopped(config: Config, index: str | None = None) -> None:
    """Serve until Ctrl-C or SIGTERM, then stop cleanly; the command `htcl serve`."""
    stop = threading.Event()
    with running(config, index) as started:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        url, ready = started.url, started.ready
        print(f"serving index {ready['index']} ({ready['songs']} songs) at {url}; Ctrl-C stops", flush=True)
        if started.metrics:
            print(f"metrics for Prometheus: {started.metrics}", flush=True)
        print(
            f"try: curl -s {url}/v1/search -H 'content-type: application/json' "
            """-d '{"text": "calm piano", "k": 3}'""",
            flush=True,
        )
        stop.wait()
        print("stopping", flush=True)


def _metrics(settings: ServeSettings, front: Front | None) -> tuple[str, int | None]:
    """URL of the metrics, and the port for Ray's exporter (None: a free one)."""
    if front is not None and front.metrics:
        host, _, port = front.metrics.rpartition(":")
        return f"http://{_reachable(host.strip('[]'))}:{port}/metrics", front.metrics_source
    if not is_loopback(settings.metrics_host):
        raise ConfigError(
            f"serve.metrics_host is {settings.metrics_host}, which needs HAProxy in front; install ray[serve] with its "
            "HAProxy, or leave the metrics on 127.0.0.1"
        )
    if not settings.metrics_port:
        return "", None
    return "", check_port(settings.metrics_host, settings.metrics_port, "serve.metrics_")


def _served(config: Config, index: str | None) -> Served:
    from htcl_ray.search.encoder import model_versions  # loads torch

    workspace, require = Workspace(config.workspace), config.gate.require
    pointer = starting_pointer(
        workspace, index, require=require, determined=lambda: determined_index(workspace, config)
    )
    artifact = check_accepted(workspace, pointer.version, require)
    models = artifacts.models_of(workspace, artifact)
    versions = model_versions(workspace, *models.paths)
    read_manifest(workspace.local_copy(artifact.path), model_versions=versions)
    front = active_front()
    return Served(
        workspace,
        pointer,
        *models.paths,
        versions,
        require,
        takes_audio=models.semantic.manifest["config"].get("audio", {}).get("extractor") != "vectors",
        front_token=front.token if front else "",
    )


def _reachable(host: str) -> str:
    """Host of a URL by which this machine reaches a server that is bound to `host`."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    return f"[{'::1' if host == '::' else host}]" if ":" in host else host


def _wait_until_ready(url: str) -> dict[str, Any]:
    """Response of /readyz once it succeeds; ignores proxies that the environment names."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with opener.open(f"{url}/readyz", timeout=10) as response:
                return dict(json.load(response))
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise StepError(f"the application was started but is not ready at {url}/readyz: {error}") from None
        time.sleep(0.1)


def _errors_only(record: logging.LogRecord) -> bool:
    """Logging filter; unlike a level, it stays when Ray Serve configures its logger at its start."""
    return record.levelno >= logging.ERROR


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
