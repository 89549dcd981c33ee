"""Print how many nodes a cluster has, whenever that changes, by Ray's own list: a program, since a process has one
Ray."""

from __future__ import annotations

import sys
import time

import ray


def main() -> None:
    ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
    before = 0
    while True:
        alive = sum(node["Alive"] for node in ray.nodes())
        if alive != before:
            print(alive, flush=True)
            before = alive
        time.sleep(0.2)


if __name__ == "__main__":
    main()
