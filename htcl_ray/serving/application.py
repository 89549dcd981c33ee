"""The Serve application: what it consists of, and running it from this process."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig

from htcl_ray import artifacts
from htcl_ray.config import Config, resolve
from htcl_ray.errors import ConfigError, StepError
from htcl_ray.pipelines.cluster import connect, refuse_relative_paths
from htcl_ray.pipelines.index import determined_index
from htcl_ray.retrieval.activation import check_accepted, starting_pointer
from htcl_ray.retrieval.index_folder import read_manifest
from htcl_ray.retrieval.vectors import ModelVersions
from htcl_ray.serving.deployments import Encoder, Ingress, Served
from htcl_ray.serving.keys import Keys
from htcl_ray.settings import ServeSettings
from htcl_ray.storage import Workspace

APPLICATION = "htcl"
SHED_REQUESTS = 10_000
"""Requests that Ray Serve lets into an ingress replica: more than may ever wait there, since it is the guard that answers 429."""
ONGOING_BATCHES = 4
"""Batches' worth of requests that an encoder replica holds, so that the next batch is there when one ends; twice as many wait for it."""
START_SECONDS = 120
QUIET = {"enable_access_log": False, "encoding": "JSON"}
"""Ray Serve's logging: JSON lines, without its own line for each request, since `serving/observed.py` writes one."""


def build_app(args: Mapping[str, Any]) -> Application:
    """The application, for `serve run serve.app:build_app workspace=/path preset=demo` and for the `args` of a Serve config file.

    Keys: `workspace`, `preset`, `config` (a file), `index` (a version; default the active one), and any configuration key, such as
    `serve.max_batch_size`. Host and port are those of Ray Serve itself.
    """
    given = {key: str(value) for key, value in args.items()}
    preset, file, index = (given.pop(name, None) for name in ("preset", "config", "index"))
    workspace = given.pop("workspace", None)
    config = resolve(preset, file, [f"{key}={value}" for key, value in given.items()])
    config = config.with_overrides({"workspace": workspace}) if workspace else config
    refuse_relative_paths(config)
    return create(config.with_absolute_paths(), index)


def create(config: Config, index: str | None = None) -> Application:
    """The application over an index of the workspace (default: what was activated last, else the newest accepted) and its models.

    Checks that they fit each other and that `gate.require` allows them; loads neither and starts nothing.
    """
    settings = config.serve
    served = _served(config, index)
    Keys.from_settings(settings)  # refuses what cannot be served before anything starts
    at_a_time = ONGOING_BATCHES * settings.max_batch_size
    drain = settings.request_seconds + 1
    encoder = serve.deployment(
        Encoder,
        ray_actor_options={"num_cpus": settings.encoder_cpus, "num_gpus": settings.encoder_gpus},
        max_ongoing_requests=at_a_time,
        max_queued_requests=2 * at_a_time,
        graceful_shutdown_timeout_s=drain,
        **_replicas(settings),
    )
    ingress = serve.deployment(
        Ingress,
        num_replicas=settings.ingress_replicas,
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=SHED_REQUESTS,
        graceful_shutdown_timeout_s=drain,
    )
    return ingress.bind(encoder.bind(served, settings), served, settings)


def _replicas(settings: ServeSettings) -> dict[str, Any]:
    """How many encoders: a number, or as many as the requests under way need, about one batch for each."""
    if settings.max_encoder_replicas is None:
        return {"num_replicas": settings.encoder_replicas}
    scaling = AutoscalingConfig(
        min_replicas=settings.encoder_replicas,
        max_replicas=settings.max_encoder_replicas,
        target_ongoing_requests=settings.max_batch_size,
    )
    return {"autoscaling_config": scaling}


@contextlib.contextmanager
def serving(config: Config, index: str | None = None) -> Iterator[str]:
    """Start the application on `serve.host` and `serve.port` (0: a free one), give its URL once it is ready, and stop it at the end."""
    application = create(config, index)
    port = _claim_port(config.serve)
    connect(config)
    if serve.status().proxies:
        raise ConfigError("Ray Serve already runs on this cluster; use 'serve deploy' there, or another cluster with ray.address")
    logging.getLogger("ray.serve").addFilter(_errors_only)
    try:
        serve.start(proxy_location="HeadOnly", http_options={"host": config.serve.host, "port": port}, logging_config=QUIET)
        try:
            serve.run(application, name=APPLICATION, route_prefix="/", logging_config=QUIET)
        except RuntimeError as error:
            raise StepError(f"the application did not start: {_last_line(str(error))}; Ray's logs say more") from error
        url = f"http://{_reachable(config.serve.host)}:{port}"
        _wait_until_ready(url)
        yield url
        serve.delete(APPLICATION)  # replicas end what they have begun, while the front still carries their answers
    finally:
        _mute_shutdown()
        serve.shutdown()
        logging.getLogger("ray.serve").removeFilter(_errors_only)


def serve_until_stopped(config: Config, index: str | None = None) -> None:
    """`htcl serve`: serve until Ctrl-C or SIGTERM, then stop cleanly."""
    stop = threading.Event()
    with serving(config, index) as url:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        with urllib.request.urlopen(f"{url}/v1/index") as response:
            served = json.load(response)
        print(f"serving index {served['version']} ({served['songs']} songs) at {url}; Ctrl-C stops", flush=True)
        print(f"""try: curl -s {url}/v1/search -H 'content-type: application/json' -d '{{"text": "calm piano", "k": 3}}'""", flush=True)
        stop.wait()
        print("stopping", flush=True)


def _served(config: Config, index: str | None) -> Served:
    from htcl_ray.models import weights_fingerprint  # loads torch

    workspace, require = Workspace(config.workspace), config.gate.require
    pointer = starting_pointer(workspace, index, require=require, determined=lambda: determined_index(workspace, config))
    artifact = check_accepted(workspace, pointer.version, require)
    models = artifacts.models_of(workspace, artifact)
    preference = models.preference
    versions: ModelVersions = {
        "semantic": weights_fingerprint(workspace.local_copy(models.semantic.path)),
        "preference": weights_fingerprint(workspace.local_copy(preference.path)) if preference else None,
    }
    read_manifest(workspace.local_copy(artifact.path), model_versions=versions)
    return Served(workspace, pointer, models.semantic.path, preference.path if preference else None, versions, require)


def _claim_port(settings: ServeSettings) -> int:
    """The port, checked to be free, or a free one for 0. Raises ConfigError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {settings.host} port {settings.port} ({error.strerror}); choose another with --set serve.port=N "
                "(0 picks a free one) or --set serve.host=ADDRESS"
            ) from None
        return probe.getsockname()[1]


def _reachable(host: str) -> str:
    """The host of a URL that reaches a server bound to `host` from this machine."""
    if host == "0.0.0.0":
        return "127.0.0.1"
    return f"[{'::1' if host == '::' else host}]" if ":" in host else host


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=10):
                return
        except (urllib.error.URLError, OSError) as error:
            if time.monotonic() > deadline:
                raise StepError(f"the application was started but is not ready at {url}/readyz: {error}") from None
        time.sleep(0.1)


def _errors_only(record: logging.LogRecord) -> bool:
    """Ray Serve sets up its logger when it starts, level included; a filter stays."""
    return record.levelno >= logging.ERROR


def _mute_shutdown() -> None:
    """Every regular shutdown of Serve makes the raylet report that the controller, which ends itself, was killed during a call."""
    from ray._private.ray_logging import stdout_deduplicator

    stdout_deduplicator.skip_re = re.compile(r"ServeController\.graceful_shutdown failed")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason was given"
