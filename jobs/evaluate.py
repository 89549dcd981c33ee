"""`htcl evaluate` as a Ray job.

ray job submit --working-dir . -- python jobs/evaluate.py --workspace ABSOLUTE_PATH_OR_URI
"""

from htcl_ray.cli import run_step


def main() -> int:
    """Evaluate on held-out songs and users, and return the exit code."""
    return run_step("evaluate")


if __name__ == "__main__":
    raise SystemExit(main())
