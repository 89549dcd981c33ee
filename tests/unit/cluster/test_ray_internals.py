"""Private APIs of Ray: each use is where `ray_internals.py` expects it in the installed version, and does its work."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import uvicorn

from htcl_ray.cluster import ray_internals
from htcl_ray.cluster.ray_internals import (
    HEAD_RESOURCE,
    LOOPBACK_SWITCH,
    MONITOR,
    PLAIN_HANDLER,
    SERVE_CONSTANTS,
    UNNEEDED_STARTS,
    autoscaling_file,
    bind_grpc_to_loopback,
    few_processes,
    haproxy_variables,
    keep_nodes_of_ray_data,
    loopback_node,
    mute_data_errors,
    mute_serve_shutdown,
    optuna_study,
    optuna_trials,
    private_cluster_options,
    torch_trainer,
    use_peer_addresses,
)
from htcl_ray.serving.haproxy import BINARY_PATH
from htcl_ray.workspace.local_copies import private_name

pytestmark = pytest.mark.unit

VARIABLES = haproxy_variables(
    Path("/folder"),
    metrics_port=1,
    statistics_port=2,
    fallback_port=3,
    fallback_grpc_port=4,
    replica_ports=range(20_000, 20_100),
    idle_client_seconds=30,
    response_seconds=35.4,
)


def source(module: str) -> str:
    """Text of a module of the installed Ray."""
    specification = importlib.util.find_spec("ray")
    assert specification is not None
    assert specification.origin is not None
    place = Path(specification.origin).parent.joinpath(*module.split(".")[1:])
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    assert file.is_file(), moved(f"the module {module}")
    return file.read_text(encoding="utf-8")


def moved(name: str) -> str:
    """Message of a failed check."""
    import ray

    return f"Ray {ray.__version__} has moved or removed {name}; adapt htcl_ray/cluster/ray_internals.py"


@pytest.mark.parametrize(
    ("variable", "module"),
    [
        *((variable, SERVE_CONSTANTS) for variable in (*VARIABLES, BINARY_PATH)),
        (LOOPBACK_SWITCH, "ray._private.ray_constants"),
        ("RAY_DEDUP_LOGS_SKIP_REGEX", "ray._private.ray_constants"),
        ("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "ray.train.v2._internal.constants"),
        ("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "ray._private.accelerators.accelerator"),
        ("RAY_TRAIN_ENABLE_CONTROLLER_STRUCTURED_LOGGING", "ray.train.v2._internal.constants"),
        ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "ray.train.v2._internal.constants"),
        ("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "ray.train.v2._internal.constants"),
        ("RAY_WARN_BLOCKING_GET_INSIDE_ASYNC", "ray._common.constants"),
        ("RAY_AIR_NEW_OUTPUT", "ray.tune.experimental.output"),
    ],
)
def test_ray_reads_the_environment_variable(variable: str, module: str):
    assert f'"{variable}"' in source(module), moved(f"the environment variable {variable} from {module}")


def test_haproxy_variables_are_texts_with_private_paths_and_ports():
    assert all(isinstance(value, str) for value in VARIABLES.values())
    assert VARIABLES["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"] == "/folder/haproxy.cfg"
    assert VARIABLES["RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S"] == "30"
    assert VARIABLES["RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S"] == "35"
    ports = [VARIABLES[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"] for end in ("MIN", "MAX")]
    assert ports == ["20000", "20100"]


def test_importing_the_module_does_not_import_ray():
    """`connect` sets variables that Ray reads on import."""
    imports = [line for line in inspect.getsource(ray_internals).splitlines() if line.startswith(("import ", "from "))]
    assert not [line for line in imports if "ray" in line.replace("htcl_ray", "")]


def test_ray_init_takes_the_private_arguments():
    import ray

    assert private_cluster_options("/folder", None) == {"_temp_dir": "/folder"}
    options = private_cluster_options("/folder", 9_464)
    assert options == {"_temp_dir": "/folder", "_metrics_export_port": 9_464}
    for name in options:
        assert f'kwargs.pop("{name}"' in inspect.getsource(inspect.unwrap(ray.init)), moved(f"ray.init({name}=...)")


def test_a_loopback_node_is_requested_only_inside_the_block(monkeypatch: pytest.MonkeyPatch):
    constants: Any = importlib.import_module("ray._private.ray_constants")
    assert hasattr(constants, "ENABLE_RAY_CLUSTER"), moved("ray._private.ray_constants.ENABLE_RAY_CLUSTER")
    assert "ray_constants.ENABLE_RAY_CLUSTER" in source("ray._private.services"), moved(
        "the loopback address of a node"
    )
    before = constants.ENABLE_RAY_CLUSTER
    for value in (None, "1"):
        monkeypatch.delenv(LOOPBACK_SWITCH, raising=False)
        if value is not None:
            monkeypatch.setenv(LOOPBACK_SWITCH, value)
        with loopback_node():
            assert (constants.ENABLE_RAY_CLUSTER, os.environ[LOOPBACK_SWITCH]) == (False, "0")
        assert (constants.ENABLE_RAY_CLUSTER, os.environ.get(LOOPBACK_SWITCH)) == (before, value)


def test_three_processes_of_a_node_are_left_out_only_inside_the_block():
    from ray._private.node import Node

    def starts() -> list[Any]:
        return [getattr(Node, name, None) for name in UNNEEDED_STARTS]

    before = starts()
    assert None not in before, moved(f"one of {UNNEEDED_STARTS} of ray._private.node.Node")
    for name in UNNEEDED_STARTS:
        assert f"self.{name}(" in source("ray._private.node"), moved(f"the call of Node.{name}")
    with few_processes():
        assert not set(starts()) & set(before)
    assert starts() == before


@pytest.mark.parametrize(("folder", "private"), [(f"/tmp/{private_name()}/ray/session_1", True), ("/tmp/ray/s", False)])
def test_a_lighter_run_of_ray_train_is_for_private_clusters(
    folder: str, private: bool, monkeypatch: pytest.MonkeyPatch
):
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import datasets, placement_group_callback

    node = SimpleNamespace(get_session_dir_path=lambda: folder)
    monkeypatch.setattr("ray._private.worker.global_worker.node", node)
    trainer = torch_trainer()(lambda: None, scaling_config=ScalingConfig(num_workers=1))
    kinds = {type(callback) for callback in trainer._create_default_callbacks()}  # noqa: SLF001
    helpers = {datasets.DatasetsCallback, placement_group_callback.PlacementGroupCleanerCallback}
    assert kinds, moved("the callbacks of a trainer of Ray Train")
    assert kinds & helpers == (set() if private else helpers), moved("the callbacks that start helper processes")
    assert (type(trainer) is TorchTrainer) is not private


def test_a_lighter_run_of_ray_train_overrides_what_ray_train_calls():
    trainer = source("ray.train.v2.api.data_parallel_trainer")
    for call in (
        "self._initialize_and_run_controller(",
        "callbacks=self._create_default_callbacks()",
        "scaling_policy=create_scaling_policy(",
        "self._register_sigint_handler(controller)",
        "ray.get(controller.run.remote())",
        "ray.get(controller.get_result.remote())",
    ):
        assert call in trainer, moved(f"{call} of a trainer of Ray Train")
    policy = source("ray.train.v2._internal.execution.scaling_policy.scaling_policy")
    for method in ("after_controller_start", "_maybe_send_resource_request", "_cancel_resource_request"):
        assert f"def {method}(" in policy, moved(f"{method} of a scaling policy")
    assert "if self._coordinator_client is None:" in policy, moved("the end of a scaling policy without requests")
    workers = source("ray.train.v2._internal.execution.worker_group.worker_group")
    assert "= get_env_vars_to_propagate()" in workers, moved("the environment variables of workers")


def test_ray_data_uses_the_current_nodes(monkeypatch: pytest.MonkeyPatch):
    import ray
    from ray.data._internal.execution import streaming_executor

    call = "= create_cluster_autoscaler("
    assert call in source(streaming_executor.__name__), moved("the autoscaler of a run of Ray Data")
    monkeypatch.setattr(streaming_executor, "create_cluster_autoscaler", lambda: "Ray's own")
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0, "object_store_memory": 5.0})
    for _ in range(2):  # a process may connect several times
        keep_nodes_of_ray_data()
    created: Any = streaming_executor.create_cluster_autoscaler
    monkeypatch.setattr(ray_internals, "on_private_cluster", lambda: True)
    total = created().get_total_resources()
    assert (total.cpu, total.object_store_memory) == (3, 5)
    monkeypatch.setattr(ray_internals, "on_private_cluster", lambda: False)
    assert created() == "Ray's own", "the same process on another cluster"


def test_the_session_folder_and_the_mode_of_a_worker_are_known():
    import ray
    from ray._private.node import Node
    from ray._private.worker import global_worker
    from ray.runtime_context import RuntimeContext

    assert hasattr(global_worker, "node"), moved("ray._private.worker.global_worker.node")
    assert hasattr(Node, "get_session_dir_path"), moved("Node.get_session_dir_path")
    assert hasattr(global_worker, "mode"), moved("Worker.mode")
    assert hasattr(RuntimeContext(global_worker), "worker"), moved("RuntimeContext.worker")
    assert hasattr(ray, "WORKER_MODE"), moved("ray.WORKER_MODE")


def test_only_the_terminal_handler_of_ray_data_is_muted():
    import ray.data  # noqa: F401
    from ray._private import log

    handler_class = getattr(log, PLAIN_HANDLER, None)
    assert handler_class is not None, moved(f"ray._private.log.{PLAIN_HANDLER}")
    assert f"{log.__name__}.{PLAIN_HANDLER}" in source("ray.data._internal.logging"), moved(
        "Ray Data's terminal handler"
    )
    logger, terminal, other = logging.getLogger("ray.data"), handler_class(), logging.NullHandler()
    for handler in (terminal, other):
        logger.addHandler(handler)
    try:
        mute_data_errors()
        assert [handler.level for handler in (terminal, other)] == [logging.CRITICAL, logging.NOTSET]
    finally:
        for handler in (terminal, other):
            logger.removeHandler(handler)


def test_the_report_of_a_regular_serve_shutdown_is_dropped(monkeypatch: pytest.MonkeyPatch):
    from ray._private.ray_logging import stdout_deduplicator

    assert hasattr(stdout_deduplicator, "skip_re"), moved("ray._private.ray_logging.stdout_deduplicator.skip_re")
    assert "async def graceful_shutdown" in source("ray.serve._private.controller"), moved("the controller's shutdown")
    monkeypatch.setattr(stdout_deduplicator, "skip_re", None)
    mute_serve_shutdown()
    batch = {"lines": ["ServeController.graceful_shutdown failed"], "ip": "", "pid": 1, "job": "", "is_err": False}
    (kept,) = stdout_deduplicator.deduplicate(batch)
    assert kept["lines"] == [], moved("the filter of the raylet's lines")


@pytest.mark.parametrize(("node", "expected"), [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.1", "[::]:0")])
def test_the_grpc_server_of_a_replica_is_bound_to_loopback_on_a_loopback_node(
    node: str, expected: str, monkeypatch: pytest.MonkeyPatch
):
    import ray
    from ray.serve._private import replica

    assert 'add_port_to_grpc_server(self._server, "[::]:0")' in inspect.getsource(replica), moved(
        "a replica's gRPC port"
    )
    bound = []
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: bound.append(address) or 7)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    bind_grpc_to_loopback()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 7
    assert bound == [expected]


def test_the_address_of_serve_comes_from_its_controller():
    assert ray_internals.serve_host() is None  # Ray is not initialised
    constants = importlib.import_module(SERVE_CONSTANTS)
    for name in ("SERVE_CONTROLLER_NAME", "SERVE_NAMESPACE"):
        assert hasattr(constants, name), moved(f"{SERVE_CONSTANTS}.{name}")
    assert "def get_http_config(self)" in source("ray.serve._private.controller"), moved(
        "ServeController.get_http_config"
    )


def test_the_study_and_trials_of_an_optuna_search_can_be_reached():
    from ray.tune.search.optuna import OptunaSearch

    search = OptunaSearch(space={"x": optuna.distributions.FloatDistribution(0, 1)}, metric="m", mode="max", seed=0)
    assert hasattr(search, "_ot_study"), moved("OptunaSearch._ot_study")
    assert hasattr(search, "_ot_trials"), moved("OptunaSearch._ot_trials")
    assert isinstance(optuna_study(search), optuna.Study)
    suggestion = search.suggest("trial")
    assert optuna_trials(search)["trial"].params == suggestion


def test_http_servers_report_the_address_of_their_peer(monkeypatch: pytest.MonkeyPatch):
    """By default uvicorn replaces it by X-Forwarded-For for connections from loopback."""
    seen = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["client"])

    scope = {
        "type": "http",
        "scheme": "http",
        "client": ("127.0.0.1", 5),
        "headers": [(b"x-forwarded-for", b"1.2.3.4")],
    }
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    for prepare in (lambda: None, use_peer_addresses):
        prepare()
        config = uvicorn.Config(app, lifespan="off", log_config=None)
        config.load()
        asyncio.run(config.loaded_app(dict(scope), None, None))  # type: ignore[arg-type]
    assert seen == [("1.2.3.4", 0), ("127.0.0.1", 5)]


def test_ray_starts_its_autoscaler_with_the_arguments_that_are_read():
    from ray._common.constants import HEAD_NODE_RESOURCE_NAME
    from ray._private import services

    assert HEAD_RESOURCE == HEAD_NODE_RESOURCE_NAME, moved(f"the resource {HEAD_RESOURCE}")
    start = inspect.getsource(services.start_monitor)
    for argument in (f'"{MONITOR}"', '"--gcs-address=', '"--autoscaling-config='):
        assert argument in start or argument.replace('"', 'f"', 1) in start, moved(f"{argument} of the autoscaler")


class Processes:
    """Folder in the form of /proc, with a process that has ended."""

    def __init__(self, folder: Path) -> None:
        self.proc = folder / "proc"
        self.work = folder / "work"
        self.work.mkdir()
        self.config = self.work / "cluster.yaml"
        self.config.write_text("max_workers: 1\n")
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "7").mkdir()  # has ended, so it has no file

    def add(self, number: int, *command: str) -> None:
        process = self.proc / str(number)
        process.mkdir()
        (process / "cmdline").write_bytes("\0".join([*command, ""]).encode())
        (process / "cwd").symlink_to(self.work)

    def monitor(self, number: int, config: str | None, address: str = "10.0.0.1:6379") -> None:
        named = [] if config is None else [f"--autoscaling-config={config}"]
        self.add(
            number,
            "/usr/bin/python3",
            "-u",
            "/ray/autoscaler/v2/monitor.py",
            "--logs-dir=/tmp",
            f"--gcs-address={address}",
            *named,
        )


@pytest.fixture
def processes(tmp_path: Path) -> Processes:
    listed = Processes(tmp_path)
    listed.add(8, "/usr/bin/python3", "/ray/_private/log_monitor.py", "--gcs-address=10.0.0.1:6379")
    listed.add(9, "grep", "--autoscaling-config=cluster.yaml", "--gcs-address=10.0.0.1:6379")
    listed.add(10)
    return listed


@pytest.mark.parametrize("form", ["cluster.yaml", "../work/cluster.yaml", "{folder}/cluster.yaml", "~/cluster.yaml"])
def test_the_autoscaling_file_is_resolved_like_the_autoscaler_does(
    processes: Processes, form: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HOME", str(processes.work))
    processes.monitor(11, form.format(folder=processes.work))
    file = autoscaling_file("10.0.0.1:6379", processes.proc)
    assert file is not None
    assert file.samefile(processes.config)


def test_the_autoscaling_file_of_another_cluster_is_ignored(processes: Processes):
    processes.monitor(11, "cluster.yaml", "10.0.0.2:6379")
    processes.monitor(12, None)
    assert autoscaling_file("10.0.0.1:6379", processes.proc) is None
    processes.monitor(13, "gone.yaml")
    assert autoscaling_file("10.0.0.1:6379", processes.proc) is None
    processes.monitor(14, "cluster.yaml")
    assert autoscaling_file("10.0.0.1:6379", processes.proc) is not None
    assert autoscaling_file("10.0.0.1:6379", processes.proc / "absent") is None
