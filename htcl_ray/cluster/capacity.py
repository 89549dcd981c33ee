"""What a cluster can become: the nodes that are there, and those that its autoscaler may add."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from htcl_ray.cluster.ray_internals import HEAD_RESOURCE, autoscaling_file
from htcl_ray.config.sections import StageSettings
from htcl_ray.errors import ConfigError

Resources = Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster that has grown as far as it can."""

    stay: tuple[Resources, ...]
    """Resources of each node that is there in any case: the head, or without an autoscaler all nodes."""
    groups: tuple[tuple[Resources, int], ...]
    """Resources of a node that can be added, and how many such nodes there can be."""
    max_added: int
    """Nodes of all groups together."""
    grows: bool | None
    """Whether an autoscaler adds nodes; None when nobody here can say."""

    @property
    def max_nodes(self) -> int:
        """Nodes that there can be."""
        return len(self.stay) + self.max_added

    def workers_that_fit(self, each: Resources) -> int:
        """How many workers, each with these resources on one node, the whole cluster can hold."""
        per_node = ((_times(each, node), count) for node, count in self.groups)
        left, fit = self.max_added, sum(_times(each, node) for node in self.stay)
        for workers, count in sorted(per_node, reverse=True, key=lambda item: item[0]):
            taken = min(count, left)
            fit, left = fit + workers * taken, left - taken
        return fit

    def __str__(self) -> str:
        """Say it as a person would count it: `at most 3 nodes: 1 × 4 CPU, 3 × 2 CPU`."""
        kinds = Counter(map(_named, self.stay))
        for node, count in self.groups:
            kinds[_named(node)] += min(count, self.max_added)
        shown = ", ".join(f"{count} × {kind}" for kind, count in kinds.items() if count)
        return f"{'at most ' if self.grows else ''}{self.max_nodes} node(s): {shown or 'none'}"


def capacity() -> Capacity:
    """What the cluster that this process is connected to can become.

    The autoscaler's configuration says it; it lies on the head node, where a submitted job runs. Ray itself tells
    nobody, so where that file is out of reach (on Kubernetes, or in a driver elsewhere) the nodes that are there are
    counted, and `grows` is None.
    """
    import ray

    here, nodes = ray.get_runtime_context().get_node_id(), [node for node in ray.nodes() if node["Alive"]]
    alive = [node["Resources"] for node in nodes]
    file = autoscaling_file(ray.get_runtime_context().gcs_address)
    if file is not None:
        return from_autoscaling_config(yaml.safe_load(file.read_text(encoding="utf-8")), alive)
    on_head = any(node["NodeID"] == here and HEAD_RESOURCE in node["Resources"] for node in nodes)
    return nodes_that_are_there(alive, grows=False if on_head and "KUBERNETES_SERVICE_HOST" not in os.environ else None)


def from_autoscaling_config(config: Mapping[str, Any], alive: Sequence[Resources]) -> Capacity:
    """The capacity of a cluster whose head runs `ray start --autoscaling-config` with this; the head is counted as it
    is.

    A configuration that does not state the resources of every type of node says as little as none.
    """
    types = config.get("available_node_types") or {}
    most = int(config.get("max_workers", 0))
    added = {
        name: int(kind.get("max_workers", 0 if name == config.get("head_node_type") else most))
        for name, kind in types.items()
    }
    if not types or not all(types[name].get("resources") for name, count in added.items() if count):
        return nodes_that_are_there(alive, grows=None)
    head = tuple(node for node in alive if HEAD_RESOURCE in node)
    groups = tuple((types[name]["resources"], count) for name, count in added.items() if count)
    return Capacity(head, groups, min(most, sum(added.values())), grows=True)


def nodes_that_are_there(alive: Sequence[Resources], grows: bool | None) -> Capacity:
    """The capacity of a cluster as it is."""
    return Capacity(tuple(alive), (), 0, grows)


def worker_resources(settings: StageSettings, use_gpu: bool) -> dict[str, float]:
    """What one training worker reserves on its node."""
    return {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}


def use_gpu(settings: StageSettings, found: Capacity) -> bool:
    """Whether a stage trains on GPUs: as it says, and by itself when the cluster has, or can get, one for each
    worker.
    """
    if settings.accelerator != "auto":
        return settings.accelerator == "gpu"
    return found.workers_that_fit(worker_resources(settings, use_gpu=True)) >= settings.num_workers


def check_fits(step: str, settings: StageSettings, found: Capacity) -> int:
    """How many runs of a stage the cluster can hold at a time. Raises ConfigError when it can never hold one, which
    would wait for ever.
    """
    each = worker_resources(settings, use_gpu(settings, found))
    workers = found.workers_that_fit(each)
    if workers < settings.num_workers and found.grows is not None:
        raise ConfigError(
            f"{step} needs {settings.num_workers} worker(s) with {_named(each)} each, but only {workers} fit on the cluster, which "
            f"{'can grow to' if found.grows else 'has'} {found}; lower {step}.num_workers or {step}.cpus_per_worker, or give it more nodes"
        )
    return workers // settings.num_workers


def _times(each: Resources, node: Resources) -> int:
    """How often `each` fits into a node."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount > 0), default=0)


def _named(node: Resources) -> str:
    shown = {name: node[name] for name in ("CPU", "GPU") if node.get(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "no CPU"
