"""Private APIs of Ray, of its Optuna search and of its processes, for which Ray has no public counterpart.

No other module of the package imports a private module of Ray, names a variable of Ray Serve or reads `/proc` of
another process. `tests/unit/cluster/test_ray_internals.py` checks every use against the installed version of Ray, and
says which one has moved. The lines of Ray's HAProxy template that are edited are in `serving/haproxy.py`, because Ray
starts that program with `python -I -S`, which cannot import this package; `tests/processes/test_haproxy.py` checks
them.

Importing this module does not import Ray, because some environment variables have to be set before that.
"""

from __future__ import annotations

import contextlib
import importlib
import ipaddress
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from htcl_ray.workspace.local_copies import private_name

HEAD_RESOURCE = "node:__internal_head__"
"""Resource of which every head node has 1."""
HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"
LOOPBACK_SWITCH = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""Off: a node that starts has the address 127.0.0.1, as it has by default on macOS."""
SERVE_CONSTANTS = "ray.serve._private.constants"
SINGLE_EVENT_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_LOG_TO_STDERR": "0",
}
"""The requests of a replica stay in one event loop, which this package never blocks, and log lines are written once."""
HAPROXY_START = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}
"""Ray kills a HAProxy that is not ready in time, and the service with it. The default of 5 s is too short on a busy
machine."""
HAPROXY_RECOVERY = {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "0.5",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_RISE": "1",
    "RAY_SERVE_HAPROXY_OBSERVE_ERROR_LIMIT": "1",
    "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
    "RAY_SERVE_HAPROXY_RETRIES": "6",
}
"""By default Ray notices after 30 s that HAProxy died. A request whose replica died before it responded goes to another
replica, or waits for its successor; each retry may meet another connection that the dead replica left."""
DRAIN_SECONDS = 1
"""Time for which a replica that stops still takes requests, until HAProxy no longer sends it any."""
PLAIN_HANDLER = "PlainRayHandler"
"""Class of the handler by which Ray Data writes to the terminal."""
SHUTDOWN_MESSAGE = r"ServeController\.graceful_shutdown failed"
UNNEEDED_STARTS = ("start_monitor", "start_log_monitor", "start_api_server")
"""Methods of `ray._private.node.Node` that start the autoscaler, the copier of logs and the server of the dashboard."""
MONITOR = "monitor.py"
"""File name of the autoscaler's program."""


def haproxy_variables(
    folder: Path,
    *,
    metrics_port: int,
    statistics_port: int,
    fallback_port: int,
    fallback_grpc_port: int,
    replica_ports: range,
    idle_client_seconds: float,
    response_seconds: float,
) -> dict[str, str]:
    """Environment variables by which Ray Serve starts HAProxy with private files and ports.

    Ray's default ports and paths are the same for all applications of a machine. `folder`: of HAProxy's configuration
    and sockets. `replica_ports`: of the replicas' HTTP servers. `response_seconds`: most time that a replica has to
    respond.
    """
    return {
        HAPROXY_SWITCH: "1",
        **SINGLE_EVENT_LOOP,
        **HAPROXY_START,
        **HAPROXY_RECOVERY,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics_port),
        "RAY_SERVE_HAPROXY_NBTHREAD": "2",
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": f"{idle_client_seconds:g}",
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(round(response_seconds)),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_port),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc_port),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(replica_ports.start),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(replica_ports.stop),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(DRAIN_SECONDS),
    }


def private_cluster_options(folder: str, metrics_port: int | None) -> dict[str, Any]:
    """Arguments of `ray.init` that Ray does not document: folder of the sessions, and port of the Prometheus exporter.

    `metrics_port`: None leaves the choice of a free port to Ray.
    """
    return {"_temp_dir": folder, **({} if metrics_port is None else {"_metrics_export_port": metrics_port})}


