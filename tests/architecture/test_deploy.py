"""The deployment files agree with the code, with each other, and with the tools that will read them. Nothing is
started; no network."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from htcl_ray.cli import COMMANDS, build_parser
from htcl_ray.config import resolve
from tests.architecture.deployment_files import (
    FILES,
    GUIDE,
    KUBERAY,
    LAUNCHER,
    load,
    our_commands,
    pod_templates,
    ray_commands,
    repository_file,
    text,
)
from tests.architecture.kuberay_schema import SPECS

pytestmark = pytest.mark.unit


def pinned_ray() -> str:
    match = re.search(r"^ray==(\S+)$", text("constraints.txt"), flags=re.MULTILINE)
    assert match
    return match[1]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", LAUNCHER)
@pytest.mark.usefixtures("no_network")
def test_ray_takes_the_launcher_files(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(load(name))
    validate_config(prepared)
    assert sum(kind["max_workers"] for kind in prepared["available_node_types"].values()) >= prepared["max_workers"] > 0


def test_the_cloud_cluster_grows_from_its_head_alone():
    """A CPU head without work of its own, and two groups that start empty; the one with spot machines is for
    training."""
    cluster = load("cluster.yaml")
    kinds = cluster["available_node_types"]
    head = kinds.pop(cluster["head_node_type"])
    assert head["resources"] == {"CPU": 0}
    assert set(kinds) == {"cpu", "gpu"}
    assert all(kind["min_workers"] == 0 < kind["max_workers"] for kind in kinds.values())
    assert kinds["gpu"]["node_config"]["InstanceMarketOptions"]["MarketType"] == "spot"


def test_the_rehearsal_is_started_as_its_file_says():
    """The head's name and size are said to the autoscaler in the file, and again to `ray start` in the commands that
    use it."""
    cluster = load(LAUNCHER[2])
    cpus = cluster["available_node_types"][cluster["head_node_type"]]["resources"]["CPU"]
    for name in (LAUNCHER[2], GUIDE):
        assert f"RAY_CLOUD_INSTANCE_ID={cluster['provider']['head_node_id']}\n" in text(name)
        (start,) = [command for command in ray_commands(name) if f"--autoscaling-config={LAUNCHER[2]}" in command]
        assert f"--num-cpus={cpus}" in start
        for variable in ("RAY_AUTH_MODE=token", "RAY_FAKE_CLUSTER=1", "RAY_enable_autoscaler_v2=1"):
            assert variable in text(name)


def test_one_ray_version_everywhere():
    version = pinned_ray()
    for name in FILES:
        named = re.findall(r"(?i)ray(?:_?version)?[:=\-]+\s*\"?(\d+\.\d+\.\d+)", text(name))
        assert set(named) <= {version}, f"{name} names Ray {sorted(set(named))}, constraints.txt {version}"
        assert named or name == "deploy/autoscaling-local.yaml", f"{name} pins no Ray version"
    for name in KUBERAY:
        images = {container["image"] for spec in pod_templates(load(name)) for container in spec["containers"]}
        assert images == {f"htcl-ray:ray-{version}"}
    requirement = re.search(r'"ray\[.*\]>=([\d.]+),<([\d.]+)"', text("pyproject.toml"))
    assert requirement
    low, high = (tuple(int(part) for part in bound.split(".")) for bound in requirement.groups())
    assert low <= tuple(int(part) for part in version.split(".")) < high


@pytest.mark.parametrize("name", [*FILES, GUIDE])
def test_no_secret_is_written_down(name: str):
    """A token comes from a file or a secret of the cluster; 24 or more characters of a key's alphabet are suspected to
    be one."""
    content = text(name)
    assert not re.search(r"RAY_AUTH_TOKEN=(?!\$\(|\"\$\()", content)
    assert not re.search(r"(?i)(access_key|access_key_id|password|api_key)\s*[:=]\s*[\"']?[\w/+]{4,}", content)
    harmless = {"f" * 51 + "00000"}
    random = [
        word
        for word in re.findall(r"[A-Za-z0-9+]{24,}", content)
        if re.search(r"\d", word) and re.search(r"[A-Za-z]", word)
    ]
    assert not set(random) - harmless


@pytest.mark.parametrize("name", [*FILES, GUIDE])
def test_the_dashboard_stays_on_loopback(name: str):
    assert "0.0.0.0" not in text(name)
    heads = [command for command in ray_commands(name) if command[:2] == ["start", "--head"]]
    assert all("--dashboard-host=127.0.0.1" in command for command in heads)
    if name in LAUNCHER:
        assert heads, "without a command of its own, Ray's default for AWS binds the dashboard to every address"


def test_launchers_bind_the_dashboard_to_loopback_after_ray_fills_in_its_defaults():
    from ray.autoscaler._private.util import prepare_config

    for name in ("cluster.yaml", "deploy/cluster-local.yaml"):
        starts = [line for line in prepare_config(load(name))["head_start_ray_commands"] if "--head" in line]
        assert len(starts) == 1
        assert "--dashboard-host=127.0.0.1" in starts[0]


def test_every_node_asks_for_the_token():
    for name in ("cluster.yaml", "deploy/cluster-local.yaml"):
        assert "--env RAY_AUTH_MODE=token" in load(name)["docker"]["run_options"]
        assert load(name)["file_mounts"]["/home/ray/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("name", ["cluster.yaml", "deploy/cluster-local.yaml"])
def test_mounted_files_are_there_and_are_what_the_package_is_built_from(name: str):
    mounts = {there: here for there, here in load(name)["file_mounts"].items() if not here.startswith("~")}
    assert all(repository_file(here).exists() for here in mounts.values())
    assert {Path(there).name for there in mounts} == set(mounts.values())
    assert set(mounts.values()) == {"constraints.txt", "pyproject.toml", "README.md", "LICENSE", "htcl_ray"}
    assert any("--constraint /tmp/htcl-ray/constraints.txt" in line for line in load(name)["setup_commands"])


def test_images_have_the_tested_python():
    """constraints.txt was made with the Python that the Makefile names."""
    python = re.search(r"^PYTHON \?= python(\d)\.(\d+)$", text("Makefile"), flags=re.MULTILINE)
    assert python
    for name in ("cluster.yaml", "deploy/cluster-local.yaml", "deploy/Containerfile"):
        assert f"-py{python[1]}{python[2]}-" in text(name)


def test_the_container_is_built_from_what_is_there():
    lines = text("deploy/Containerfile").splitlines()
    sources = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert {"constraints.txt", "htcl_ray", "jobs", "serve"} <= set(sources)
    assert all(repository_file(source).exists() for source in sources)
    assert any("pip install" in line and "--constraint constraints.txt" in line for line in lines)


@pytest.mark.parametrize("name", [*FILES, GUIDE])
def test_our_commands_exist_with_the_arguments_given(name: str, tmp_path: Path):
    for program, *arguments in our_commands(name):
        command = arguments
        if program != "htcl":
            job = repository_file(program.removeprefix("/home/ray/htcl-ray/").removeprefix("$PWD/"))
            assert job.is_file(), f"{name}: there is no {program}"
            command = [*re.findall(r'run_step\("([\w-]+)"\)', job.read_text(encoding="utf-8")), *arguments]
        assert command[0] in COMMANDS, f"{name}: there is no {command[0]}"
        options = build_parser().parse_args(command)
        resolve(options.preset, None, options.assignments)
        if program != "htcl":
            assert options.workspace.startswith(("s3://", "/")), (
                f"{name}: a job's workspace is one that every node sees"
            )
        if options.config and not options.config.startswith(
            f"{options.workspace}/runs/tune/"
        ):  # that one a search writes
            assert repository_file(options.config).is_file()


def test_commands_are_found_in_the_files():
    """The tests above would pass on files whose commands they do not see."""
    assert ["/home/ray/htcl-ray/jobs/pretrain.py", "--preset", "paper"] in [
        command[:3] for command in our_commands(KUBERAY[1])
    ]
    assert our_commands("cluster.yaml")[0][0] == "jobs/preprocess.py"
    assert {"up", "down", "dashboard", "start", "job"} <= {command[0] for command in ray_commands("cluster.yaml")}
    steps = {Path(command[0]).stem for command in our_commands(GUIDE)}
    assert steps >= {"preprocess", "tune", "pretrain", "finetune", "embed", "build_index", "evaluate"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", [*FILES, GUIDE])
def test_ray_commands_exist_with_the_options_given(name: str):
    from ray.scripts.scripts import cli

    for command in ray_commands(name):
        group, arguments = cli, list(command)
        while hasattr(group, "commands"):
            word = arguments.pop(0)
            assert word in group.commands, f"{name}: there is no 'ray {' '.join(command)}'"
            group = group.commands[word]
        group.make_parser(group.context_class(group)).parse_args(list(arguments))
        if command[0] in {"up", "down", "dashboard", "exec", "attach", "monitor"}:
            assert repository_file(arguments[0]).is_file(), f"{name}: there is no {arguments[0]}"


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_manifests_have_the_form_that_the_operator_reads(name: str):
    manifest = load(name)
    assert set(manifest) == {"apiVersion", "kind", "metadata", "spec"}
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"].lower() == Path(name).stem
    assert re.fullmatch(r"[a-z][a-z0-9-]{0,46}", manifest["metadata"]["name"])
    jsonschema.Draft202012Validator(SPECS[manifest["kind"]]).validate(manifest["spec"])


def test_kuberay_objects_may_live_beside_each_other():
    """Services and secrets take their names from the object."""
    names = [load(name)["metadata"]["name"] for name in KUBERAY]
    assert len(set(names)) == len(names)


def test_pods_that_compute_on_gpus_ask_for_one():
    for name in KUBERAY[:2]:
        spec = load(name)["spec"]
        groups = spec.get("rayClusterSpec", spec)["workerGroupSpecs"]
        for group in groups:
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert ("nvidia.com/gpu" in limits) == (group["groupName"] == "gpu")
            assert group["minReplicas"] == 0


def served(name: str) -> dict[str, Any]:
    """The one application of a Serve config file, or of a RayService."""
    content = load(name)
    config = yaml.safe_load(content["spec"]["serveConfigV2"]) if "spec" in content else content
    (application,) = config["applications"]
    return application


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["serve/config.yaml", KUBERAY[2]])
def test_served_applications_exist_and_take_their_arguments(name: str):
    from ray.serve.schema import ServeDeploySchema

    application = served(name)
    content = load(name)
    ServeDeploySchema.model_validate(yaml.safe_load(content["spec"]["serveConfigV2"]) if "spec" in content else content)
    module, attribute = application["import_path"].split(":")
    assert callable(getattr(importlib.import_module(module), attribute))
    keys = {
        key: value
        for key, value in application["args"].items()
        if key not in {"workspace", "preset", "config", "index"}
    }
    config = resolve(None, None, [f"{key}={value}" for key, value in keys.items()])
    assert json.loads(config.model_dump_json())["serve"]["max_batch_size"] == keys["serve.max_batch_size"]


def test_the_service_on_kubernetes_is_the_one_of_serve_config():
    ours, theirs = served("serve/config.yaml"), served(KUBERAY[2])
    for key in ("name", "route_prefix", "import_path"):
        assert ours[key] == theirs[key]
    name = load(KUBERAY[2])["metadata"]["name"]
    assert f"{name}-serve-svc" in theirs["args"]["serve.allowed_hosts"]
    assert f"service/{name}-serve-svc" in text(KUBERAY[2])
