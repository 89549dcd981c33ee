"""Where Ray Serve has no setting: the private parts of it that this package uses."""

from __future__ import annotations

import os
import re
from typing import Any

import ray

from htcl_ray.serving.api_keys import is_loopback


def use_peer_addresses() -> None:
    """Let HTTP servers that start in this process later, or in its children, report the address of the connection.

    By default uvicorn believes X-Forwarded-For of connections from loopback, where HAProxy is, whoever wrote it.
    """
    os.environ["FORWARDED_ALLOW_IPS"] = ""


def keep_internal_port_private() -> None:
    """On a node that listens on loopback only, bind the replica's gRPC server to it as well; Ray binds it to all
    addresses.

    Called in a constructor: the server starts after it.
    """
    if not is_loopback(ray.util.get_node_ip_address()):
        return
    from ray.serve._private import replica

    add_port = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return int(add_port(server, address.replace("[::]", "127.0.0.1")))

    replica.add_port_to_grpc_server = add_loopback_port


def exposed_host(configured: str) -> str:
    """The address on which Ray Serve accepts requests, when it runs and other machines reach that; otherwise
    `configured`.
    """
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    if not ray.is_initialized():
        return configured
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:  # not started yet
        return configured
    host = str(ray.get(controller.get_http_config.remote()).host)
    return configured if is_loopback(host) else host


def mute_shutdown() -> None:
    """Every regular shutdown of Serve makes the raylet report that the controller, which ends itself, was killed during
    a call.
    """
    from ray._private.ray_logging import stdout_deduplicator

    stdout_deduplicator.skip_re = re.compile(r"ServeController\.graceful_shutdown failed")
