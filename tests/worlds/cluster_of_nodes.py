"""A cluster of several nodes on one machine, for a test that removes one: run as a program, since a process has one
Ray.

Its head has no CPUs, as in the cloud. It says its address, and removes a worker node without grace for each line that
it reads.
"""

from __future__ import annotations

import json
import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 100_000_000})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=100_000_000) for _ in range(2)]
    cluster.wait_for_nodes()
    print(json.dumps({"address": cluster.address}), flush=True)
    for _ in sys.stdin:
        cluster.remove_node(nodes.pop(), allow_graceful=False)
        print(json.dumps({"removed": True}), flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
