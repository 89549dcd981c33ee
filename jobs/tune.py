"""`htcl tune` as a Ray job.

ray job submit --working-dir . -- python jobs/tune.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Run the hyperparameter search, and return the exit code."""
    return run_step("tune")


if __name__ == "__main__":
    raise SystemExit(main())
