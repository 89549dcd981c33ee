"""Capacity of a cluster: its current nodes, and those that its autoscaler may add."""

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
    """Nodes of a cluster once its autoscaler has added as many as it may."""

    permanent: tuple[Resources, ...]
    """Resources of each permanent node: the head, or without an autoscaler all nodes."""
    groups: tuple[tuple[Resources, int], ...]
    """For each kind of node that can be added: its resources, and the maximum number of such nodes."""
    max_added: int
    """Maximum number of added nodes of all groups together."""
    grows: bool | None
    """Whether an autoscaler adds nodes; None where that is unknown."""

    @property
    def max_nodes(self) -> int:
        """Maximum number of nodes."""
        return len(self.permanent) + self.max_added

    def workers_that_fit(self, each: Resources) -> int:
        """Number of workers, each with these resources on one node, that the whole cluster can hold."""
        per_node = ((_times(each, node), count) for node, count in self.groups)
        left, fit = self.max_added, sum(_times(each, node) for node in self.permanent)
        for workers, count in sorted(per_node, reverse=True, key=lambda item: item[0]):
            taken = min(count, left)
            fit, left = fit + workers * taken, left - taken
        return fit

    def __str__(self) -> str:
        """Describe the nodes for a message: `at most 4 node(s): 1 × 4 CPU, 3 × 2 CPU`."""
        kinds = Counter(map(_named, self.permanent))
        for node, count in self.groups:
            kinds[_named(node)] += min(count, self.max_added)
        shown = ", ".join(f"{count} × {kind}" for kind, count in kinds.items() if count)
        return f"{'at most ' if self.grows else ''}{self.max_nodes} node(s): {shown or 'none'}"


def capacity() -> Capacity:
    """Capacity of the cluster that this process is connected to.

    It is read from the autoscaler's configuration file on the head node, where a submitted job runs, because Ray has no
    API for it. Where that file is out of reach (on Kubernetes, or for a driver on another machine), the current nodes
    are counted and `grows` is None.
    """
    import ray

    this_node, nodes = ray.get_runtime_context().get_node_id(), [node for node in ray.nodes() if node["Alive"]]
    alive = [node["Resources"] for node in nodes]
    file = autoscaling_file(ray.get_runtime_context().gcs_address)
    if file is not None:
        return from_autoscaling_config(yaml.safe_load(file.read_text(encoding="utf-8")), alive)
    on_head = any(node["NodeID"] == this_node and HEAD_RESOURCE in node["Resources"] for node in nodes)
    return current_capacity(alive, grows=False if on_head and "KUBERNETES_SERVICE_HOST" not in os.environ else None)


def from_autoscaling_config(config: Mapping[str, Any], alive: Sequence[Resources]) -> Capacity:
    """Capacity of a cluster whose head runs `ray start --autoscaling-config` with this configuration.

    `alive`: resources of the current nodes, of which the head is counted. A configuration that does not state the
    resources of every type of node counts as none.
    """
    types = config.get("available_node_types") or {}
    most = int(config.get("max_workers", 0))
    added = {
        name: int(kind.get("max_workers", 0 if name == config.get("head_node_type") else most))
        for name, kind in types.items()
    }
    if not types or not all(types[name].get("resources") for name, count in added.items() if count):
        return current_capacity(alive, grows=None)
    head = tuple(node for node in alive if HEAD_RESOURCE in node)
    groups = tuple((types[name]["resources"], count) for name, count in added.items() if count)
    return Capacity(head, groups, min(most, sum(added.values())), grows=True)


def current_capacity(alive: Sequence[Resources], grows: bool | None) -> Capacity:
    """Capacity of a cluster with its current nodes."""
    return Capacity(tuple(alive), (), 0, grows)


def worker_resources(settings: StageSettings, use_gpu: bool) -> dict[str, float]:
    """Resources that one training worker reserves on its node."""
    return {"CPU": settings.cpus_per_worker, **({"GPU": 1.0} if use_gpu else {})}


def use_gpu(settings: StageSettings, cluster: Capacity) -> bool:
    """Whether a stage trains on GPUs: as configured, or for `auto` when the cluster can have one for each worker."""
    if settings.accelerator != "auto":
        return settings.accelerator == "gpu"
    return cluster.workers_that_fit(worker_resources(settings, use_gpu=True)) >= settings.num_workers


def check_fits(step: str, settings: StageSettings, cluster: Capacity) -> int:
    """Number of runs of a stage that the cluster can hold at a time.

    Raises ConfigError when it can never hold one, since that run would wait for ever.
    """
    each = worker_resources(settings, use_gpu(settings, cluster))
    workers = cluster.workers_that_fit(each)
    if workers < settings.num_workers and cluster.grows is not None:
        raise ConfigError(
            f"{step} needs {settings.num_workers} worker(s) with {_named(each)} each, but only {workers} fit on the "
            f"cluster, which {'can grow to' if cluster.grows else 'has'} {cluster}; lower {step}.num_workers or "
            f"{step}.cpus_per_worker, or give it more nodes"
        )
    return workers // settings.num_workers


def _times(each: Resources, node: Resources) -> int:
    """Number of workers with the resources `each` that fit into a node."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount > 0), default=0)


def _named(node: Resources) -> str:
    shown = {name: node[name] for name in ("CPU", "GPU") if node.get(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "no CPU"
