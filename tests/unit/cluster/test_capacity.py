"""Capacity of a cluster, from the autoscaler's configuration and the current nodes."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as some

from htcl_ray.cluster.capacity import (
    Capacity,
    check_fits,
    from_autoscaling_config,
    use_gpu,
)
from htcl_ray.cluster.ray_internals import HEAD_RESOURCE
from htcl_ray.config import resolve
from htcl_ray.errors import ConfigError

pytestmark = pytest.mark.unit
ROOT = Path(__file__).parents[3]
HEAD = {"CPU": 1.0, HEAD_RESOURCE: 1.0, "memory": 4e9}
CPU, GPU = {"CPU": 1.0}, {"CPU": 1.0, "GPU": 1.0}


def read(name: str) -> dict[str, Any]:
    tree: dict[str, Any] = yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))
    return tree


def naive_fit(each: dict[str, float], node: dict[str, float]) -> int:
    """Number of workers that fit on a node, by placing one after another."""
    left, fit = dict(node), 0
    while all(left.get(name, 0) >= amount for name, amount in each.items()):
        left = {name: amount - each.get(name, 0) for name, amount in left.items()}
        fit += 1
    return fit


cpus = some.integers(0, 8)
groups = some.lists(some.tuples(cpus, some.integers(0, 2), some.integers(0, 3)), max_size=3)


@settings(deadline=None, derandomize=True)
@given(
    permanent=some.lists(cpus, max_size=2),
    groups=groups,
    most=some.integers(0, 6),
    needs=some.tuples(some.integers(1, 3), some.integers(0, 1)),
)
def test_workers_that_fit_match_a_brute_force_search(
    permanent: list[int], groups: list[tuple[int, int, int]], most: int, needs: tuple[int, int]
):
    each = {"CPU": float(needs[0]), **({"GPU": 1.0} if needs[1] else {})}
    nodes = [{"CPU": float(cpu), "GPU": float(gpu)} for cpu, gpu, _ in groups]
    cluster = Capacity(
        tuple({"CPU": float(cpu)} for cpu in permanent),
        tuple((node, count) for node, (_, _, count) in zip(nodes, groups, strict=True)),
        most,
        grows=True,
    )
    choices = itertools.product(*(range(count + 1) for _, _, count in groups))
    added = max(
        sum(n * naive_fit(each, node) for n, node in zip(choice, nodes, strict=True))
        for choice in choices
        if sum(choice) <= most
    )
    assert cluster.workers_that_fit(each) == sum(naive_fit(each, {"CPU": float(cpu)}) for cpu in permanent) + added


def test_fractions_of_a_resource_add_up_to_a_whole_node():
    cluster = Capacity(({"CPU": 0.3},), (({"CPU": 1.0, "GPU": 1.0}, 1),), 1, grows=True)
    assert cluster.workers_that_fit({"CPU": 0.1}) == 13
    assert cluster.workers_that_fit({"CPU": 0.1, "GPU": 0.1}) == 10


def test_the_local_autoscaling_cluster():
    cluster = from_autoscaling_config(read("deploy/autoscaling-local.yaml"), [HEAD, {"CPU": 2.0}])
    assert cluster.grows
    assert cluster.max_nodes == 4
    assert cluster.workers_that_fit(CPU) == 1 + 3 * 2
    assert cluster.workers_that_fit({"CPU": 2.0}) == 3
    assert cluster.workers_that_fit({"CPU": 3.0}) == 0
    assert str(cluster) == "at most 4 node(s): 1 × 1 CPU, 3 × 2 CPU"


def test_the_aws_cluster_with_the_resources_that_ray_up_adds():
    """`ray up` adds the resources of the instance types to the file of the head node."""
    config = read("cluster.yaml")
    head = {HEAD_RESOURCE: 1.0}
    as_it_is = from_autoscaling_config(config, [head])
    assert (as_it_is.grows, as_it_is.max_nodes) == (None, 1)
    config["available_node_types"]["cpu"]["resources"] = {"CPU": 16}
    config["available_node_types"]["gpu"]["resources"] = {"CPU": 8, "GPU": 1}
    cluster = from_autoscaling_config(config, [head, {"CPU": 16.0}])
    assert cluster.workers_that_fit(CPU) == 8 * 16 + 4 * 8
    assert cluster.workers_that_fit(GPU) == 4
    assert str(cluster) == "at most 13 node(s): 1 × no CPU, 8 × 16 CPU, 4 × 8 CPU, 1 GPU"
    config["max_workers"] = 5
    assert from_autoscaling_config(config, [head]).workers_that_fit(CPU) == 5 * 16, (
        "the head's place is no place for a worker"
    )


def test_a_cluster_of_fixed_machines_is_counted_as_it_is():
    """As written, and as `ray up` passes it on: one type for all machines, without resources."""
    handed_on = {
        **read("deploy/cluster-local.yaml"),
        "head_node_type": "local.cluster.node",
        "available_node_types": {
            "local.cluster.node": {"node_config": {}, "resources": {}, "min_workers": 2, "max_workers": 2}
        },
    }
    for config in (read("deploy/cluster-local.yaml"), handed_on, {}):
        cluster = from_autoscaling_config(config, [HEAD, {"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0}])
        assert cluster.grows is None
        assert cluster.workers_that_fit(CPU) == 9
        assert cluster.workers_that_fit(GPU) == 1
        assert str(cluster) == "3 node(s): 1 × 1 CPU, 1 × 4 CPU, 1 GPU, 1 × 4 CPU"


def test_missing_max_workers_have_the_defaults_of_ray():
    """The default of `max_workers` is 0 for the type of the head, and that of the cluster for other types."""
    types: dict[str, Any] = {"head": {"resources": {"CPU": 1}}, "worker": {"resources": {"CPU": 2}}}
    config = {"max_workers": 3, "head_node_type": "head", "available_node_types": types}
    assert from_autoscaling_config(config, [HEAD]).workers_that_fit(CPU) == 1 + 3 * 2
    types["head"]["max_workers"] = 1
    types["worker"]["max_workers"] = 1
    assert from_autoscaling_config(config, [HEAD]).workers_that_fit(CPU) == 1 + 1 + 2
    types["worker"]["max_workers"] = 0
    types["worker"]["resources"] = {}
    assert from_autoscaling_config(config, [HEAD]).workers_that_fit(CPU) == 2, (
        "a type that is never added need not be known"
    )


def test_a_stage_that_never_fits_is_an_error_with_the_numbers():
    cluster = from_autoscaling_config(read("deploy/autoscaling-local.yaml"), [HEAD])
    config = resolve("demo", None, ["pretrain.num_workers=4", "pretrain.accelerator=cpu"])
    assert check_fits("pretrain", config.pretrain, cluster) == 1
    assert check_fits("pretrain", config.with_overrides({"pretrain.num_workers": 2}).pretrain, cluster) == 3
    needs = config.with_overrides({"pretrain.cpus_per_worker": 2}).pretrain
    with pytest.raises(
        ConfigError,
        match=r"pretrain needs 4 worker\(s\) with 2 CPU each, but only 3 fit on the cluster, which can grow to",
    ):
        check_fits("pretrain", needs, cluster)
    unknown = Capacity((HEAD,), (), 0, grows=None)
    assert check_fits("pretrain", needs, unknown) == 0


def test_gpus_are_used_when_every_worker_can_have_one():
    stage = resolve("demo", None, ["pretrain.num_workers=2"]).pretrain
    one, two = (Capacity((HEAD,), (({"CPU": 8.0, "GPU": 1.0}, count),), count, grows=True) for count in (1, 2))
    assert [use_gpu(stage, cluster) for cluster in (one, two)] == [False, True]
    assert [use_gpu(stage.model_copy(update={"accelerator": name}), two) for name in ("cpu", "gpu")] == [False, True]
