"""`htcl pretrain` as a Ray job.

ray job submit --working-dir . -- python jobs/pretrain.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Train stage 1, and return the exit code."""
    return run_step("pretrain")


if __name__ == "__main__":
    raise SystemExit(main())