@contextlib.contextmanager
def loopback_node() -> Iterator[None]:
    """Give a cluster that is started in this block the address 127.0.0.1.

    Other machines then reach none of its ports. Ray reads the variable in every process of the cluster; in this
    process it has read it on import.
    """
    constants: Any = importlib.import_module("ray._private.ray_constants")
    before, read = os.environ.get(LOOPBACK_SWITCH), constants.ENABLE_RAY_CLUSTER
    os.environ[LOOPBACK_SWITCH], constants.ENABLE_RAY_CLUSTER = "0", False
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = read
        del os.environ[LOOPBACK_SWITCH]
        if before is not None:
            os.environ[LOOPBACK_SWITCH] = before


@contextlib.contextmanager
def few_processes() -> Iterator[None]:
    """Start a cluster in this block without three processes that one user on one machine does not need.

    These are the autoscaler, the copier of logs to the terminal, and the server of usage statistics, which is what is
    left of the dashboard with `include_dashboard=False`.
    """
    node: Any = importlib.import_module("ray._private.node").Node
    originals = {name: getattr(node, name) for name in UNNEEDED_STARTS}
    for name in originals:
        setattr(node, name, _start_nothing)
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(node, name, original)


def _start_nothing(*_: Any, **__: Any) -> None:
    """Take the place of a method of Ray's node that starts a process."""


def on_private_cluster() -> bool:
    """Whether this process is connected to a private cluster: its session is in the private folder of a user.

    The address of its node does not tell, since a machine without a network starts every cluster on loopback.
    """
    node = importlib.import_module("ray._private.worker").global_worker.node
    if node is None:  # a client of a remote cluster
        return False
    return Path(node.get_session_dir_path()).parent.parent.name.startswith(private_name())


def keep_nodes_of_ray_data() -> None:
    """Let the runs of Ray Data of this process use the node of a private cluster without requesting others.

    Ray Data otherwise starts a process that hands its requests to the autoscaler, as it still does when this process
    connects to another cluster later.
    """
    import ray
    from ray.data._internal.cluster_autoscaler import ClusterAutoscaler
    from ray.data._internal.execution import streaming_executor
    from ray.data._internal.execution.interfaces import ExecutionResources

    class NoAutoscaler(ClusterAutoscaler):  # type: ignore[misc]
        """All resources of the cluster, which does not grow."""

        def try_trigger_scaling(self) -> None: ...

        def on_executor_shutdown(self) -> None: ...

        def get_total_resources(self) -> ExecutionResources:
            return ExecutionResources.from_resource_dict(ray.cluster_resources())

    original = streaming_executor.create_cluster_autoscaler
    if original.__module__ == __name__:  # replaced already
        return

    def create(*arguments: Any, **named: Any) -> ClusterAutoscaler:
        return NoAutoscaler() if on_private_cluster() else original(*arguments, **named)

    streaming_executor.create_cluster_autoscaler = create


