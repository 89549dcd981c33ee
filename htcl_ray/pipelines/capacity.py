"""What a cluster can become: the nodes that are there, and those that its autoscaler may add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HEAD_RESOURCE = "node:__internal_head__"
"""Every head node has 1 of it, whatever its CPUs."""
Resources = Mapping[str, float]


@dataclass(frozen=True)
class Capacity:
    """The nodes of a cluster that has grown as far as it can."""

    groups: tuple[tuple[Resources, int], ...]
    """Resources of a node, and how many such nodes there can be."""
    max_nodes: int
    """Of all groups together."""
    grows: bool
    """Whether an autoscaler adds nodes; False also when nobody says so."""

    def workers_that_fit(self, each: Resources) -> int:
        """How many workers, each with these resources on one node, the whole cluster can hold."""
        per_node = ((_times(each, node), count) for node, count in self.groups)
        left, fit = self.max_nodes, 0
        for workers, count in sorted(per_node, reverse=True, key=lambda item: item[0]):
            taken = min(count, left)
            fit, left = fit + workers * taken, left - taken
        return fit

    def has_gpus(self) -> bool:
        """Whether any node has, or would have, a GPU."""
        return any(node.get("GPU", 0) > 0 and count > 0 for node, count in self.groups)

    def __str__(self) -> str:
        """Say it as a person would count it: `1 node of 4 CPU, up to 3 of 2 CPU`."""
        shown = ", ".join(f"{count} of {_named(node)}" for node, count in self.groups if count)
        return f"{'up to ' if self.grows else ''}{shown or 'no nodes'}"


def capacity() -> Capacity:
    """What the cluster that this process is connected to can become.

    The autoscaler's configuration says it; it lies on the head node, where a submitted job runs. Ray itself tells nobody, so on Kubernetes,
    where that file is out of reach, the nodes that are there are counted.
    """
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    file = autoscaling_file(ray.get_runtime_context().gcs_address)
    config = {} if file is None else yaml.safe_load(file.read_text(encoding="utf-8"))
    return from_autoscaling_config(config, alive)


def from_autoscaling_config(config: Mapping[str, Any], alive: Sequence[Resources]) -> Capacity:
    """The capacity of a cluster whose head runs `ray start --autoscaling-config` with this; the head is counted as it is.

    A configuration that does not state the resources of every type of node says as little as none.
    """
    types = {name: kind for name, kind in config.get("available_node_types", {}).items() if name != config["head_node_type"]}
    if not types or not all(kind.get("resources") for kind in types.values()):
        return Capacity(tuple((node, 1) for node in alive), len(alive), grows=False)
    most = int(config.get("max_workers", 0))
    head = tuple((node, 1) for node in alive if HEAD_RESOURCE in node)
    workers = tuple((kind["resources"], int(kind.get("max_workers", most))) for kind in types.values())
    return Capacity((*head, *workers), len(head) + most, grows=True)


def autoscaling_file(gcs_address: str, processes: Path = Path("/proc")) -> Path | None:
    """The file that this cluster's autoscaler was started with, when it runs on this machine."""
    for process in processes.glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if any(word.endswith("monitor.py") for word in command) and f"--gcs-address={gcs_address}" in command:
            named = [word.partition("=")[2] for word in command if word.startswith("--autoscaling-config=")]
            file = (process / "cwd").resolve() / named[0] if named else None
            if file is not None and file.is_file():
                return file
    return None


def _times(each: Resources, node: Resources) -> int:
    """How often `each` fits into a node."""
    return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in each.items() if amount > 0), default=0)


def _named(node: Resources) -> str:
    shown = {name: node[name] for name in ("CPU", "GPU") if node.get(name)}
    return ", ".join(f"{amount:g} {name}" for name, amount in shown.items()) or "no CPU"