def torch_trainer() -> Any:
    """Class of a run of Ray Train: `ray.train.torch.TorchTrainer`, or on a private cluster one with fewer processes.

    Ray Train starts four processes in addition to the controller and the workers of a run. Python starts twice in each
    of them all, because they have environment variables of their own. On a private cluster

    * processes inherit the variables that `connect` has set and start once;
    * no process hands out shards of Ray Data, which this package does not use in training;
    * no process requests nodes of an autoscaler, because none runs;
    * no process watches the controller to remove its placement group: it would query Ray's dashboard, which does not
      run.
    """
    from ray.train.torch import TorchTrainer

    if not on_private_cluster():
        return TorchTrainer
    import ray
    from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
    from ray.train.v2._internal.execution.controller.controller import TrainController
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    unused = (DatasetsCallback, PlacementGroupCleanerCallback)

    class FixedNodes(FixedScalingPolicy):  # type: ignore[misc]
        """Requests no nodes."""

        def after_controller_start(self, train_run_context: Any) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

    class PrivateController(TrainController):  # type: ignore[misc]
        """Starts workers without environment variables of their own."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            group = importlib.import_module("ray.train.v2._internal.execution.worker_group.worker_group")
            group.get_env_vars_to_propagate = dict  # type: ignore[attr-defined]
            super().__init__(*arguments, **named)

    class PrivateTrainer(TorchTrainer):  # type: ignore[misc]
        """A run with as few processes as it needs."""

        def _create_default_callbacks(self) -> list[Any]:
            return [callback for callback in super()._create_default_callbacks() if not isinstance(callback, unused)]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            parts["scaling_policy"] = FixedNodes(self.scaling_config)
            controller = ray.remote(num_cpus=0)(PrivateController).remote(**parts)
            if threading.current_thread() is threading.main_thread():
                self._register_sigint_handler(controller)
            try:
                ray.get(controller.run.remote())
                return ray.get(controller.get_result.remote())
            finally:
                ray.kill(controller)  # its 400 MB would stay until Python collects the last reference

    return PrivateTrainer


def session_folder() -> str:
    """Folder of the files and logs of the cluster that this process started."""
    worker = importlib.import_module("ray._private.worker")
    return str(worker.global_worker.node.get_session_dir_path())


def in_task_or_actor() -> bool:
    """Whether this process, in which Ray is initialised, runs a task or an actor and not a command."""
    import ray

    return bool(ray.get_runtime_context().worker.mode == ray.WORKER_MODE)


def mute_data_errors() -> None:
    """Keep Ray Data from printing the errors of tasks, which it also raises; they stay in its log file."""
    for handler in logging.getLogger("ray.data").handlers:
        if type(handler).__name__ == PLAIN_HANDLER:
            handler.setLevel(logging.CRITICAL)


def mute_serve_shutdown() -> None:
    """Drop a line of the raylet that reports every regular shutdown of Ray Serve as a failed call of its controller."""
    from ray._private.ray_logging import stdout_deduplicator

    stdout_deduplicator.skip_re = re.compile(SHUTDOWN_MESSAGE)


def autoscaling_file(gcs_address: str, processes: Path = Path("/proc")) -> Path | None:
    """Configuration file of the autoscaler of the cluster at `gcs_address`; None where it does not run on this machine.

    `processes`: a mounted process file system.
    """
    for process in processes.glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        except OSError:  # the process has ended
            continue
        if any(argument.endswith(MONITOR) for argument in command) and f"--gcs-address={gcs_address}" in command:
            named = [argument.partition("=")[2] for argument in command if argument.startswith("--autoscaling-config=")]
            file = (process / "cwd").resolve() / os.path.expanduser(named[0]) if named else None
            if file is not None and file.is_file():
                return file
    return None


def use_peer_addresses() -> None:
    """Make the HTTP servers that this process, or a child of it, starts from now on report the address of their peer.

    Ray Serve runs uvicorn with its defaults, which believes X-Forwarded-For of every connection from loopback, where
    HAProxy is, even if the client sent that header.
    """
    os.environ["FORWARDED_ALLOW_IPS"] = ""


def bind_grpc_to_loopback() -> None:
    """On a node with a loopback address, bind the gRPC server of a replica to loopback instead of all addresses.

    To be called in the constructor of a deployment: Ray Serve starts the server after it.
    """
    import ray
    from ray.serve._private import replica

    if not ipaddress.ip_address(ray.util.get_node_ip_address()).is_loopback:
        return
    add_port: Callable[[Any, str], int] = replica.add_port_to_grpc_server

    def add_loopback_port(server: Any, address: str) -> int:
        return add_port(server, address.replace("[::]", "127.0.0.1"))

    replica.add_port_to_grpc_server = add_loopback_port


def serve_host() -> str | None:
    """Address on which the Ray Serve of this cluster accepts HTTP requests; None where it does not run."""
    import ray
    from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

    if not ray.is_initialized():
        return None
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
    except ValueError:  # not started yet
        return None
    return str(ray.get(controller.get_http_config.remote()).host)


def optuna_study(search: Any) -> Any:
    """Study of a running `ray.tune.search.optuna.OptunaSearch`: an `optuna.Study`."""
    return vars(search)["_ot_study"]


def optuna_trials(search: Any) -> dict[str, Any]:
    """Trials of an `OptunaSearch` that have not ended, by Ray Tune's id; each is an `optuna.trial.Trial`."""
    trials: dict[str, Any] = vars(search)["_ot_trials"]
    return trials
